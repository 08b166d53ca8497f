"""KV on a device of its own, without a model, for its tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stores import aligned
from wsm.engine.device import Device
from wsm.engine.telemetry import Telemetry
from wsm.kv.disk import KVDisk
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
