"""The ceilings of computing: how fast this device reads its memory, and multiplies matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wsm import stop
from wsm.engine.device import Device
from wsm.engine.probe import SAMPLES, ceiling_from, sizes_for, steadied
from wsm.plan.time import Ceiling

_SETTLING = 3
"""Samples of long work before the first that counts."""


def _seconds(device: Device, work: Callable[[], object]) -> float:
    """Time of ``work`` on the compute stream."""
    stop.check()
    device.synchronize()
    stream = device.compute_stream()
    start = device.record(stream)
    work()
    end = device.record(stream)
    device.synchronize()
    return device.seconds(end) - device.seconds(start)


def probe_compute(device: Device, dtype: torch.dtype, scratch: Tensor | None = None) -> dict[str, Ceiling]:
    """``hbm``: a read of device memory (a sum); ``matmul``: a square product of random matrices in ``dtype``.

    On a GPU ``matmul`` is what lasts, at the clocks that its power cap leaves it; ``matmul_burst`` is the best of a few
    products from rest. The second matrix is transposed, as the model's are: CPUs multiply such a one several times as
    fast. ``scratch`` is ``uint8`` on the device, overwritten; where it is large enough, a probe takes no memory of its
    own.
    """
    sizes = sizes_for(device)
    data = _room(device, sizes.hbm_bytes, scratch).view(torch.float32).zero_()
    hbm = repeated(device, data.sum, 2, data.nbytes / 1e6, "MBps", f"sum of {data.nbytes >> 20} MiB")
    n = sizes.matmul_n
    room = _room(device, 3 * n * n * dtype.itemsize, scratch)
    n = math.isqrt(room.nbytes // (3 * dtype.itemsize)) // 128 * 128
    a, b, out = room.view(dtype)[: 3 * n * n].view(3, n, n)
    a.normal_()
    b.normal_()
    how = f"{n}^3 product of random {dtype} matrices"
    flops = 2 * n**3 / 1e12

    def product() -> None:
        torch.mm(a, b.t(), out=out)

    burst = repeated(device, product, 3, flops, "TFLOPs", how)
    if not sizes.matmul_s:
        return {"hbm": hbm, "matmul": burst}
    lasting = sustained(device, product, sizes.matmul_s, flops, "TFLOPs", how)
    return {"hbm": hbm, "matmul": lasting, "matmul_burst": burst}


def repeated(device: Device, work: Callable[[], object], warm_ups: int, amount: float, unit: str, how: str) -> Ceiling:
    """The rate of ``work`` that does so much of ``unit``."""
    for _ in range(warm_ups):
        _seconds(device, work)

    def measure(times: int) -> Ceiling:
        rates = _rates(device, work, times, amount, SAMPLES)
        return ceiling_from(rates, unit, f"{how}, {SAMPLES} samples" + (f" of {times}" if times > 1 else ""))

    return steadied(measure)


def sustained(
    device: Device, work: Callable[[], object], seconds: float, amount: float, unit: str, how: str
) -> Ceiling:
    """As :func:`repeated`, of ``work`` back to back for so long, without the first part, in which clocks come down."""
    windows = SAMPLES + _SETTLING
    once_s = min(_seconds(device, work) for _ in range(3))

    def measure(times: int) -> Ceiling:
        count = math.ceil(min(times, 2) * seconds / windows / max(once_s, 1e-9))
        rates = _rates(device, work, count, amount, windows)[_SETTLING:]
        return ceiling_from(rates, unit, f"{how} back to back, the last {SAMPLES} of {windows} samples of {count}")

    return steadied(measure)


def _rates(device: Device, work: Callable[[], object], times: int, amount: float, samples: int) -> list[float]:
    def sample() -> None:
        for _ in range(times):
            work()

    return [times * amount / _seconds(device, sample) for _ in range(samples)]


def _room(device: Device, nbytes: int, scratch: Tensor | None) -> Tensor:
    """``uint8`` memory for a sample: the scratch memory if it holds half of it, else new, as much as there is."""
    if scratch is not None and scratch.nbytes >= nbytes // 2:
        return scratch[: min(nbytes, scratch.nbytes) // 4096 * 4096]
    while True:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
        except torch.OutOfMemoryError:
            if nbytes < 1 << 20:
                raise
            nbytes //= 2
