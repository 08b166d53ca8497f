"""Manifests of version 3: a store in a weight format, whose images have sizes of their own.

Where things lie does not follow from the model, so a layout is checked by its bounds: aligned, apart, inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta

from wsm.errors import UnusableInput
from wsm.formats.format import WeightFormat
from wsm.formats.mix import formats_named
from wsm.layout.groups import (
    BLOCK,
    KINDS,
    TENSOR_ALIGNMENT,
    GroupId,
    GroupLayout,
    PlaneLayout,
    TensorLayout,
    TensorSpec,
    pass_order,
)
from wsm.layout.model import ModelShape, ReadShape, Shard, SourceFile
from wsm.store.description import DTYPE_NAMES, DTYPES, Name, StoreDescription, StoredGroup, typed
from wsm.store.layout import AGAIN, FORMATTED, Superblock, WrittenGroup, stride_of, stripes
from wsm.words import counted

PLANE_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.float8_e4m3fn)
} | DTYPES
_PLANE_DTYPE_NAMES = {dtype: name for name, dtype in PLANE_DTYPES.items()}

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{32}$", max_length=32)]
Aligned = Annotated[int, Meta(ge=0, multiple_of=TENSOR_ALIGNMENT)]
Block = Annotated[int, Meta(ge=BLOCK, multiple_of=BLOCK)]
Size = Annotated[int, Meta(ge=1)]
Known = Annotated[str, Meta(max_length=32)]
"""What a list has: long enough for its names, short enough to be shown."""
MixName = Annotated[str, Meta(max_length=1024)]
"""The formats of a mix: of all that there are the names are shorter."""
Shape = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=2)]


class _Plane(msgspec.Struct):
    name: Name
    dtype: Known
    shape: Shape
    offset: Aligned
    nbytes: Annotated[int, Meta(ge=0)]


class _Tensor(msgspec.Struct):
    name: Name
    dtype: Known
    shape: Shape
    offset: Aligned
    nbytes: Size
    format: str | None = None
    planes: list[_Plane] = []


class _Image(msgspec.Struct):
    """A rank's share of a group."""

    checksum: Digest
    tensors: list[_Tensor]


class _Group(msgspec.Struct):
    layer: int
    kind: str
    offset: Block
    nbytes: Block
    stride: Block
    images: list[_Image]


class _Manifest(msgspec.Struct):
    store_id: Digest
    targets: Annotated[tuple[Name, ...], Meta(min_length=1)]
    block_size: int
    dtype: Known
    weight_format: MixName
    model: dict[str, Any]
    source: tuple[SourceFile, ...]
    globals: _Group
    groups: list[_Group]
    tp: Annotated[int, Meta(ge=1)] = 1
    native: bool = False


# -- writing


def entry_v3(group: GroupId | None, written: WrittenGroup, targets: int) -> dict[str, Any]:
    """A group's entry; ``images`` has one a rank."""
    nbytes = written.layouts[0].nbytes
    return {
        "layer": group.layer if group is not None else -1,
        "kind": group.kind if group is not None else "globals",
        "offset": written.offset,
        "nbytes": nbytes,
        "stride": stride_of(nbytes, targets),
        "images": [
            {"checksum": checksum, "tensors": [_tensor_entry(tensor) for tensor in layout.tensors]}
            for layout, checksum in zip(written.layouts, written.checksums, strict=True)
        ],
    }


def _tensor_entry(tensor: TensorLayout) -> dict[str, Any]:
    entry = _part_entry(tensor)
    if tensor.format is not None:
        entry |= {"format": tensor.format, "planes": [_part_entry(plane) for plane in tensor.planes]}
    return entry


def _part_entry(part: TensorLayout | PlaneLayout) -> dict[str, Any]:
    return {
        "name": part.name,
        "dtype": _PLANE_DTYPE_NAMES[part.dtype],
        "shape": list(part.shape),
        "offset": part.offset,
        "nbytes": part.nbytes,
    }


# -- reading


def describe_v3(
    content: dict[str, Any],
    path: Path,
    targets: tuple[str, ...] | None,
    rank: int,
    read_shape: ReadShape,
    digest_of: Callable[..., str],
) -> StoreDescription:
    """The store behind a version 3 manifest; raises UnusableInput for what is missing, unknown, or out of bounds."""
    said = f"--manifest {path}"
    manifest = typed(content, _Manifest, said, AGAIN)
    count = len(manifest.targets)
    if manifest.block_size != BLOCK:
        raise UnusableInput(f"{said}: field block_size is {manifest.block_size}, not {BLOCK}; {AGAIN}")
    dtype = _known(DTYPES, manifest.dtype, f"{said}: field dtype")
    try:
        formats = formats_named(manifest.weight_format)
    except UnusableInput as error:
        raise UnusableInput(f"{said}: field weight_format: {error}") from error
    if len(formats) > 1 and not manifest.native:
        raise UnusableInput(f"{said}: field weight_format: only a quantised checkpoint's own are several; {AGAIN}")
    try:
        config = read_shape(manifest.model)
    except UnusableInput as error:
        raise UnusableInput(f"{said}: field model: {error}") from error
    if len(manifest.groups) != len(KINDS) * config.n_layers:
        raise UnusableInput(f"{said}: field groups does not list the groups of {config.n_layers} layers")
    rank = min(rank, manifest.tp - 1)  # a store of another number of ranks is refused by whoever wants to run it
    groups = _groups(manifest, config, dtype, formats, rank, said)
    if targets is not None and len(targets) != count:
        raise UnusableInput(f"--raw-device names {counted(len(targets), 'device')}, the store is striped over {count}")
    digest = digest_of(content)
    return StoreDescription(
        FORMATTED,
        path,
        targets or manifest.targets,
        config,
        dtype,
        groups,
        tuple(Superblock(manifest.store_id, digest, number, count, FORMATTED) for number in range(count)),
        manifest.source,
        shard=Shard(rank, manifest.tp),
        content=digest_of(content, ("targets", "store_id", "created")),
        weight_format=manifest.weight_format,
        native=manifest.native,
    )


def _groups(
    manifest: _Manifest,
    config: ModelShape,
    dtype: torch.dtype,
    formats: Mapping[str, WeightFormat],
    rank: int,
    said: str,
) -> dict[GroupId | None, StoredGroup]:
    """What ``rank`` has of each group; every rank's images are checked."""
    share, groups = config.share(manifest.tp), dict[GroupId | None, StoredGroup]()
    names = (None, *pass_order(config.n_layers))
    for group, entry in zip(names, (manifest.globals, *manifest.groups), strict=True):
        where = f"{said}: {'globals' if group is None else f'group {group}'}"
        _check_entry(group, entry, manifest, where)
        specs = share.specs(group.kind if group else None)
        usable = formats if group is not None else {}
        layouts = [_layout(image, entry.nbytes, specs, dtype, usable, where) for image in entry.images]
        extents = stripes(entry.nbytes, entry.offset + rank * entry.stride, len(manifest.targets))
        named_rank = rank if manifest.tp > 1 else None
        groups[group] = StoredGroup(group, layouts[rank], extents, entry.images[rank].checksum, named_rank)
    _check_apart([manifest.globals, *manifest.groups], manifest.tp, said)
    return groups


def _known(known: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in known:
        raise UnusableInput(f"{where}: {name!r} is not known; {', '.join(known)} are")
    return known[name]


def _check_entry(group: GroupId | None, entry: _Group, manifest: _Manifest, where: str) -> None:
    named = (-1, "globals") if group is None else tuple(group)
    if (entry.layer, entry.kind) != named:
        raise UnusableInput(f"{where}: fields layer and kind are {entry.layer} and {entry.kind!r:.20}; {AGAIN}")
    if len(entry.images) != manifest.tp:
        raise UnusableInput(f"{where}: field images must have one for each of {manifest.tp} ranks; {AGAIN}")
    if entry.stride != stride_of(entry.nbytes, len(manifest.targets)):
        raise UnusableInput(f"{where}: field stride is {entry.stride}, which {entry.nbytes} bytes do not make; {AGAIN}")


def _check_apart(entries: Sequence[_Group], tp: int, said: str) -> None:
    """That no group lies on another."""
    for before, after in itertools.pairwise(sorted(entries, key=lambda entry: entry.offset)):
        if before.offset + tp * before.stride > after.offset:
            raise UnusableInput(
                f"{said}: L{after.layer}.{after.kind}: field offset: {after.offset} lies within "
                f"L{before.layer}.{before.kind}; {AGAIN}"
            )


def _layout(
    image: _Image,
    nbytes: int,
    specs: Sequence[TensorSpec],
    dtype: torch.dtype,
    formats: Mapping[str, WeightFormat],
    where: str,
) -> GroupLayout:
    """An image's layout, every tensor as the model has it, every part aligned, apart from the others and inside.

    Without ``formats`` all are plain, as the globals are.
    """
    found = [(tensor.name, tensor.shape) for tensor in image.tensors]
    if found != [(spec.name, spec.shape) for spec in specs]:
        raise UnusableInput(f"{where}: field tensors is {found!r:.80}, which the model's are not; {AGAIN}")
    tensors = tuple(_tensor(tensor, dtype, formats, f"{where}: {tensor.name}") for tensor in image.tensors)
    parts = sorted(_parts(tensors), key=lambda part: (part.offset, part.nbytes))
    for before, after in itertools.pairwise(parts):
        if before.offset + before.nbytes > after.offset:
            raise UnusableInput(f"{where}: {after.name}: field offset: {after.offset} lies within another; {AGAIN}")
    if parts[-1].offset + parts[-1].nbytes > nbytes:
        raise UnusableInput(f"{where}: {parts[-1].name} ends beyond the image's {nbytes} bytes; {AGAIN}")
    return GroupLayout(nbytes, tensors)


def _parts(tensors: Sequence[TensorLayout]) -> Iterator[TensorLayout | PlaneLayout]:
    for tensor in tensors:
        yield from tensor.planes or (tensor,)


def _tensor(tensor: _Tensor, dtype: torch.dtype, formats: Mapping[str, WeightFormat], where: str) -> TensorLayout:
    if DTYPES.get(tensor.dtype) != dtype:
        raise UnusableInput(f"{where}: field dtype is {tensor.dtype!r:.20}, not {DTYPE_NAMES[dtype]}; {AGAIN}")
    if tensor.format is None:
        _check_size(tensor, dtype, where)
        return TensorLayout(tensor.name, dtype, tensor.shape, tensor.offset, tensor.nbytes)
    if (weight_format := formats.get(tensor.format)) is None or len(tensor.shape) != 2 or not tensor.planes:
        raise UnusableInput(f"{where}: a {tensor.format!r:.20} of {len(tensor.planes)} planes cannot be here; {AGAIN}")
    planes = []
    for plane in tensor.planes:
        of_plane = _known(PLANE_DTYPES, plane.dtype, f"{where}: plane {plane.name}: field dtype")
        _check_size(plane, of_plane, f"{where}: plane {plane.name}")
        planes.append(PlaneLayout(plane.name, of_plane, plane.shape, plane.offset, plane.nbytes))
    expected = weight_format.planes((tensor.shape[0], tensor.shape[1]), dtype)
    if expected is not None and [tuple(p) for p in expected] != [(p.name, p.dtype, p.shape) for p in planes]:
        raise UnusableInput(f"{where}: its planes are not those of {tensor.format}; {AGAIN}")
    low, high = min(p.offset for p in planes), max(p.offset + p.nbytes for p in planes)
    if (tensor.offset, tensor.nbytes) != (low, high - low):
        raise UnusableInput(f"{where}: fields offset and nbytes are not those of its planes; {AGAIN}")
    return TensorLayout(tensor.name, dtype, tensor.shape, low, high - low, tensor.format, tuple(planes))


def _check_size(part: _Tensor | _Plane, dtype: torch.dtype, where: str) -> None:
    nbytes = math.prod(part.shape) * dtype.itemsize
    if part.nbytes != nbytes:
        raise UnusableInput(f"{where}: field nbytes is {part.nbytes}, its shape and dtype make {nbytes}; {AGAIN}")
