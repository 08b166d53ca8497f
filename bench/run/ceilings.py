"""The ceilings of a run: probed in its own memory, or taken from the last probe of the same hardware."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from bench.run.provenance import cpu_model, drive_of
from llama.inputs import Inputs
from llama.llm import LLaMA
from llama.options import BuildOptions
from wsm.disk.atomic import write_atomically
from wsm.engine.probe import probe_compute, probe_decoding, probe_link, probe_ssd
from wsm.layout.groups import GroupId
from wsm.plan.time import Ceiling
from wsm.store.packed_store import PackedStore

MOST_BUFFERS = 9


def probe(llm: LLaMA) -> dict[str, Ceiling]:
    """Measure every ceiling that the mode uses; to be called when memory is taken and nothing is loaded.

    Several ranks measure at the same time: what their links share shows in the figures.
    """
    manager, in_step = llm.manager, llm.inputs.world.barrier
    in_step()
    host, slot = manager.memory.scratch() if manager is not None else (None, None)
    found = probe_compute(llm.device, llm.inputs.dtype, slot)
    weight_format, scratch = llm.inputs.weight_format, llm.scratch.room
    if weight_format is not None and scratch.nbytes:
        found |= probe_decoding(llm.device, weight_format, llm.config.dim, llm.inputs.dtype, scratch)
    if llm.inputs.device.type == "cuda":
        # Given back, so it counts neither against the budget nor as the run's peak.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(llm.inputs.device)
    if manager is None or host is None or slot is None:
        return found
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


def _files(options: BuildOptions, inputs: Inputs) -> tuple[Path, Path]:
    """Of this model, mode, sizes and rank: what a run may measure itself against; and of layers of this shape, however
    many, in any mode and budget: what a plan may predict from.

    Two for each machine and store; machines may share the cache directory.
    """
    device, folder, shard = inputs.device, inputs.cache_dir, inputs.world.shard
    store = str(options.raw_device or options.manifest or folder)
    gpu = [torch.cuda.get_device_name(device), torch.version.cuda] if device.type == "cuda" else []
    cpu = [cpu_model(), len(os.sched_getaffinity(0)), psutil.virtual_memory().total]
    hardware = [*gpu, *cpu, drive_of(Path(store.partition(",")[0]))]
    model = inputs.checkpoint.config.to_json()
    form = inputs.weight_format.name if inputs.weight_format is not None else None
    sizes = [options.staging_mb, options.mode, options.gpu_mem_gb, options.cpu_mem_gb]

    def file(*more: Any) -> Path:
        key = [hardware, str(inputs.dtype), store, *([form] if form is not None else []), *more]
        text = json.dumps(key, sort_keys=True, default=msgspec.to_builtins)
        return folder / f"ceilings-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    exact = file(sizes, model, *(shard if shard.size > 1 else ()))
    return exact, file("near", {name: value for name, value in model.items() if name not in ("name", "n_layers")})


def remember(options: BuildOptions, inputs: Inputs, ceilings: dict[str, Ceiling]) -> None:
    """Keep the ceilings for a later ``--no-probe``, and for ``plan``."""
    inputs.cache_dir.mkdir(parents=True, exist_ok=True)  # first: the drive below it is part of the files' names
    exact, near = _files(options, inputs)
    for path, known in ((exact, {}), (near, _read(near))):
        content = {name: dataclasses.asdict(ceiling) for name, ceiling in {**known, **ceilings}.items()}
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def recall_for(options: BuildOptions, inputs: Inputs) -> dict[str, Ceiling]:
    """The ceilings of the last probe of this hardware, store and mode; empty if there are none."""
    return _of_an_earlier_run(_files(options, inputs)[:1])


def recall_near(options: BuildOptions, inputs: Inputs) -> dict[str, Ceiling]:
    """As :func:`recall_for`, or else of other modes and budgets and of the same model with fewer layers."""
    return _of_an_earlier_run(_files(options, inputs))


def _of_an_earlier_run(files: Sequence[Path]) -> dict[str, Ceiling]:
    found = next(filter(None, map(_read, files)), {})
    return {name: dataclasses.replace(c, how=f"{c.how} (of an earlier run)") for name, c in found.items()}


def _read(path: Path) -> dict[str, Ceiling]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: Ceiling(**entry) for name, entry in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
