"""Page-locked memory, and what becomes of a run where CUDA refuses it."""

from __future__ import annotations

import types
from pathlib import Path

import psutil
import pytest
import torch

from wsm.engine import arena as arena_module
from wsm.engine.arena import PageLockedArena
from wsm.engine.device import Device
from wsm.errors import DoesNotFit
from wsm.layout.groups import BLOCK


class WantsPageLocking(Device):
    pinned = True


@pytest.fixture
def refusing_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    runtime = types.SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: calls.append("register") or 801,
        cudaHostUnregister=lambda address: calls.append("unregister"),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return calls


def test_refused_page_locking_is_a_warning_that_names_figure_and_mend(refusing_cuda: list[str]) -> None:
    arena = PageLockedArena(1 << 20, WantsPageLocking())
    (warning,) = [line for line in arena.warnings if "page-lock" in line and "huge" not in line]
    assert "h2d figures" in warning
    assert "ulimit -l" in warning
    arena.take(1 << 20).fill_(7)
    assert int(arena.whole.sum()) == 7 << 20
    arena.close()
    assert refusing_cuda == ["register"]  # what was never registered is not unregistered


def test_huge_pages_that_are_switched_off_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = tmp_path / "enabled"
    monkeypatch.setattr(arena_module, "_HUGE_PAGES_FILE", switch)
    for text, warned in (("always madvise [never]", True), ("always [madvise] never", False)):
        switch.write_text(text + "\n")
        arena = PageLockedArena(1 << 20, Device())
        assert [("load_s" in line and "madvise | sudo tee" in line) for line in arena.warnings] == [True] * warned
        arena.close()


def test_where_the_kernel_cannot_populate_every_page_is_touched_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    real = arena_module._libc.madvise
    without = types.SimpleNamespace(madvise=lambda at, nbytes, advice: -1 if advice == 23 else real(at, nbytes, advice))
    monkeypatch.setattr(arena_module, "_libc", without)
    before = psutil.Process().memory_info().rss
    arena = PageLockedArena(256 << 20, Device())
    assert psutil.Process().memory_info().rss - before > 250 << 20
    arena.close()
    assert psutil.Process().memory_info().rss - before < 50 << 20


def test_an_arena_is_of_exact_size_and_hands_out_aligned_pieces() -> None:
    arena = PageLockedArena(10_000, Device())
    assert arena.nbytes == 3 * BLOCK
    first, second = arena.take(5_000), arena.take(4_000)
    assert (second.data_ptr() - first.data_ptr(), first.data_ptr() % BLOCK) == (2 * BLOCK, 0)
    with pytest.raises(DoesNotFit, match="no 1 bytes left"):
        arena.take(1)
    arena.close()
