"""Ceilings of this machine, measured before the clock in the memory that the run will use.

Each is the best of several samples, as a floor has to be; its spread is (max - min) / median, and where that is large
the samples are taken once more, longer. The copies have the
size of the run's own pieces, the SSD reads its own chunks and depth, and the SSD is read while the link is busy.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from wsm import stop
from wsm.disk.io_threads import IOThreads
from wsm.engine.device import PIECE_BYTES, Device
from wsm.engine.records import moved_bytes
from wsm.layout.groups import GroupId
from wsm.plan.time import STEADY_PCT, Ceiling
from wsm.store.source import ChunkRead, GroupRead, GroupSource

SAMPLES = 5


class ProbeSizes(NamedTuple):
    """How much work a sample is at most: in all some seconds (at most 7, undisturbed) on a GPU, little on the CPU.

    The slowest links and drives give smaller samples, not longer probes.
    """

    copy_bytes: int
    copy_s: float  # of a sample over a slow link
    hbm_bytes: int
    matmul_n: int
    matmul_s: float  # of products back to back; 0: none
    ssd_s: float  # of all reads of the SSD


ON_CUDA = ProbeSizes(copy_bytes=512 << 20, copy_s=0.1, hbm_bytes=1 << 30, matmul_n=8192, matmul_s=2.0, ssd_s=1.5)
ON_CPU = ProbeSizes(copy_bytes=32 << 20, copy_s=0.05, hbm_bytes=64 << 20, matmul_n=512, matmul_s=0.0, ssd_s=0.25)


def ceiling_from(rates: Sequence[float], unit: str, how: str) -> Ceiling:
    """The best of samples, their median and spread."""
    # On a machine that stood still a sample may be 0: it shows in the spread, but no rate to plan with is 0.
    median = statistics.median(rate for rate in rates if rate > 0)
    return Ceiling(max(rates), median, unit, 100 * (max(rates) - min(rates)) / median, how)


LONGER = (1, 4)
"""How long samples are, and how long where the first ones vary too much: other work weighs less on longer ones."""
Anyone = Callable[[bool], bool]
"""Whether any of several ranks says yes: they measure side by side, and so again side by side."""


def steadied(measure: Callable[[int], Ceiling], anyone: Anyone = bool) -> Ceiling:
    """The ceiling of ``measure``, which takes how many times as long as usual a sample is to be: the steadier one."""
    found: list[Ceiling] = []
    for times in LONGER:
        found.append(measure(times))
        if not anyone(found[-1].spread_pct > STEADY_PCT):
            break
    best = min(found, key=lambda ceiling: ceiling.spread_pct)
    if len(found) == 1:
        return best
    return replace(
        best, how=f"{best.how}; measured twice, since the first samples varied by {found[0].spread_pct:.0f} %"
    )


def sizes_for(device: Device) -> ProbeSizes:
    return ON_CUDA if device.torch_device.type == "cuda" else ON_CPU


def _walk(memory: Tensor, piece: int) -> Iterator[Tensor]:
    """``memory`` in whole pieces of ``piece`` bytes, over and over: as in a pass, too much for a CPU's caches."""
    return itertools.cycle(memory[: memory.nbytes // piece * piece].split(piece))


def _copies(device: Device, destinations: Iterator[Tensor], sources: Iterator[Tensor], count: int) -> float:
    """Seconds that ``count`` back-to-back copies take."""
    stream = device.stream()
    start = device.record(stream)
    for _ in range(count):
        device.copy(next(destinations), next(sources), stream)
    end = device.record(stream)
    end.synchronize()
    return device.seconds(end) - device.seconds(start)


def probe_link(
    device: Device,
    host: Tensor,
    slot: Tensor,
    in_step: Callable[[], None] = lambda: None,
    anyone: Anyone = bool,
) -> dict[str, Ceiling]:
    """``h2d``, ``d2h`` and ``h2d_d2h`` (both ways at once, their sum) between page-locked ``host`` and ``slot``.

    The samples go through both, ``uint8`` and overwritten, piece after piece. ``in_step`` is called before each; with a
    barrier, several ranks' links are measured at the same time; ``anyone`` asks all of them whether to measure again.
    """
    piece = min(PIECE_BYTES, host.nbytes, slot.nbytes)
    hosts, slots = _walk(host, piece), _walk(slot, piece)
    # The first copies of each way are slower, and one that other work holds up says nothing of the link.
    piece_s = min(max(_copies(device, hosts, slots, 1), _copies(device, slots, hosts, 1)) for _ in range(2))
    sizes = sizes_for(device)
    count = max(1, min(-(-sizes.copy_bytes // piece), int(sizes.copy_s / max(piece_s, 1e-9))))

    def rate_of(way: str, sample: Callable[[int], float]) -> Ceiling:
        """``sample`` takes a number of copies and gives MB/s."""

        def measure(times: int) -> Ceiling:
            rates = []
            for _ in range(SAMPLES):
                stop.check()
                in_step()
                rates.append(sample(times * count))
            size = f"{times * count * piece / 2**20:.3g} MiB in pieces of {piece / 2**20:.3g} MiB"
            return ceiling_from(rates, "MBps", f"{size}, {SAMPLES} samples{way}")

        return steadied(measure, anyone)

    h2d = rate_of("", lambda n: n * piece / _copies(device, slots, hosts, n) / 1e6)
    d2h = rate_of("", lambda n: n * piece / _copies(device, hosts, slots, n) / 1e6)
    middle, slot_middle = host.nbytes // 2, slot.nbytes // 2
    half = min(piece, middle, slot_middle)
    down = _walk(slot[:slot_middle], half), _walk(host[:middle], half)
    up = _walk(host[middle:], half), _walk(slot[slot_middle:], half)

    def both_ways(n: int) -> float:
        seconds = list[float]()
        with _beside(device, lambda: seconds.append(_copies(device, *up, n))):
            downwards_s = _copies(device, *down, n)
        return 2 * n * half / max(downwards_s, *seconds) / 1e6

    return {"h2d": h2d, "d2h": d2h, "h2d_d2h": rate_of(", both ways at once, their sum", both_ways)}


def probe_ssd(
    device: Device, source: GroupSource, groups: Sequence[GroupId], buffers: Sequence[Tensor], slot: Tensor
) -> dict[str, Ceiling]:
    """``ssd``: the store read in the run's own chunks while the link is busy; ``h2d_with_ssd``: that link's rate.

    Streamed ``groups`` are read round and round into page-locked ``buffers``, each large enough for any of them; with
    several, one group's checksum is made while the others are read. The last one is copied to ``slot`` meanwhile.
    """
    beside: dict[float, Ceiling] = {}

    def measure(times: int) -> Ceiling:
        # Twice as long at most: the slowest drives give smaller samples, not longer probes.
        seconds = min(times, 2) * sizes_for(device).ssd_s
        ssd, link = _ssd_and_link(device, seconds, source, groups, buffers, slot)
        beside[ssd.spread_pct] = link
        return ssd

    ssd = steadied(measure)
    return {"ssd": ssd, "h2d_with_ssd": beside[ssd.spread_pct]}


def _ssd_and_link(
    device: Device,
    seconds: float,
    source: GroupSource,
    groups: Sequence[GroupId],
    buffers: Sequence[Tensor],
    slot: Tensor,
) -> tuple[Ceiling, Ceiling]:
    piece = min(PIECE_BYTES, buffers[-1].nbytes, slot.nbytes)
    with link_busy(device, buffers[-1], slot, piece) as copies_s:
        chunks = _read_for(seconds, source, groups, buffers[:-1])
    rates = _window_rates(chunks)
    read_MB = sum(chunk.nbytes for chunk in chunks) / 1e6
    how = f"O_DIRECT, the run's chunks and depth, {read_MB:.0f} MB in {len(rates)} windows, while H2D runs"
    return ceiling_from(rates, "MBps", how), rate_beside(copies_s, piece, "the SSD is read")


@contextmanager
def link_busy(device: Device, host: Tensor, slot: Tensor, piece: int) -> Iterator[list[float]]:
    """Pieces go from ``host`` to ``slot`` all the time, and until the block ends; the seconds of each 8 of them."""
    over, copies_s = threading.Event(), list[float]()
    hosts, slots = _walk(host, piece), _walk(slot, piece)

    def keep_busy() -> None:
        copies_s.append(_copies(device, slots, hosts, 8))  # at least one, however late this thread runs
        while not over.is_set():
            copies_s.append(_copies(device, slots, hosts, 8))

    with _beside(device, keep_busy):
        try:
            yield copies_s
        finally:
            over.set()


def rate_beside(copies_s: Sequence[float], piece: int, what: str) -> Ceiling:
    """The link's rate while ``what`` went on: of the seconds that :func:`link_busy` gave, each of 8 pieces."""
    # Few samples, each as long: one copy that is held up is no spread of the link.
    edges = [len(copies_s) * place // SAMPLES for place in range(SAMPLES + 1)]
    parts = [copies_s[start:end] for start, end in itertools.pairwise(edges) if end > start]
    rates = [8 * piece * len(part) / sum(part) / 1e6 for part in parts]
    return ceiling_from(rates, "MBps", f"pieces of {piece / 2**20:.3g} MiB while {what}, {len(parts)} samples")


@contextmanager
def _beside(device: Device, work: Callable[[], None]) -> Iterator[None]:
    """``work`` on a thread of its own; the block's end waits for it, and raises what it raised."""
    with IOThreads(1, "wsm-probe") as other:
        ended = other.submit([device.enter_thread, work])  # one thread: in this order
        yield
        stop.result(ended)


def _read_for(
    seconds: float, source: GroupSource, groups: Sequence[GroupId], buffers: Sequence[Tensor]
) -> list[ChunkRead]:
    """Read ``groups`` round and round into ``buffers`` for at least ``seconds``, and little longer.

    As many reads are in flight as end within ``seconds`` at the pace of the first one, at most one per buffer.
    """
    reads = map(source.read, itertools.cycle(groups), itertools.cycle(buffers))
    began, chunks = time.perf_counter(), list[ChunkRead]()

    def finish(read: GroupRead) -> None:
        stop.result(read.checked)
        chunks.extend(read.chunks)

    finish(next(reads))
    first_s = time.perf_counter() - began
    most = max(1, min(len(buffers), int(seconds / max(first_s, 1e-9))))
    under_way = deque[GroupRead]()
    while time.perf_counter() < began + seconds:
        under_way.append(next(reads))
        if len(under_way) == most:
            finish(under_way.popleft())
    for read in under_way:
        finish(read)
    return chunks


def _window_rates(chunks: Sequence[ChunkRead]) -> list[float]:
    """MB/s in equal windows from the first chunk's start to the last one's end, without the outermost two."""
    first, last = min(chunk.start for chunk in chunks), max(chunk.end for chunk in chunks)
    width = (last - first) / (SAMPLES + 2)
    edges = [first + window * width for window in range(1, SAMPLES + 2)]
    rates = [moved_bytes(chunks, window) / width / 1e6 for window in itertools.pairwise(edges)]
    if any(rates):
        return rates
    return [0.0, sum(chunk.nbytes for chunk in chunks) / (last - first) / 1e6]  # 0 too: it is no steady rate
