"""The ceiling of decoding: how fast this device makes weights of what lies at rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsm.engine.device import Device
from wsm.engine.probe_compute import repeated
from wsm.formats.backend import decoder
from wsm.formats.format import Shape, WeightFormat
from wsm.formats.gguf_blocks import BlockType
from wsm.plan.time import Ceiling

Part = tuple[WeightFormat, int, float]
"""A format, how many inputs a matrix in it has, and its part of all decoded weights."""

ON_CUDA, ON_CPU = 128 << 20, 2 << 20
"""Bytes that a sample makes, at most."""


def probe_decoding(device: Device, parts: Sequence[Part], dtype: torch.dtype, room: Tensor) -> dict[str, Ceiling]:
    """``weight_decode``: decoding random matrices, one of each of the ``parts``, into ``room`` (``uint8``)."""
    on_cuda = device.torch_device.type == "cuda"
    nbytes = min(room.nbytes, ON_CUDA if on_cuda else ON_CPU)
    samples = [_sample(device, part, dtype, nbytes) for part in parts]
    made = sum(rows * columns for rows, columns, _ in samples) * dtype.itemsize
    outs = [room[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns) for rows, columns, _ in samples]

    def decode() -> None:
        for (weight_format, *_), (*_, planes), out in zip(parts, samples, outs, strict=True):
            weight_format.decode_(planes, out)

    names = "+".join(weight_format.name for weight_format, *_ in parts)
    how = f"{names}, {made / 2**20:.3g} MiB of {dtype} by {decoder(device.torch_device)}"
    return {"weight_decode": repeated(device, decode, 3, made / 1e6, "MBps", how)}


def _sample(device: Device, part: Part, dtype: torch.dtype, nbytes: int) -> tuple[int, int, dict[str, Tensor]]:
    """Rows, columns and planes of a part's matrix, of all parts' ``nbytes``; smaller where memory is short."""
    weight_format, columns, share = part
    while True:
        rows = max(1, int(nbytes * share) // (columns * dtype.itemsize))
        try:
            return rows, columns, _random_planes(weight_format, (rows, columns), dtype, device.torch_device)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            nbytes //= 2


def _random_planes(
    weight_format: WeightFormat, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    if isinstance(weight_format, BlockType):
        (plane,) = weight_format.planes(shape)
        blocks = weight_format.seeded(plane.nbytes // weight_format.nbytes, 0.02, seed=0)
        return {plane.name: blocks.view(plane.shape).to(device)}
    planes = weight_format.encode(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02))
    assert planes is not None  # of normal numbers there is no format that does not pay
    return planes
