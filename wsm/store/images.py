"""Images of groups, plain or in a weight format, made of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from wsm.disk.io_threads import IOThreads
from wsm.formats.format import Plane, WeightFormat
from wsm.formats.mix import Formats, format_of
from wsm.layout.groups import (
    GroupId,
    GroupLayout,
    InFormat,
    TensorSpec,
    image_layout,
    is_encoded,
    planes_in,
    views,
)
from wsm.layout.model import TensorSource
from wsm.store.layout import StorePlan

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
    if group is None or plan.weight_format is None:
        layout = plan.layouts[group]
        work = []
        for share, buffer in zip(shares, buffers, strict=True):
            tensors = views(buffer[: layout.nbytes].zero_(), layout)
            work += [
                partial(share.read_into, share.config.full_name(group, name), out) for name, out in tensors.items()
            ]
        return _then(readers.submit(work), lambda: [layout] * len(shares))
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
        image = buffer[:nbytes].zero_()
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
