"""The ceiling of decoding: how fast this device makes weights of what lies at rest."""

from __future__ import annotations

import torch
from torch import Tensor

from wsm.engine.device import Device
from wsm.engine.probe_compute import repeated
from wsm.formats.backend import decoder
from wsm.formats.format import Shape, WeightFormat
from wsm.formats.gguf_blocks import BlockType
from wsm.plan.time import Ceiling

ON_CUDA, ON_CPU = 128 << 20, 2 << 20
"""Bytes that a sample makes, at most."""


def probe_decoding(
    device: Device, weight_format: WeightFormat, columns: int, dtype: torch.dtype, room: Tensor
) -> dict[str, Ceiling]:
    """``weight_decode``: decoding a random matrix of ``columns`` inputs into ``room`` (``uint8`` on the device)."""
    on_cuda = device.torch_device.type == "cuda"
    nbytes = min(room.nbytes, ON_CUDA if on_cuda else ON_CPU)
    while True:
        rows = max(1, nbytes // (columns * dtype.itemsize))
        try:
            planes = _random_planes(weight_format, (rows, columns), dtype, device.torch_device)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            nbytes //= 2
    made = rows * columns * dtype.itemsize
    out = room[:made].view(dtype).view(rows, columns)
    how = f"{weight_format.name}, {made / 2**20:.3g} MiB of {dtype} by {decoder(device.torch_device)}"
    rate = repeated(device, lambda: weight_format.decode_(planes, out), 3, made / 1e6, "MBps", how)
    return {"weight_decode": rate}


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
