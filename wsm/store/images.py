"""Images of groups in a weight format: which planes they have, and how they are made of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from functools import partial

import torch
from torch import Tensor

from wsm.formats.format import Plane, WeightFormat
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


def encode_group(
    source: TensorSource,
    group: GroupId,
    dtype: torch.dtype,
    weight_format: WeightFormat,
    buffer: Tensor,
    workers: Executor,
    moments: Mapping[str, Tensor] | None = None,
) -> GroupLayout:
    """Make a group's image in ``buffer`` (``uint8``, large enough for any); its layout. A tensor is a worker's work.

    ``moments`` are those of the inputs by matrix, the importance of :meth:`WeightFormat.encode`; they are worked on one
    matrix after the other, since each takes much memory.
    """
    specs = source.config.specs(group.kind)
    encoded = partial(_encoded, source, group, dtype, weight_format, moments or {})
    found = list((workers.map if moments is None else map)(encoded, specs))
    planes = {spec.name: of for spec, of in zip(specs, found, strict=True) if of is not None}
    described = {name: tuple(Plane(n, p.dtype, tuple(p.shape)) for n, p in of.items()) for name, of in planes.items()}
    layout = image_layout(specs, dtype, {name: InFormat(weight_format.name, of) for name, of in described.items()})
    image = buffer[: layout.nbytes].zero_()
    for tensor in layout.encoded:
        for name, plane in planes_in(image, tensor).planes.items():
            plane.copy_(planes[tensor.name][name])
    plain = views(image, layout)
    list(workers.map(source.read_into, [source.config.full_name(group, name) for name in plain], plain.values()))
    return layout


def _encoded(
    source: TensorSource,
    group: GroupId,
    dtype: torch.dtype,
    weight_format: WeightFormat,
    moments: Mapping[str, Tensor],
    spec: TensorSpec,
) -> Mapping[str, Tensor] | None:
    if not is_encoded(spec):
        return None
    name = source.config.full_name(group, spec.name)
    planes = source.encode(name, spec.shape, dtype, weight_format, moments.get(spec.name))
    return planes and {plane: values.cpu() for plane, values in planes.items()}


def coming_layout(source: TensorSource, group: GroupId, dtype: torch.dtype, weight_format: WeightFormat) -> GroupLayout:
    """The layout that :func:`encode_group` will make."""
    encoded = {}
    for spec in filter(is_encoded, source.config.specs(group.kind)):
        name = source.config.full_name(group, spec.name)
        if (planes := source.planes(name, spec.shape, dtype, weight_format)) is not None:
            encoded[spec.name] = InFormat(weight_format.name, planes)
    return image_layout(source.config.specs(group.kind), dtype, encoded)
