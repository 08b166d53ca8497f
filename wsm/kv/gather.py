"""Chosen KV blocks into a window, the host not knowing which they are: by a Triton kernel, or torch without Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wsm.engine.device import Device

Gather = Callable[[Tensor, Tensor, Tensor], None]


def gather(home: Tensor, wanted: Tensor, window: Tensor) -> None:
    """Fill ``window [rows, n_kv * k, words]`` from ``home [rows, n_kv * blocks, words]``, one type of words.

    ``wanted``, int64 ``[rows, n_kv, k]``, are blocks of each head. All three are contiguous and on one device; ``home``
    may be what :meth:`Device.mapped` gives.
    """
    rows, heads, _ = wanted.shape
    first = torch.arange(rows * heads, device=wanted.device) * (home.shape[1] // heads)
    index = (wanted + first.view(rows, heads, 1)).view(-1)
    torch.index_select(home.flatten(0, 1), 0, index, out=window.flatten(0, 1))


def gather_on(device: Device) -> Gather:
    """What gathers on a device; the kernel is tried once with memory of the CPU, for Triton also needs a C compiler."""
    if device.torch_device.type != "cuda":
        return gather
    try:
        from wsm.kv import gather_kernel

        host = torch.arange(64 << 10, dtype=torch.uint8).view(-1).pin_memory()
        home = device.mapped(host).view(torch.int64).view(2, 4, -1)
        wanted = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 1]]], device=device.torch_device)
        found, expected = (torch.empty_like(home, device=device.torch_device) for _ in range(2))
        gather(home, wanted, expected)
        gather_kernel.gather(home, wanted, found)
        if torch.equal(found, expected):
            return gather_kernel.gather
    except Exception:  # whatever keeps Triton from working: torch does the same, only slower
        pass
    return gather
