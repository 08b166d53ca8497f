"""The ceilings of a run: probed in its own memory, or taken from the last probe of the same hardware."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.run.provenance import cpu_model, drive_of
from llama.inputs import Inputs
from llama.llm import LLaMA
from wsm.disk.atomic import write_atomically
from wsm.engine.probe import probe_compute, probe_link, probe_ssd
from wsm.layout.groups import GroupId
from wsm.plan.time import Ceiling
from wsm.store.packed_store import PackedStore

MOST_BUFFERS = 9


def probe(llm: LLaMA) -> dict[str, Ceiling]:
    """Measure every ceiling that the mode uses; to be called when memory is taken and nothing is loaded.

    Several ranks measure at the same time, so that what their links share shows.
    """
    manager, in_step = llm.manager, llm.inputs.world.barrier
    in_step()
    if manager is None:
        found = probe_compute(llm.device, llm.inputs.dtype)
        _release(llm.inputs.device)
        return found
    host, slot = manager.memory.scratch()
    found = probe_compute(llm.device, llm.inputs.dtype, slot)
    _release(llm.inputs.device)
    found |= probe_link(llm.device, host, slot, in_step)
    source, residency = manager.source, manager.plan.residency
    read = residency.ssd or range(residency.n_layers)
    if isinstance(source, PackedStore):
        size = source.slot_bytes("attn")
        buffers = [host[start : start + size] for start in range(0, host.nbytes - size + 1, size)][:MOST_BUFFERS]
        if len(buffers) > 2:
            in_step()
            found |= probe_ssd(llm.device, source, [GroupId(layer, "attn") for layer in read], buffers, slot)
    return found


def _release(device: torch.device) -> None:
    """Give back what the probe took, so that it counts neither against the budget nor as the run's peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _exact_file(inputs: Inputs) -> Path:
    """Of this model, mode, sizes and rank: what a run may measure itself against."""
    settings, shard = inputs.options.settings, inputs.world.shard
    sizes = [settings.staging_mb, settings.mode, settings.gpu_mem_gb, settings.cpu_mem_gb]
    return _file(inputs, [sizes, inputs.checkpoint.config.to_json(), *(shard if shard.size > 1 else ())])


def _near_file(inputs: Inputs) -> Path:
    """Of layers of this shape, however many, in any mode and budget: what a plan may predict from."""
    shape = {k: v for k, v in inputs.checkpoint.config.to_json().items() if k not in ("name", "n_layers")}
    return _file(inputs, ["near", shape])


def _file(inputs: Inputs, more: list[Any]) -> Path:
    """One file a machine and store."""
    options = inputs.options
    store = str(options.raw_device or options.manifest or options.cache_dir.expanduser())
    hardware = _hardware(inputs.device, Path(store.partition(",")[0]))
    key = json.dumps([hardware, str(inputs.dtype), store, *more], sort_keys=True)
    return options.cache_dir.expanduser() / f"ceilings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _hardware(device: torch.device, store: Path) -> list[Any]:
    """What tells this machine from another that shares the cache directory."""
    gpu = [torch.cuda.get_device_name(device), torch.version.cuda] if device.type == "cuda" else []
    return [*gpu, cpu_model(), len(os.sched_getaffinity(0)), psutil.virtual_memory().total, drive_of(store)]


def remember(inputs: Inputs, ceilings: dict[str, Ceiling]) -> None:
    """Keep the ceilings for a later ``--no-probe``, and for ``plan``."""
    exact = _exact_file(inputs)
    exact.parent.mkdir(parents=True, exist_ok=True)
    _write(exact, ceilings)
    _write(_near_file(inputs), {**_read(_near_file(inputs)), **ceilings})


def _write(path: Path, ceilings: dict[str, Ceiling]) -> None:
    content = {name: dataclasses.asdict(ceiling) for name, ceiling in ceilings.items()}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def recall_for(inputs: Inputs) -> dict[str, Ceiling]:
    """The ceilings of the last probe of this hardware, store and mode; empty if there are none."""
    return _of_an_earlier_run(_read(_exact_file(inputs)))


def recall_near(inputs: Inputs) -> dict[str, Ceiling]:
    """As :func:`recall_for`, or else of other modes and budgets and of the same model with fewer layers."""
    return recall_for(inputs) or _of_an_earlier_run(_read(_near_file(inputs)))


def _of_an_earlier_run(ceilings: dict[str, Ceiling]) -> dict[str, Ceiling]:
    return {name: dataclasses.replace(c, how=f"{c.how} (of an earlier run)") for name, c in ceilings.items()}


def _read(path: Path) -> dict[str, Ceiling]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Ceiling(**entry) for name, entry in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
