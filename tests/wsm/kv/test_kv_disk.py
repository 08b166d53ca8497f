"""How KV on a device of its own is cut: into runs of the device, and copies of the newest blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.wsm.kv.disks import disk_of
from wsm.kv import disk as kv_disk
from wsm.kv.schedule import Fetch
from wsm.layout.kv import KVLayout, Unit

UNIT = Unit(1, 0)
LAYOUT = KVLayout(2, 6, 6, 2, 1024, 8)  # of 6 rows, 2 heads and 4 blocks of 4 KiB


def fetch(slot: Any, lengths: tuple[int, ...], k: int = 0) -> Fetch:
    return Fetch(UNIT, 0, slot, lengths, k, None, 0, 0)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        pytest.param((800,) * 6, [(0, 36)], id="equally long rows are one stretch"),
        pytest.param((1024,) * 5 + (0,), [(0, 10), (12, 10), (24, 10), (36, 10)], id="without a row that ended"),
        pytest.param((600, 600, 300, 300, 255, 0), [(0, 8), (12, 4)], id="rows of different lengths"),
        pytest.param((255,) * 6, [], id="no whole block"),
    ],
)
def test_what_lies_together_on_the_device_is_one_run(
    lengths: tuple[int, ...], runs: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Places and sizes in blocks, from the unit's first on; each block goes where a window has it."""
    with disk_of(LAYOUT, tmp_path / "kv") as disk:
        slot, size = disk.slots[0].buffer, LAYOUT.block_bytes
        moves = list(disk._whole(UNIT, slot, [length // 256 for length in lengths]))
        start = LAYOUT.unit_bytes(UNIT)  # the unit is the second
        assert [((at - start) // size, len(part)) for at, part in disk.device._joined(moves)] == runs
        for at, part in moves:
            block, head = divmod((at - start) // size, 12)
            for number, view in enumerate(part):
                view[0] = 7
                assert slot.view(12, 4, size)[head + number, block, 0] == 7
                view[0] = 0


def test_the_probe_moves_blocks_in_the_order_of_a_full_part(tmp_path: Path) -> None:
    with disk_of(LAYOUT, tmp_path / "kv") as disk:
        slot = disk.slots[1].buffer
        [(_, whole)] = disk.device._joined(disk._whole(UNIT, slot, [4] * 6))
        for number, (view, other) in enumerate(zip(disk.in_order(slot), whole, strict=True)):
            view[0] = number
            assert other[0] == number


@pytest.mark.parametrize("rows_at_once", [1, 2, 4, 6])
@pytest.mark.parametrize("k", [0, 2])
def test_newest_blocks_are_copied_some_rows_at_a_time(
    rows_at_once: int, k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_disk, "TAIL_BYTES", rows_at_once * 2 * LAYOUT.block_bytes + 5)
    lengths = (300, 400, 511, 300, 512, 1)
    with disk_of(LAYOUT, tmp_path / "kv") as disk:
        tails, slot = disk.tails[UNIT], disk.slots[0]
        tails.view(-1).copy_(torch.randint(1, 256, (tails.numel(),), dtype=torch.uint8))
        pieces = list(disk._add_tails(fetch(slot, lengths, k), slot.buffer))
        tokens = 256 * k or 1024
        window = slot.buffer[: 6 * 2 * tokens * 16].view(6, 2, tokens, 2, 8)
        expected = torch.zeros_like(window)
        for row, length in enumerate(lengths):
            begin = tokens - 256 if k else length // 256 * 256
            if length % 256:
                expected[row, :, begin : begin + 256] = tails[row]
        for piece in pieces:
            assert piece.args[1].nbytes <= kv_disk.TAIL_BYTES  # type: ignore[attr-defined]
            piece()
        assert np.array_equal(window.numpy(), expected.numpy())
    assert len(pieces) == {1: 5, 2: 3, 4: 2, 6: 2}[rows_at_once]
