"""The rates of --kv-device: both ways, and nothing of the probe is left for the run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch

from tests.stores import aligned
from tests.wsm.kv.disks import disk_of
from wsm.disk.io_threads import Transfer
from wsm.engine.device import Device
from wsm.errors import KVDeviceError
from wsm.kv import probe
from wsm.kv.disk import KVDisk
from wsm.kv.probe import probe_kv_device
from wsm.layout.kv import KVLayout
from wsm.plan.time import KV_DEVICE, Ceiling


def test_both_ways_are_measured_and_the_device_is_empty_again(tmp_path: Path) -> None:
    with disk_of(KVLayout(3, 2, 2, 2, 512, 32), tmp_path / "kv") as disk:
        host = torch.zeros(1 << 20, dtype=torch.uint8)
        found = probe_kv_device(Device(), disk, host, host.clone())
        assert set(found) == {"kv_read", "kv_write", "h2d_with_kv"}
        for ceiling in found.values():
            assert ceiling.value >= ceiling.median > 0
            assert ceiling.unit == "MBps"
        assert not any(buffer.any() for buffer in (disk.down, *(slot.buffer for slot in disk.slots)))
        block = aligned(disk.layout.block_bytes).numpy().data
        assert isinstance(disk.device.read([(0, [block])]).exception(10), KVDeviceError)


def test_a_device_of_one_small_unit_is_measured_too(tmp_path: Path) -> None:
    with disk_of(KVLayout(1, 1, 1, 1, 256, 8), tmp_path / "kv") as disk:
        host = torch.zeros(1 << 20, dtype=torch.uint8)
        assert all(ceiling.value > 0 for ceiling in probe_kv_device(Device(), disk, host, host.clone()).values())


class PacedDrive:
    """A device's own reads and writes, on a clock of so many bytes a second that the probe goes by."""

    def __init__(self, rate: float, disk: KVDisk, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rate, self._moved, self._lock = rate, 0, Lock()
        monkeypatch.setattr(probe, "time", self)
        for name, call in (("_pread", os.preadv), ("_pwrite", os.pwritev)):
            monkeypatch.setattr(disk.device, name, partial(self._transfer, call))

    def perf_counter(self) -> float:
        return self._moved / self._rate

    def _transfer(self, call: Transfer, file: int, parts: Sequence[memoryview], offset: int) -> int:
        done = call(file, parts, offset)
        with self._lock:
            self._moved += done
        return done


def test_a_slow_device_gets_smaller_requests_and_no_longer_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the clock of a drive of 20 MB/s, which needs 3.4 s for what a slot holds."""
    with disk_of(KVLayout(2, 16, 16, 4, 1024, 512), tmp_path / "kv") as disk:
        drive = PacedDrive(20e6, disk, monkeypatch)
        host = torch.zeros(1 << 20, dtype=torch.uint8)
        found = probe_kv_device(Device(), disk, host, host.clone())
        assert disk.layout.window_bytes == 64 << 20
    assert [found[way].value for way in KV_DEVICE] == pytest.approx([20, 20])
    assert drive.perf_counter() < 2.0


@pytest.mark.parametrize("rate", [5e6, 50e6, 1e12])
def test_as_many_requests_are_under_way_as_in_a_run(
    rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rate of the device: of a slow one they are small, of a fast one as large as a part."""
    with disk_of(KVLayout(8, 4, 4, 4, 1024, 64), tmp_path / "kv") as disk:
        PacedDrive(rate, disk, monkeypatch)
        host = torch.zeros(1 << 20, dtype=torch.uint8)
        found = probe_kv_device(Device(), disk, host, host.clone())
        part, block = disk.layout.window_bytes, disk.layout.block_bytes
    count, size = re.match(r"(\d+) x ([\d.e+-]+) MiB, 3 at a time", found["kv_read"].how).groups()  # type: ignore[union-attr]
    assert int(count) >= 3
    nbytes = round(float(size) * 2**20 / block) * block
    assert {5e6: nbytes == block, 50e6: block < nbytes < part, 1e12: nbytes == part}[rate]


def test_the_link_is_judged_by_its_copies_beside_the_reads_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by those beside writes, nor by those while other ranks are waited for, nor by a round that was disturbed."""
    copies_s = list[float]()

    @contextmanager
    def link(*_: object) -> Iterator[list[float]]:
        yield copies_s

    rounds = iter([80.0, 2.0])  # percent of spread, of both rounds of reads
    monkeypatch.setattr(probe, "link_busy", link)
    with disk_of(KVLayout(3, 2, 2, 2, 512, 32), tmp_path / "kv") as disk:
        read, reading = disk.device.read, [False]

        def of_samples(values: Sequence[float], unit: str, how: str) -> Ceiling:
            if reading[0]:
                copies_s.extend([9.0, 1.0, 1.0] if (spread := next(rounds)) > 50 else [9.0, 0.5, 0.5])
                return Ceiling(1.0, 1.0, unit, spread, how)
            copies_s.append(7.0)
            return Ceiling(1.0, 1.0, unit, 1.0, how)

        def reads(moves: Any) -> Any:
            reading[0] = True
            return read(moves)

        def others(disturbed: bool) -> bool:
            copies_s.append(8.0)
            return disturbed

        monkeypatch.setattr(disk.device, "read", reads)
        monkeypatch.setattr(probe, "ceiling_from", of_samples)
        host = torch.zeros(1 << 20, dtype=torch.uint8)
        found = probe_kv_device(Device(), disk, host, host.clone(), others)["h2d_with_kv"]
    assert (found.value, found.spread_pct) == (pytest.approx(8 * 2**20 / 0.5 / 1e6), 0.0)
