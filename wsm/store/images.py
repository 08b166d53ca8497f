"""Images of groups, plain or in a weight format, made of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from wsm.disk.io_threads import IOThreads, Piece
from wsm.formats import registry
from wsm.formats.format import Plane, WeightFormat
from wsm.formats.mix import Formats, format_of
from wsm.layout.groups import (
    GroupId,
    GroupLayout,
    InFormat,
    TensorSpec,
    gaps,
    image_layout,
    is_encoded,
    planes_in,
    views,
)
from wsm.layout.model import TensorSource
from wsm.store.layout import StorePlan, is_final

Encodings = dict[str, Mapping[str, Tensor]]
"""Planes by a matrix's short name; without those that stay plain."""
Moments = Callable[[GroupId], dict[str, Tensor]]
"""Of the inputs of a group's matrices, by short name: the importance of :meth:`WeightFormat.encode`; in pass order,
and waited for by the main thread."""


def make_images(
    shares: Sequence[TensorSource],
    group: GroupId | None,
    plan: StorePlan,
    buffers: Sequence[Tensor],
    readers: IOThreads,
    moments: Moments | None = None,
) -> Future[list[GroupLayout]]:
    """Every rank's image of a group in a buffer of its own, all padded to the largest; in the end, their layouts.

    A tensor is a thread's piece of work; with ``moments``, which take much memory, one is encoded after the other. The
    gaps between tensors are zero, so the same weights give the same bytes.
    """
    layout = plan.layouts[group]
    if is_final(layout) and (moments is None or not layout.encoded):
        work = [
            piece
            for share, buffer in zip(shares, buffers, strict=True)
            for piece in image_work(share, group, layout, buffer)
        ]
        return _then(readers.submit(work), lambda: [layout] * len(shares))
    assert group is not None
    assert plan.weight_format is not None
    encodings: list[Encodings] = [{} for _ in shares]
    encode = [
        partial(_encode, share, group, plan.dtype, plan.weight_format, spec, of)
        for share, of in zip(shares, encodings, strict=True)
        for spec in filter(is_encoded, share.config.specs(group.kind))
    ]
    make = partial(_make_encoded, shares, group, plan, encodings, buffers)
    if moments is None:
        return _then(readers.submit(encode), make)
    found, done = moments(group), None
    for each in encode:
        done = readers.submit([partial(each, found)], after=done)
    assert done is not None
    return _then(done, make)


def image_work(source: TensorSource, group: GroupId | None, layout: GroupLayout, buffer: Tensor) -> list[Piece]:
    """The pieces of work that fill ``buffer`` with an image whose layout is known: each tensor goes to its place."""
    _clear_gaps(buffer, layout)
    name_of = partial(source.config.full_name, group)
    work: list[Piece] = [partial(source.read_into, name_of(name), out) for name, out in views(buffer, layout).items()]
    encoded = [(tensor.name, planes_in(buffer, tensor)) for tensor in layout.encoded]
    work += [partial(source.encode_into, name_of(name), into, registry.get(into.format)) for name, into in encoded]
    return work


def _clear_gaps(buffer: Tensor, layout: GroupLayout) -> None:
    """Not the whole image: of gigabytes of new memory each page is first touched by the threads that fill it."""
    for gap in gaps(layout):
        buffer[gap].zero_()


def _then(done: Future[None], result: Callable[[], list[GroupLayout]]) -> Future[list[GroupLayout]]:
    """A future of ``result()``, which is asked on the thread that ends the work before it."""
    future = Future[list[GroupLayout]]()

    def tell(_: Future[None]) -> None:
        try:
            done.result()
            future.set_result(result())
        except BaseException as error:
            future.set_exception(error)

    done.add_done_callback(tell)
    return future


def _encode(
    source: TensorSource,
    group: GroupId,
    dtype: torch.dtype,
    formats: Formats,
    spec: TensorSpec,
    encodings: Encodings,
    moments: dict[str, Tensor] | None = None,
) -> None:
    """The matrix's own ``moments`` are taken out: the thread that was here last would hold them."""
    name = source.config.full_name(group, spec.name)
    importance = moments.pop(spec.name, None) if moments is not None else None
    if (weight_format := format_of(formats, name)) is None:
        return
    planes = source.encode(name, spec.shape, dtype, weight_format, importance)
    if planes is not None:
        encodings[spec.name] = {plane: values.cpu() for plane, values in planes.items()}


def _make_encoded(
    shares: Sequence[TensorSource],
    group: GroupId,
    plan: StorePlan,
    encodings: Sequence[Encodings],
    buffers: Sequence[Tensor],
) -> list[GroupLayout]:
    layouts = []
    for share, planes in zip(shares, encodings, strict=True):
        described = {
            name: tuple(Plane(n, p.dtype, tuple(p.shape)) for n, p in of.items()) for name, of in planes.items()
        }
        encoded = {
            name: InFormat(weight_format.name, of)
            for name, of in described.items()
            if (weight_format := format_of(plan.weight_format, share.config.full_name(group, name))) is not None
        }
        layouts.append(image_layout(share.config.specs(group.kind), plan.dtype, encoded))
    nbytes = max(layout.nbytes for layout in layouts)
    for share, planes, layout, buffer in zip(shares, encodings, layouts, buffers, strict=True):
        image = buffer[:nbytes]
        _clear_gaps(image, GroupLayout(nbytes, layout.tensors))
        for tensor in layout.encoded:
            for name, into in planes_in(image, tensor).planes.items():
                into.copy_(planes[tensor.name][name])
        for name, out in views(image, layout).items():
            share.read_into(share.config.full_name(group, name), out)
    return [GroupLayout(nbytes, layout.tensors) for layout in layouts]


def coming_layout(source: TensorSource, group: GroupId, dtype: torch.dtype, weight_format: WeightFormat) -> GroupLayout:
    """The layout that an image will have, as far as :meth:`TensorSource.planes` tells without making it."""
    encoded = {}
    for spec in filter(is_encoded, source.config.specs(group.kind)):
        name = source.config.full_name(group, spec.name)
        if (planes := source.planes(name, spec.shape, dtype, weight_format)) is not None:
            encoded[spec.name] = InFormat(weight_format.name, planes)
    return image_layout(source.config.specs(group.kind), dtype, encoded)
