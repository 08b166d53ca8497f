"""The packed file in the cache directory: what a killed packing has left there goes with the next one."""

from __future__ import annotations

import fcntl
from pathlib import Path

import torch

from tests.stores import checkpoint
from wsm.store.cache import cached_store


def test_only_what_a_killed_packing_has_left_is_removed(tmp_path: Path) -> None:
    kept = {"packed.wsm", "packed.json", "packed.lock", "users-own.wsm", "at-work.wsm", "at-work.lock", "killed.lock"}
    for name in (*kept, "killed.wsm"):
        (tmp_path / name).write_text("of another model")
    with (tmp_path / "at-work.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cached_store(checkpoint(), torch.bfloat16, tmp_path, say=lambda _: None, progress=lambda _: lambda _: None)
    found = {path.name for path in tmp_path.iterdir()}
    assert kept < found
    assert "killed.wsm" not in found
    assert len(found - kept) == 3, "the model's own file, manifest and lock"
