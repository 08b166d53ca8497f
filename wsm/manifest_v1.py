"""Manifests of version 1, which people have beside partitions packed by an older tool: one entry a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama.checkpoint import Checkpoint
from llama.checkpoint.names import GroupId, TensorSpec, full_name, global_specs, group_specs, pass_order
from llama.config import UnusableInput
from wsm.groups import BLOCK, TENSOR_ALIGNMENT, GroupLayout, TensorLayout, round_up
from wsm.manifest import DTYPES, Extent, StoreDescription, StoredGroup

_EMBEDDING = ("tok_embeddings.weight", "embed_tokens.weight")


class _Param(NamedTuple):
    short: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def describe_v1(
    manifest: Mapping[str, Any], path: Path, targets: tuple[str, ...] | None, checkpoint: Checkpoint | None
) -> StoreDescription:
    """The store behind a version 1 manifest.

    Raises:
        UnusableInput: for a missing tensor or field, a shape that is not the model's, an unknown dtype, or a
            misaligned offset.
    """
    if checkpoint is None:
        raise UnusableInput(
            f"--manifest {path} is of version 1, which does not say the model's shape: give --checkpoints too"
        )
    try:
        device = str(manifest["raw_device"])
        block = int(manifest["block_size"])
        params = {str(entry["name"]): entry for entry in manifest["params"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableInput(f"--manifest {path} is damaged: {error!r}") from error
    if block < 1 or block % TENSOR_ALIGNMENT:
        raise UnusableInput(f"--manifest {path}: block_size {block} is no multiple of {TENSOR_ALIGNMENT}: pack again")
    config = checkpoint.config
    groups: dict[GroupId | None, StoredGroup] = {None: _group(None, global_specs(config), params, path)}
    for group in pass_order(config.n_layers):
        groups[group] = _group(group, group_specs(config, group.kind), params, path)
    if beyond := [name for name in params if name.startswith(f"layers.{config.n_layers}.")]:
        raise UnusableInput(f"--manifest {path} has {beyond[0]}, but the model has {config.n_layers} layers")
    dtypes = {tensor.dtype for group in groups.values() for tensor in group.layout.tensors}
    if len(dtypes) != 1:
        raise UnusableInput(f"--manifest {path} mixes dtypes: pack again")
    return StoreDescription(1, path, targets or (device,), config, dtypes.pop(), groups)


def _group(
    group: GroupId | None, specs: Sequence[TensorSpec], params: Mapping[str, Mapping[str, Any]], path: Path
) -> StoredGroup:
    return _placed(group, [_param(full_name(group, spec.name), spec, params, path) for spec in specs])


def _param(name: str, spec: TensorSpec, params: Mapping[str, Mapping[str, Any]], path: Path) -> _Param:
    names = _EMBEDDING if name in _EMBEDDING else (name,)
    entry = next((params[known] for known in names if known in params), None)
    if entry is None:
        raise UnusableInput(f"--manifest {path} has no tensor {name}, which the model needs")
    try:
        dtype = DTYPES.get(entry["dtype"])
        shape, offset, nbytes = tuple(entry["shape"]), int(entry["offset"]), int(entry["nbytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableInput(f"--manifest {path}: {name}: {error!r}") from error
    if dtype is None:
        raise UnusableInput(f"--manifest {path}: {name} has dtype {entry['dtype']!r}; {', '.join(DTYPES)} run here")
    if shape != spec.shape or nbytes != math.prod(shape) * dtype.itemsize:
        raise UnusableInput(
            f"--manifest {path}: {name} is {list(shape)} in {nbytes} bytes, the model has {list(spec.shape)}"
        )
    if offset < 0 or offset % TENSOR_ALIGNMENT:
        raise UnusableInput(
            f"--manifest {path}: {name} lies at {offset}, no multiple of {TENSOR_ALIGNMENT}: pack again"
        )
    return _Param(spec.name, dtype, shape, offset, nbytes)


def _placed(group: GroupId | None, params: list[_Param]) -> StoredGroup:
    """Reads widened to whole blocks, adjacent ones merged, each with its own aligned room in the slot."""
    extents: list[Extent] = []
    tensors: dict[str, TensorLayout] = {}
    for param in sorted(params, key=lambda param: param.offset):
        low, end = param.offset - param.offset % BLOCK, param.offset + param.nbytes
        last = extents[-1] if extents else None
        if last is not None and low <= last.offset + last.nbytes:
            high = max(last.offset + last.nbytes, round_up(end, BLOCK))
            needed = max(last.needed, end - last.offset)
            extents[-1] = Extent(0, last.offset, high - last.offset, last.slot_offset, needed)
        else:
            room = last.slot_offset + last.nbytes if last is not None else 0
            extents.append(Extent(0, low, round_up(end, BLOCK) - low, room, end - low))
        place = extents[-1].slot_offset + param.offset - extents[-1].offset
        tensors[param.short] = TensorLayout(param.short, param.dtype, param.shape, place, param.nbytes)
    nbytes = extents[-1].slot_offset + extents[-1].nbytes
    return StoredGroup(group, GroupLayout(nbytes, tuple(tensors[p.short] for p in params)), tuple(extents), None)
