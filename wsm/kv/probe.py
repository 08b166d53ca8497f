"""The rates of ``--kv-device``, measured before the clock by the run's own threads, with its pieces and checks."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from wsm import stop
from wsm.engine.device import Device
from wsm.engine.probe import SAMPLES, Anyone, ceiling_from, link_busy, rate_beside, sizes_for, steadied
from wsm.kv.device import Move
from wsm.kv.disk import KVDisk
from wsm.plan.time import Ceiling

LARGEST_REQUEST = 64 << 20
MOST_REQUESTS = 16
"""Of a sample: a device in memory gives a gigabyte in 50 ms."""


def probe_kv_device(
    device: Device, disk: KVDisk, host: Tensor, slot: Tensor, anyone: Anyone = bool
) -> dict[str, Ceiling]:
    """``kv_write`` and ``kv_read``, while the link is busy between page-locked ``host`` and ``slot``, and
    ``h2d_with_kv``: its rate while the device is read.

    Random bytes are written, as many as a sample's time allows, and read back into the slots that the run reads into,
    a request for each of them at a time. Afterwards the slots are zeros and the device is as if nothing was written;
    not after a failure, when requests may be under way and the run ends. ``anyone`` asks all ranks whether to measure
    again.
    """
    unit = disk.layout.block_bytes
    down = disk.down[: min(LARGEST_REQUEST, disk.down.nbytes, disk.nbytes) // unit * unit]
    down[: down.nbytes // 8 * 8].view(torch.int64).random_()
    piece = min(LARGEST_REQUEST, host.nbytes, slot.nbytes)
    with link_busy(device, host, slot, piece) as copies_s:
        began = time.perf_counter()
        stop.result(disk.device.write([(0, down)]))
        # A slow drive gets smaller requests, not a longer probe.
        share = min(1.0, sizes_for(device).copy_s / max(time.perf_counter() - began, 1e-9))
        size = max(1, int(share * down.nbytes) // unit) * unit
        places, up = range(0, disk.nbytes - size + 1, size), [slot.buffer[:size] for slot in disk.slots]
        kv_write, written = _rate(device, disk.device.write, [down[:size]], places, anyone)
        before = len(copies_s)
        kv_read, _ = _rate(device, disk.device.read, up, places[:written], anyone)
    # But for those that began beside writes, where there are others.
    link = rate_beside(copies_s[before + 1 :] or copies_s[-1:], piece, "--kv-device is read")
    for buffer in (down, *up):
        buffer.zero_()  # what a mask hides must be finite
    disk.device.forget()
    return {"kv_read": kv_read, "kv_write": kv_write, "h2d_with_kv": link}


def _rate(
    device: Device,
    request: Callable[[Iterable[Move]], Future[None]],
    buffers: Sequence[Tensor],
    places: Sequence[int],
    anyone: Anyone,
) -> tuple[Ceiling, int]:
    """Of requests for ``places`` round and round, one for each of ``buffers`` at a time; and how many were touched."""
    size, touched = buffers[0].nbytes, 0
    moves = zip(itertools.cycle(places), itertools.cycle(buffers))

    def seconds(count: int) -> float:
        nonlocal touched
        stop.check()
        touched += count
        began, under_way = time.perf_counter(), deque[Future[None]]()
        for move in itertools.islice(moves, count):
            if len(under_way) == len(buffers):
                stop.result(under_way.popleft())
            under_way.append(request([move]))
        for last in under_way:
            stop.result(last)
        return time.perf_counter() - began

    seconds(1)  # the first of each way is slower
    count = max(1, min(MOST_REQUESTS, int(sizes_for(device).copy_s / max(seconds(1), 1e-9))))

    def measure(times: int) -> Ceiling:
        times = min(times, 2)
        rates = [times * count * size / seconds(times * count) / 1e6 for _ in range(SAMPLES)]
        how = f"{times * count} x {size / 2**20:.3g} MiB, {len(buffers)} at a time, while H2D runs, {SAMPLES} samples"
        return ceiling_from(rates, "MBps", how)

    found = steadied(measure, anyone)
    return found, min(touched, len(places))
