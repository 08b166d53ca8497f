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

from bench.provenance import cpu_model, drive_of
from llama.build import Inputs, LLaMA
from llama.checkpoint.names import GroupId
from wsm.atomic import write_atomically
from wsm.probe import Ceiling, probe_compute, probe_link, probe_ssd
from wsm.store import PackedStore

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
    host, slot = manager.scratch()
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


def _cache_file(inputs: Inputs) -> Path:
    """One file a machine, store and setting that the probe depends on, and rank."""
    options, shard = inputs.options, inputs.world.shard
    settings = options.settings
    store = str(options.raw_device or options.manifest or options.cache_dir.expanduser())
    sizes = [settings.staging_mb, settings.mode, settings.gpu_mem_gb, settings.cpu_mem_gb]
    of_run = [str(inputs.dtype), store, sizes, inputs.checkpoint.config.to_json(), *(shard if shard.size > 1 else ())]
    key = json.dumps([_hardware(inputs.device, Path(store.partition(",")[0])), *of_run], sort_keys=True)
    return options.cache_dir.expanduser() / f"ceilings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _hardware(device: torch.device, store: Path) -> list[Any]:
    """What tells this machine from another that shares the cache directory."""
    gpu = [torch.cuda.get_device_name(device), torch.version.cuda] if device.type == "cuda" else []
    return [*gpu, cpu_model(), len(os.sched_getaffinity(0)), psutil.virtual_memory().total, drive_of(store)]


def remember(inputs: Inputs, ceilings: dict[str, Ceiling]) -> None:
    """Keep the ceilings for a later ``--no-probe``, and for ``plan``."""
    path = _cache_file(inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: dataclasses.asdict(ceiling) for name, ceiling in ceilings.items()}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def recall_for(inputs: Inputs) -> dict[str, Ceiling]:
    """The ceilings of the last probe of this hardware, store and mode; empty if there are none."""
    try:
        content = json.loads(_cache_file(inputs).read_text(encoding="utf-8"))
        return {
            name: Ceiling(**{**entry, "how": f"{entry['how']} (of an earlier run)"}) for name, entry in content.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
