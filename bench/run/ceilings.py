"""The ceilings of a run: probed in its own memory, or taken from the last probe of the same model in the same mode."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
import torch

from bench.run import ceilings_file
from bench.run.provenance import cpu_model, drive_of
from llama.inputs import Inputs
from llama.llm import LLaMA
from llama.options import BuildOptions
from llama.parallel.world import World
from wsm.engine.probe import probe_link, probe_ssd
from wsm.engine.probe_compute import probe_compute
from wsm.engine.probe_decoding import Part, probe_decoding
from wsm.formats import registry
from wsm.formats.mix import Mix
from wsm.kv.probe import probe_kv_device
from wsm.layout.groups import KINDS, GroupId
from wsm.plan.plan import Plan
from wsm.plan.time import BESIDE, KV_DEVICE, Ceiling
from wsm.store.packed_store import LARGEST_CHUNK, PackedStore

MOST_BUFFERS = 9


def _parts(plan: Plan) -> list[Part]:
    """The formats of a mix as the model has them: of the first matrix in each, its columns, and the part of all."""
    columns, decoded = dict[str, int](), dict[str, int]()
    for layout in plan.inputs.layouts.values():
        for tensor in layout.encoded:
            name = str(tensor.format)
            columns.setdefault(name, tensor.shape[1])
            decoded[name] = decoded.get(name, 0) + tensor.decoded_bytes
    return [(registry.get(name), columns[name], made / sum(decoded.values())) for name, made in decoded.items()]


def probe(llm: LLaMA) -> dict[str, Ceiling]:
    """Measure every ceiling that the mode uses; to be called when memory is taken and nothing is loaded.

    Several ranks measure at the same time: what their links share shows in the figures.
    """
    manager, in_step = llm.manager, llm.inputs.world.barrier
    in_step()
    host, slot = manager.memory.scratch() if manager is not None else (None, None)
    kv, anyone = llm.kv_tiers, _anyone(llm.inputs.world)
    if kv is not None and manager is None:
        host, slot = kv.scratch()
    found = probe_compute(llm.device, llm.inputs.dtype, slot)
    weight_format, scratch = llm.inputs.weight_format, llm.scratch.room
    if weight_format is not None and scratch.nbytes:
        parts = [(weight_format, llm.config.dim, 1.0)] if not isinstance(weight_format, Mix) else _parts(llm.plan)
        found |= probe_decoding(llm.device, parts, llm.inputs.dtype, scratch)
    if llm.inputs.device.type == "cuda":
        # Given back, so it counts neither against the budget nor as the run's peak.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(llm.inputs.device)
    if host is None or slot is None:
        return found
    found |= probe_link(llm.device, host, slot, in_step, anyone)
    if kv is not None and kv.disk is not None:
        in_step()
        found |= probe_kv_device(llm.device, kv.disk, host, slot, anyone)
    if manager is None:
        for memory in (host, slot):  # of KV: what a mask hides must be finite
            memory.zero_()
        return found
    source, residency = manager.source, manager.plan.residency
    read = residency.ssd or range(residency.n_layers)
    if isinstance(source, PackedStore):
        # Small groups cost more than their bytes: then in a pass's own order, if there is room for three. Large ones
        # would make a long probe.
        kinds = KINDS if source.slot_bytes("ffn") <= min(LARGEST_CHUNK, host.nbytes // 3) else KINDS[:1]
        size = max(map(source.slot_bytes, kinds))
        buffers = [host[start : start + size] for start in range(0, host.nbytes - size + 1, size)][:MOST_BUFFERS]
        if len(buffers) > 2:
            in_step()
            found |= probe_ssd(
                llm.device, source, [GroupId(layer, kind) for layer in read for kind in kinds], buffers, slot
            )
    return found


def _anyone(world: World) -> Callable[[bool], bool]:
    """Asks all ranks, which measure again together or not at all."""
    return bool if world.shard.size == 1 else lambda mine: "1" in world.exchange(str(int(mine)))


class _Place(NamedTuple):
    """Where this run's ceilings are kept: the machine's file, and in it, by key, those of this model, mode, sizes and
    rank, which a run may measure itself against (``exact``), and those of layers of this shape, however many, in any
    mode and budget, which a plan may predict from (``near``); those of ``--kv-device`` by themselves (``kv``), of
    blocks of this size, checked as here, by as many ranks. Each of one drive, graphics card and number of cores.
    """

    file: Path
    machine: str
    of: str
    exact: str
    near: str
    kv: str


def _place(options: BuildOptions, inputs: Inputs) -> _Place:
    device, folder, shard = inputs.device, inputs.cache_dir, inputs.world.shard
    ranks = shard if shard.size > 1 else ()
    kv = Path(options.kv_device) if options.kv_device is not None else None
    kv_drive = kv and drive_of(kv if kv.is_block_device() else kv.absolute().parent)
    store = str(options.raw_device or options.manifest or folder)
    gpu = [torch.cuda.get_device_name(device), torch.version.cuda] if device.type == "cuda" else []
    hardware = [*gpu, len(os.sched_getaffinity(0)), drive_of(Path(store.partition(",")[0]))]
    model = inputs.checkpoint.config.to_json()
    form = inputs.weight_format.name if inputs.weight_format is not None else None
    sizes = [options.staging_mb, options.mode, options.gpu_mem_gb, options.cpu_mem_gb]
    common = [hardware, str(inputs.dtype), store, *([form] if form is not None else [])]
    processor = " ".join(map(str, gpu)) or "the CPU"
    machine = f"{cpu_model()}, {psutil.virtual_memory().total} bytes of memory"
    return _Place(
        folder / f"ceilings.{_digest(machine)}.json",
        machine,
        f"{model['name']} in {inputs.format_name} {options.mode} on {processor} from {store}",
        _digest([*common, sizes, model, *ranks]),
        _digest([*common, "near", {name: value for name, value in model.items() if name not in ("name", "n_layers")}]),
        _digest(
            ["kv", hardware[:-1], str(kv), kv_drive, options.verify_weights, inputs.kv_format.record_bytes, *ranks]
        ),
    )


def _digest(key: Any) -> str:
    text = json.dumps(key, sort_keys=True, default=msgspec.to_builtins)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remember(options: BuildOptions, inputs: Inputs, ceilings: dict[str, Ceiling]) -> None:
    """Keep the ceilings for a later ``--no-probe``, and for ``plan``; not those that varied too much to be trusted."""
    steady = {name: ceiling for name, ceiling in ceilings.items() if ceiling.steady}
    inputs.cache_dir.mkdir(parents=True, exist_ok=True)  # first: the drive below it is part of the keys
    place = _place(options, inputs)
    beside_kv = [name for name, drive in BESIDE.items() if drive in KV_DEVICE]
    of_kv = {str(name): steady.pop(name) for name in (*KV_DEVICE, *beside_kv) if name in steady}
    found = {place.exact: steady, place.near: steady}
    if of_kv:
        found[place.kv] = of_kv
    ceilings_file.remember(place.file, place.machine, place.of, found)


def recall_for(options: BuildOptions, inputs: Inputs) -> dict[str, Ceiling]:
    """The ceilings of the last probe of this hardware, model, store, mode and budgets; empty if there are none."""
    place = _place(options, inputs)
    return _of_an_earlier_run(place, place.exact)


def recall_near(options: BuildOptions, inputs: Inputs) -> dict[str, Ceiling]:
    """As :func:`recall_for`, or else of other modes and budgets and of the same model with fewer layers."""
    place = _place(options, inputs)
    return _of_an_earlier_run(place, place.exact, place.near)


def _of_an_earlier_run(place: _Place, *keys: str) -> dict[str, Ceiling]:
    probes = ceilings_file.recall(place.file)
    found = next((probes[key].ceilings for key in keys if key in probes and probes[key].ceilings), {})
    if place.kv in probes:
        found = found | probes[place.kv].ceilings
    told = {name: dataclasses.replace(c, how=f"{c.how} (of an earlier run)") for name, c in found.items()}
    return {name: ceiling for name, ceiling in told.items() if ceiling.steady}
