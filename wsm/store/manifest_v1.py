"""Manifests of version 1, which people have beside partitions packed by an older tool: one entry per tensor."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from wsm.disk.blockdev import is_block_device, logical_block
from wsm.disk.targets import reading
from wsm.errors import UnusableInput
from wsm.layout.groups import BLOCK, TENSOR_ALIGNMENT, GroupId, GroupLayout, TensorLayout, pass_order, round_up
from wsm.layout.model import TensorSource
from wsm.store.description import DTYPES, StoreDescription, StoredGroup, typed
from wsm.store.layout import Extent

_EMBEDDING = ("tok_embeddings.weight", "embed_tokens.weight")
_AGAIN = "pack the model anew with `bench_infer.py pack`"

Aligned = Annotated[int, Meta(ge=0, multiple_of=TENSOR_ALIGNMENT)]


class Param(msgspec.Struct):
    """A tensor of the manifest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: Aligned
    nbytes: int


class _Entry(msgspec.Struct):
    """A tensor of the manifest before it is known whether the model needs it."""

    name: str


class _Manifest(msgspec.Struct):
    """What is read of a version 1 manifest. Its ``policy`` is not: the plan decides what is resident."""

    block_size: Annotated[int, Meta(gt=0, multiple_of=TENSOR_ALIGNMENT)]
    params: list[_Entry]
    raw_device: Any = None


def describe_v1(
    content: Mapping[str, Any], path: Path, targets: tuple[str, ...] | None, checkpoint: TensorSource | None
) -> StoreDescription:
    """The store behind a version 1 manifest; raises UnusableInput for what is missing, unknown, misaligned or wrong."""
    if checkpoint is None:
        raise UnusableInput(
            f"--manifest {path} is of version 1, which does not say the model's shape: give --checkpoints too"
        )
    config = checkpoint.config
    if targets is not None and len(targets) != 1:
        raise UnusableInput(f"--raw-device names {len(targets)} devices, a version 1 store lies on one")
    manifest = typed(content, _Manifest, f"--manifest {path}", _AGAIN)
    target = targets[0] if targets is not None else manifest.raw_device
    if not isinstance(target, str) or not target:
        raise UnusableInput(f"--manifest {path}: field raw_device must name a device, not {target!r}")
    entries: dict[str, Any] = {}
    for number, (entry, found) in enumerate(zip(manifest.params, content["params"], strict=True)):
        if entry.name in entries:
            raise UnusableInput(f"--manifest {path}: params[{number}]: field name: {entry.name} comes twice")
        entries[entry.name] = found
    names: list[GroupId | None] = [None, *pass_order(config.n_layers)]
    params = {
        group: {
            spec.name: _needed(config.full_name(group, spec.name), spec.shape, entries, path)
            for spec in config.specs(group.kind if group else None)
        }
        for group in names
    }
    if beyond := [name for name in entries if name.startswith(f"layers.{config.n_layers}.")]:
        raise UnusableInput(f"--manifest {path} has {beyond[0]}, but the model has {config.n_layers} layers")
    everything = [param for group in params.values() for param in group.values()]
    for before, after in itertools.pairwise(sorted(everything, key=lambda param: (param.offset, param.nbytes))):
        if before.offset + before.nbytes > after.offset:
            raise UnusableInput(
                f"--manifest {path}: {after.name}: field offset: {after.offset} lies within {before.name}; {_AGAIN}"
            )
    dtypes = {param.dtype for param in everything}
    if len(dtypes) != 1:
        raise UnusableInput(f"--manifest {path}: field dtype differs from tensor to tensor; {_AGAIN}")
    unit = _read_unit(target)
    groups = {group: place(group, found, unit) for group, found in params.items()}
    return StoreDescription(1, path, (target,), config, DTYPES[dtypes.pop()], groups)


def _needed(name: str, shape: tuple[int, ...], entries: Mapping[str, Any], path: Path) -> Param:
    """The entry of a tensor that the model needs, which has to be as the model says."""
    known = _EMBEDDING if name in _EMBEDDING else (name,)
    found = next((entries[alias] for alias in known if alias in entries), None)
    if found is None:
        raise UnusableInput(f"--manifest {path} has no tensor {name}, which the model needs")
    where = f"--manifest {path}: {found['name']}"
    entry = typed(found, Param, where, _AGAIN)
    if entry.dtype not in DTYPES:
        raise UnusableInput(f"{where}: field dtype: {entry.dtype!r} is not known; {', '.join(DTYPES)} are")
    if entry.shape != shape:
        raise UnusableInput(f"{where}: field shape is {list(entry.shape)}, the model has {list(shape)}")
    nbytes = math.prod(shape) * DTYPES[entry.dtype].itemsize
    if entry.nbytes != nbytes:
        raise UnusableInput(f"{where}: field nbytes is {entry.nbytes}, its shape and dtype make {nbytes}")
    return entry


def _read_unit(target: str) -> int:
    """What reads are widened to; a device that cannot be opened is refused when the store is opened."""
    if is_block_device(target):
        with contextlib.suppress(UnusableInput), reading(target) as file:
            return max(BLOCK, logical_block(file))
    return BLOCK


def place(group: GroupId | None, params: Mapping[str, Param], unit: int) -> StoredGroup:
    """Reads of ``params`` (by short name, in the image's order), widened to whole units; adjacent ones are merged."""
    extents: list[Extent] = []
    tensors: dict[str, TensorLayout] = {}
    for name, param in sorted(params.items(), key=lambda item: item[1].offset):
        low, end = param.offset - param.offset % unit, param.offset + param.nbytes
        last = extents[-1] if extents else None
        if last is not None and low <= last.offset + last.nbytes:
            high = max(last.offset + last.nbytes, round_up(end, unit))
            extents[-1] = Extent(0, last.offset, high - last.offset, last.slot_offset, end - last.offset)
        else:
            room = last.slot_offset + last.nbytes if last is not None else 0
            extents.append(Extent(0, low, round_up(end, unit) - low, room, end - low))
        where = extents[-1].slot_offset + param.offset - extents[-1].offset
        tensors[name] = TensorLayout(name, DTYPES[param.dtype], param.shape, where, param.nbytes)
    nbytes = extents[-1].slot_offset + extents[-1].nbytes
    return StoredGroup(group, GroupLayout(nbytes, tuple(tensors[name] for name in params)), tuple(extents), None)
