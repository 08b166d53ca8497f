"""The rates of --kv-device: both ways, and nothing of the probe is left for the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.stores import aligned
from wsm.engine.device import Device
from wsm.engine.telemetry import Telemetry
from wsm.errors import KVDeviceError
from wsm.kv.disk import KVDisk
from wsm.kv.probe import probe_kv_device
from wsm.layout.kv import KVLayout, KVPlacement


@contextmanager
def disk_of(layout: KVLayout, path: Path) -> Iterator[KVDisk]:
    disk = KVDisk(
        KVPlacement(layout, disk=layout.units()),
        str(path),
        [],
        lambda nbytes: aligned(nbytes).zero_(),
        Telemetry(Device()),
    )
    try:
        yield disk
    finally:
        disk.close()


def test_both_ways_are_measured_and_the_device_is_empty_again(tmp_path: Path) -> None:
    with disk_of(KVLayout(3, 2, 2, 2, 512, 32), tmp_path / "kv") as disk:
        host = torch.zeros(1 << 20, dtype=torch.uint8)
        found = probe_kv_device(Device(), disk, host, host.clone())
        assert set(found) == {"kv_read", "kv_write"}
        for ceiling in found.values():
            assert ceiling.value >= ceiling.median > 0
            assert ceiling.unit == "MBps"
        assert not any(buffer.any() for buffer in (disk.down, *(slot.buffer for slot in disk.slots)))
        block = aligned(disk.layout.block_bytes)
        assert isinstance(disk.device.read([(0, block)]).exception(10), KVDeviceError)


def test_a_device_of_one_small_unit_is_measured_too(tmp_path: Path) -> None:
    with disk_of(KVLayout(1, 1, 1, 1, 256, 8), tmp_path / "kv") as disk:
        host = torch.zeros(1 << 20, dtype=torch.uint8)
        assert all(ceiling.value > 0 for ceiling in probe_kv_device(Device(), disk, host, host.clone()).values())
