"""Whole images out of a weight format: for residents that are decoded once, as they are loaded."""

from __future__ import annotations

from torch import Tensor

from wsm.formats import registry
from wsm.layout.groups import Encoded, GroupLayout, decoded_layout, stored_views, views


def decode_image(image: Tensor, layout: GroupLayout, out: Tensor) -> None:
    """Fill ``out`` (``uint8``, on the device of ``image``) with the same group's image when nothing is encoded."""
    decoded = views(out, decoded_layout(layout))
    for name, tensor in stored_views(image, layout).items():
        if isinstance(tensor, Encoded):
            registry.get(tensor.format).decode_(tensor.planes, decoded[name])
        else:
            decoded[name].copy_(tensor)
