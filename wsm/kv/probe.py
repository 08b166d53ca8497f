"""The rates of ``--kv-device``, measured before the clock by the run's own threads, with its pieces and checks."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from wsm import stop
from wsm.engine.device import PIECE_BYTES, Device
from wsm.engine.probe import SAMPLES, Anyone, ceiling_from, link_busy, rate_beside, sizes_for, steadied
from wsm.kv.device import Blocks, Move
from wsm.kv.disk import KVDisk
from wsm.plan.time import Ceiling

FIRST_REQUEST, LARGEST_REQUEST = 8 << 20, 256 << 20
"""The first tells how large the others may be: as a part of many rows is, where the device is fast."""
NOISE = 16 << 20
LEAST_REQUESTS = 6
"""Of a sample: two for each slot, so that as many are under way at a time as in a run."""
MOST_REQUESTS = 16
"""Of a sample: a device in memory gives a gigabyte in 50 ms."""


class _Rate(NamedTuple):
    """Of requests, how many there were, and the seconds of the link's copies beside those that count."""

    ceiling: Ceiling
    requests: int
    beside_s: list[float]


def probe_kv_device(
    device: Device, disk: KVDisk, host: Tensor, slot: Tensor, anyone: Anyone = bool
) -> dict[str, Ceiling]:
    """``kv_write`` and ``kv_read``, while the link is busy between page-locked ``host`` and ``slot``, and
    ``h2d_with_kv``: its rate while the device is read.

    Random bytes are written, as many as a sample's time allows, and read back into the slots that the run reads into,
    a request for each of them at a time, block by block of all heads, as a part lies there. Afterwards the slots are
    zeros and the device is as if nothing was written; not after a failure, when requests may be under way and the run
    ends. ``anyone`` asks all ranks whether to measure again.
    """
    unit, piece = disk.layout.block_bytes, min(PIECE_BYTES, host.nbytes, slot.nbytes)
    down, *up = (disk.in_order(memory) for memory in (disk.down, *(slot.buffer for slot in disk.slots)))
    first, most = (max(1, min(nbytes, disk.nbytes) // unit) for nbytes in (FIRST_REQUEST, LARGEST_REQUEST))
    noise = torch.empty(NOISE + unit, dtype=torch.uint8).random_().numpy().data
    for number, block in enumerate(down[:most]):  # no two alike, whatever a drive makes of such ones
        start = number * 4099 % NOISE
        block[:] = noise[start : start + unit]
    with link_busy(device, host, slot, piece) as copies_s:
        began = time.perf_counter()
        stop.result(disk.device.write([(0, down[:first])]))
        # A slow drive gets smaller requests, not a longer probe.
        paced = sizes_for(device).copy_s / LEAST_REQUESTS / max(time.perf_counter() - began, 1e-9)
        count = max(1, min(len(down), most, int(paced * len(down[:first]))))
        places = range(0, disk.nbytes - count * unit + 1, count * unit)
        written = _rate(device, disk.device.write, [down[:count]], places, copies_s, anyone)
        touched = places[: written.requests]
        read = _rate(device, disk.device.read, [blocks[:count] for blocks in up], touched, copies_s, anyone)
    for memory in (disk.down, *(slot.buffer for slot in disk.slots)):
        memory.zero_()  # what a mask hides must be finite
    disk.device.forget()
    link = rate_beside(read.beside_s or copies_s[-1:], piece, "--kv-device is read")
    return {"kv_read": read.ceiling, "kv_write": written.ceiling, "h2d_with_kv": link}


def _rate(
    device: Device,
    request: Callable[[Iterable[Move]], Future[None]],
    buffers: Sequence[Blocks],
    places: Sequence[int],
    copies_s: Sequence[float],
    anyone: Anyone,
) -> _Rate:
    """Of requests for ``places`` round and round, one for each of ``buffers`` at a time."""
    nbytes, requests = sum(map(len, buffers[0])), 0
    moves = zip(itertools.cycle(places), itertools.cycle(buffers))
    beside: dict[float, list[float]] = {}

    def seconds(count: int) -> float:
        nonlocal requests
        stop.check()
        requests += count
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
        times, before = min(times, 2), len(copies_s)
        rates = [times * count * nbytes / seconds(times * count) / 1e6 for _ in range(SAMPLES)]
        at_a_time = f"{min(len(buffers), times * count)} at a time"
        how = f"{times * count} x {nbytes / 2**20:.3g} MiB, {at_a_time}, while H2D runs, {SAMPLES} samples"
        found = ceiling_from(rates, "MBps", how)
        beside[found.spread_pct] = [*copies_s[before + 1 :]]  # but for what had begun before
        return found

    found = steadied(measure, anyone)
    return _Rate(found, requests, beside[found.spread_pct])
