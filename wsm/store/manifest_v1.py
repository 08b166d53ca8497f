"""Manifests of version 1, which people have beside partitions packed by an older tool: one entry a tensor."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wsm.disk.blockdev import is_block_device, logical_block
from wsm.errors import UnusableInput
from wsm.layout.groups import (
    BLOCK,
    TENSOR_ALIGNMENT,
    GroupId,
    GroupLayout,
    TensorLayout,
    TensorSpec,
    pass_order,
    round_up,
)
from wsm.layout.model import ModelShape, TensorSource
from wsm.store.description import DTYPES, StoreDescription, StoredGroup
from wsm.store.extents import Extent

_EMBEDDING = ("tok_embeddings.weight", "embed_tokens.weight")
_NEEDED = ("name", "dtype", "shape", "offset", "nbytes")
_AGAIN = "pack the model anew with `bench_infer.py pack`"


class _Param(NamedTuple):
    """A tensor of the manifest, found to be what the model needs; ``name`` is short."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def describe_v1(
    manifest: Mapping[str, Any],
    path: Path,
    targets: tuple[str, ...] | None,
    checkpoint: TensorSource | None,
) -> StoreDescription:
    """The store behind a version 1 manifest. Its ``policy`` is not read: the plan decides what is resident.

    Raises:
        UnusableInput: for a missing tensor or field, a shape that is not the model's, an unknown dtype, or a
            misaligned or overlapping offset.
    """
    if checkpoint is None:
        raise UnusableInput(
            f"--manifest {path} is of version 1, which does not say the model's shape: give --checkpoints too"
        )
    config = checkpoint.config
    if targets is not None and len(targets) != 1:
        raise UnusableInput(f"--raw-device names {len(targets)} devices, a version 1 store lies on one")
    target = targets[0] if targets is not None else _device(manifest, path)
    _check_block_size(manifest, path)
    entries = _entries(manifest, path)
    names: list[GroupId | None] = [None, *pass_order(config.n_layers)]
    params = {
        group: [
            _param(config.full_name(group, spec.name), spec, entries, path)
            for spec in config.specs(group.kind if group else None)
        ]
        for group in names
    }
    if beyond := [name for name in entries if name.startswith(f"layers.{config.n_layers}.")]:
        raise UnusableInput(f"--manifest {path} has {beyond[0]}, but the model has {config.n_layers} layers")
    _check_apart(config, params, path)
    dtypes = {param.dtype for group in params.values() for param in group}
    if len(dtypes) != 1:
        raise UnusableInput(f"--manifest {path}: field dtype differs from tensor to tensor; {_AGAIN}")
    unit = _read_unit(target)
    groups = {group: place(group, found, unit) for group, found in params.items()}
    return StoreDescription(1, path, (target,), config, dtypes.pop(), groups)


def _device(manifest: Mapping[str, Any], path: Path) -> str:
    device = manifest.get("raw_device")
    if not isinstance(device, str) or not device:
        raise UnusableInput(f"--manifest {path}: field raw_device must name a device, not {device!r}")
    return device


def _check_block_size(manifest: Mapping[str, Any], path: Path) -> None:
    block: Any = manifest.get("block_size")
    if not _is_whole(block) or block == 0 or block % TENSOR_ALIGNMENT:
        raise UnusableInput(
            f"--manifest {path}: field block_size must be a multiple of {TENSOR_ALIGNMENT}, not {block!r}; {_AGAIN}"
        )


def _entries(manifest: Mapping[str, Any], path: Path) -> dict[str, Mapping[str, Any]]:
    params = manifest.get("params")
    if not isinstance(params, list):
        raise UnusableInput(f"--manifest {path} is damaged: field params must list the tensors")
    entries: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(params):
        if not isinstance(entry, dict):
            raise UnusableInput(f"--manifest {path} is damaged: params[{number}] is no object")
        if missing := [field for field in _NEEDED if field not in entry]:
            raise UnusableInput(f"--manifest {path}: params[{number}]: field {missing[0]} is missing")
        if not isinstance(entry["name"], str):
            raise UnusableInput(f"--manifest {path}: params[{number}]: field name is {entry['name']!r}, no text")
        if entry["name"] in entries:
            raise UnusableInput(f"--manifest {path}: params[{number}]: field name: {entry['name']} comes twice")
        entries[entry["name"]] = entry
    return entries


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _param(name: str, spec: TensorSpec, entries: Mapping[str, Mapping[str, Any]], path: Path) -> _Param:
    known = _EMBEDDING if name in _EMBEDDING else (name,)
    entry = next((entries[alias] for alias in known if alias in entries), None)
    if entry is None:
        raise UnusableInput(f"--manifest {path} has no tensor {name}, which the model needs")
    where = f"--manifest {path}: {entry['name']}"
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise UnusableInput(f"{where}: field dtype: {entry['dtype']!r} is not known; {', '.join(DTYPES)} are")
    if entry["shape"] != list(spec.shape):
        raise UnusableInput(f"{where}: field shape is {entry['shape']!r}, the model has {list(spec.shape)}")
    offset, nbytes = entry["offset"], math.prod(spec.shape) * dtype.itemsize
    if entry["nbytes"] != nbytes:
        raise UnusableInput(f"{where}: field nbytes is {entry['nbytes']!r}, its shape and dtype make {nbytes}")
    if not _is_whole(offset) or offset % TENSOR_ALIGNMENT:
        raise UnusableInput(f"{where}: field offset must be a multiple of {TENSOR_ALIGNMENT}, not {offset!r}; {_AGAIN}")
    return _Param(spec.name, dtype, spec.shape, offset, nbytes)


def _check_apart(config: ModelShape, params: Mapping[GroupId | None, Sequence[_Param]], path: Path) -> None:
    named = [(param, config.full_name(group, param.name)) for group, found in params.items() for param in found]
    everything = sorted((param.offset, param.nbytes, name) for param, name in named)
    for (offset, nbytes, name), (start, _, following) in itertools.pairwise(everything):
        if offset + nbytes > start:
            raise UnusableInput(f"--manifest {path}: {following}: field offset: {start} lies within {name}; {_AGAIN}")


def _read_unit(target: str) -> int:
    """What reads are widened to; a device that cannot be opened is told of when the store is."""
    if not is_block_device(target):
        return BLOCK
    try:
        file = os.open(target, os.O_RDONLY)
    except OSError:
        return BLOCK
    try:
        return max(BLOCK, logical_block(file))
    finally:
        os.close(file)


def place(group: GroupId | None, params: Sequence[_Param], unit: int) -> StoredGroup:
    """Reads widened to whole units, adjacent ones merged, each with its own aligned room in the slot."""
    extents: list[Extent] = []
    tensors: dict[str, TensorLayout] = {}
    for param in sorted(params, key=lambda param: param.offset):
        low, end = param.offset - param.offset % unit, param.offset + param.nbytes
        last = extents[-1] if extents else None
        if last is not None and low <= last.offset + last.nbytes:
            high = max(last.offset + last.nbytes, round_up(end, unit))
            extents[-1] = Extent(0, last.offset, high - last.offset, last.slot_offset, end - last.offset)
        else:
            room = last.slot_offset + last.nbytes if last is not None else 0
            extents.append(Extent(0, low, round_up(end, unit) - low, room, end - low))
        where = extents[-1].slot_offset + param.offset - extents[-1].offset
        tensors[param.name] = TensorLayout(param.name, param.dtype, param.shape, where, param.nbytes)
    nbytes = extents[-1].slot_offset + extents[-1].nbytes
    return StoredGroup(group, GroupLayout(nbytes, tuple(tensors[p.name] for p in params)), tuple(extents), None)
