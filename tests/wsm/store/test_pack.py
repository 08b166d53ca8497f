"""Packing: everything once, in order, or nothing at all, whatever breaks it off and when."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import wsm.disk.atomic
import wsm.store.pack
from llama.checkpoint.base import all_tensors
from llama.inputs import read_manifest
from tests.stores import CONFIG, CountingCheckpoint, aligned, assert_equals, checkpoint, flip, pack_tiny
from wsm import stop, threads
from wsm.disk.atomic import write_atomically
from wsm.disk.targets import opened
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.layout.groups import BLOCK
from wsm.stop import Stopped
from wsm.store.layout import plan_store
from wsm.store.pack import PackRequest, pack
from wsm.store.packed_store import PackedStore

GROUPS = 1 + 2 * CONFIG.n_layers
MIB = 1 << 20


class BreakOff:
    """Lets the n-th call through to ``real`` fail instead."""

    def __init__(self, real: Any, at: int, error: BaseException) -> None:
        self.real, self.at, self.error, self.calls = real, at, error, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.real(*arguments, **named)


def assert_refuses(target: Path, manifest_text: str) -> None:
    """The target bears no store, not even for a manifest that somebody kept."""
    kept = target.with_suffix(".kept")
    kept.write_text(manifest_text)
    with pytest.raises(StoreError):
        PackedStore(read_manifest(kept, raw_device=str(target)), staging_bytes=MIB)


# -- whole


def test_every_tensor_is_read_once_and_progress_reaches_the_end(tmp_path: Path) -> None:
    source = CountingCheckpoint()
    seen: list[int] = []
    pack_tiny(tmp_path, source=source, progress=seen.append)
    assert Counter(source.names) == Counter(name for name, _ in all_tensors(CONFIG))
    assert len(seen) == GROUPS
    assert sum(seen) == plan_store(CONFIG, torch.bfloat16, 1).target_bytes - BLOCK


def test_groups_lie_in_pass_order_after_the_globals(tmp_path: Path) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    offsets = [stored.extents[0].offset for stored in description.groups.values()]
    assert offsets == sorted(offsets)
    assert offsets[0] == BLOCK
    assert os.path.getsize(tmp_path / "store.wsm") == plan_store(CONFIG, torch.bfloat16, 1).target_bytes


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    pack_tiny(tmp_path)
    first = (tmp_path / "store.wsm").read_bytes()
    os.unlink(tmp_path / "store.wsm")
    pack_tiny(tmp_path)
    assert (tmp_path / "store.wsm").read_bytes()[BLOCK:] == first[BLOCK:]


def test_a_file_is_packed_over_only_after_a_yes(tmp_path: Path) -> None:
    manifest = pack_tiny(tmp_path)
    before = manifest.read_text()
    questions: list[str] = []

    def no(question: str) -> bool:
        questions.append(question)
        return False

    request = PackRequest((str(tmp_path / "store.wsm"),), manifest, torch.bfloat16)
    with pytest.raises(UnusableInput, match="not confirmed: nothing was written"):
        pack(checkpoint(), request, confirm=no)
    assert str(tmp_path / "store.wsm") in questions[0]
    assert f"the manifest {manifest}" in questions[0]
    assert manifest.read_text() == before
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    assert_equals(store, checkpoint())
    store.close()
    pack(checkpoint(seed=1), request, confirm=lambda question: True)
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    assert_equals(store, checkpoint(seed=1))
    store.close()


def test_a_new_file_needs_no_yes(tmp_path: Path) -> None:
    def unasked(question: str) -> bool:
        raise AssertionError(question)

    request = PackRequest((str(tmp_path / "a"),), tmp_path / "a.json", torch.bfloat16)
    pack(checkpoint(), request, confirm=unasked)


# -- broken off


@pytest.mark.parametrize("at", range(1, GROUPS + 1))
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_after_any_group_leaves_no_store(tmp_path: Path, at: int, existing: bool) -> None:
    kept = ""
    if existing:
        kept = pack_tiny(tmp_path).read_text()
    with pytest.raises(KeyboardInterrupt):
        pack_tiny(tmp_path, progress=BreakOff(lambda nbytes: None, at, KeyboardInterrupt()))
    assert not (tmp_path / "store.json").exists()
    assert (tmp_path / "store.wsm").exists() is existing
    if existing:
        assert_refuses(tmp_path / "store.wsm", kept)


def calls_of_a_whole_pack(directory: Path, module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    counter = BreakOff(getattr(module, name), 0, KeyboardInterrupt())
    with monkeypatch.context() as patch:
        patch.setattr(module, name, counter)
        pack_tiny(directory, targets=[str(directory / "a"), str(directory / "b")])
    return counter.calls


@pytest.mark.parametrize("function", ["pwritev", "fsync", "replace", "unlink", "open"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_failure_in_any_system_call_leaves_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    """Two existing targets and a manifest; each call of each kind fails in turn."""
    if function == "unlink" and sys.version_info < (3, 11):
        pytest.skip("pathlib of Python 3.10 holds on to the real os.unlink")
    calls = calls_of_a_whole_pack(tmp_path, os, function, monkeypatch)
    targets = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert calls > 0
    for at in range(1, calls + 1):
        kept = pack_tiny(tmp_path, targets=targets).read_text()
        with monkeypatch.context() as patch:
            broken = BreakOff(getattr(os, function), at, error)
            patch.setattr(os, function, broken)
            try:
                pack_tiny(tmp_path, targets=targets)
            except (KeyboardInterrupt, UnusableInput, StoreError, DoesNotFit):
                pass
            else:
                assert broken.calls < at, "the failure was passed over"
                return
        manifest = tmp_path / "store.json"
        if manifest.exists():
            # The very first calls come before the old store is touched.
            assert manifest.read_text() == kept
            store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
            store.close()
        assert not list(tmp_path.glob(".*.tmp"))
        assert not [fd for fd in os.listdir("/proc/self/fd") if _link(fd) in targets]


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_an_interrupt_once_the_manifest_is_in_place_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = wsm.disk.atomic.sync_directory

    def interrupted(directory: Path) -> None:
        real(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(wsm.disk.atomic, "sync_directory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_stop_ends_a_long_write_at_its_next_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group may be gigabytes: nothing of it may be written any more when the target has been closed."""
    real, calls = os.pwritev, list[int]()

    def slow(file: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            stop.ask(signal.SIGINT)
        time.sleep(0.1 if 3 <= len(calls) < 12 else 0)
        return real(file, [data[0][:BLOCK]], offset)

    monkeypatch.setattr(os, "pwritev", slow)
    monkeypatch.setattr(threads, "JOIN_S", 0.5)
    with pytest.raises(Stopped):
        pack_tiny(tmp_path)
    assert os.listdir(tmp_path) == []
    assert len(calls) < 12


def test_a_drive_that_answers_no_more_is_not_written_to_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answers, on_main = os.pwritev, threading.Event(), list[bool]()

    def held_up(file: int, data: Any, offset: int) -> int:
        on_main.append(threading.current_thread() is threading.main_thread())
        if not on_main[-1]:
            stop.ask(signal.SIGTERM)
            answers.wait()
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwritev", held_up)
    monkeypatch.setattr(threads, "JOIN_S", 0.3)
    with pytest.raises(threads.ThreadsStuck, match="wsm-pack-out-0 did not end"):
        pack_tiny(tmp_path)
    answers.set()
    assert on_main == [True, False], "the old superblock, and the first group"
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wsm.store.pack, "write_atomically", full)
    with pytest.raises(UnusableInput, match=r"store\.json cannot be written: No space left"):
        pack_tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_drive_is_said_and_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", BreakOff(os.pwritev, 4, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DoesNotFit, match="the target is full after"):
        pack_tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_checkpoint_leaves_no_store(tmp_path: Path) -> None:
    class Failing(CountingCheckpoint):
        def read_into(self, name: str, out: torch.Tensor) -> None:
            if name == "layers.2.feed_forward.w2.weight":
                raise UnusableInput("the shard is damaged")
            super().read_into(name, out)

    with pytest.raises(UnusableInput, match="the shard is damaged"):
        pack_tiny(tmp_path, source=Failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [BLOCK, 3 * BLOCK, BLOCK + 100])
def test_short_writes_are_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda file, data, offset: real(file, [data[0][: most - most % BLOCK]], offset))
    manifest = pack_tiny(tmp_path)
    monkeypatch.undo()
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    assert_equals(store, checkpoint())
    store.close()


def test_without_o_direct_packing_goes_through_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: Any, flags: int, *more: Any, **named: Any) -> int:
        file = real(path, flags & ~os.O_DIRECT, *more, **named)  # the kernel makes the file before it refuses
        if flags & os.O_DIRECT:
            os.close(file)
            raise OSError(errno.EINVAL, "Invalid argument")
        return file

    monkeypatch.setattr(os, "open", no_direct)
    manifest = pack_tiny(tmp_path)
    monkeypatch.undo()
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    assert_equals(store, checkpoint())
    store.close()


def test_a_target_that_takes_no_more_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda file, data, offset: 0)
    with pytest.raises(StoreError, match="took 0 bytes"):
        pack_tiny(tmp_path)


# -- refused before anything is written


def test_a_full_filesystem_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan_store(CONFIG, torch.bfloat16, 1).target_bytes
    usage = os.statvfs(tmp_path)
    fields = list(usage)
    fields[4] = needed // usage.f_frsize  # f_bavail, just enough or one block less
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    pack_tiny(tmp_path)
    os.unlink(tmp_path / "store.wsm")
    fields[4] -= 1
    with pytest.raises(DoesNotFit, match="nothing was written"):
        pack_tiny(tmp_path)
    assert not (tmp_path / "store.wsm").exists()
    assert (tmp_path / "store.json").exists(), "the old manifest goes only when writing begins"


def test_two_files_on_one_filesystem_share_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = plan_store(CONFIG, torch.bfloat16, 2).target_bytes
    usage = os.statvfs(tmp_path)
    fields = list(usage)
    fields[4] = needed * 3 // 2 // usage.f_frsize
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(DoesNotFit, match="nothing was written"):
        pack_tiny(tmp_path, targets=[str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_target_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(UnusableInput, match="twice"):
        pack_tiny(tmp_path, targets=[str(tmp_path / "a"), str(tmp_path / "link")])


@pytest.mark.parametrize(
    ("target", "manifest", "named"),
    [
        ("/dev/null", "m.json", "neither a file nor a block device"),
        (".", "m.json", "neither a file nor a block device"),
        ("absent/store", "m.json", "its directory does not exist"),
        ("store", "absent/m.json", "its directory does not exist"),
        ("store", ".", "is no file"),
        ("store", "store", "both name"),
    ],
)
def test_places_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, manifest: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    request = PackRequest((target,), Path(manifest), torch.bfloat16)
    with pytest.raises(UnusableInput, match=named):
        pack(checkpoint(), request, confirm=lambda question: True)
    assert list(tmp_path.iterdir()) == []


def test_the_checkpoint_s_own_files_are_not_packed_over(tmp_path: Path) -> None:
    from wsm.layout.model import SourceFile

    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")

    class OnDisk(CountingCheckpoint):
        def sources(self) -> tuple[SourceFile, ...]:
            return (SourceFile("model.safetensors", 1, "00"),)

    source = OnDisk()
    source.directory = tmp_path
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UnusableInput, match="a file of the checkpoint itself"):
        pack_tiny(tmp_path, source=source, targets=[str(tmp_path / "model.safetensors")])
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_unknown_dtype_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"torch\.float64 cannot be packed"):
        pack_tiny(tmp_path, dtype=torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_packed_over_a_store_that_is_being_read(tmp_path: Path) -> None:
    manifest = pack_tiny(tmp_path)
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    with pytest.raises(UnusableInput, match="in use by another run"):
        pack_tiny(tmp_path)
    assert_equals(store, checkpoint())
    store.close()
    pack_tiny(tmp_path)


def test_a_store_that_is_being_packed_is_not_read(tmp_path: Path) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    with opened(str(tmp_path / "store.wsm")), pytest.raises(UnusableInput, match="being packed"):
        PackedStore(description, staging_bytes=MIB)


def test_the_manifest_tells_where_the_weights_came_from(tmp_path: Path) -> None:
    content = json.loads(pack_tiny(tmp_path).read_text())
    assert content["source"] == [asdict(source) for source in checkpoint().sources()]
    assert content["model"] == dataclasses.asdict(CONFIG)
    assert content["targets"] == [str(tmp_path / "store.wsm")]


# -- files written at once


def test_an_atomic_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    monkeypatch.setattr(os, "replace", BreakOff(os.replace, 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "three")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_copy_of_a_store_is_told_from_the_store(tmp_path: Path) -> None:
    """The checksum covers the padding too: it is of the image, byte for byte."""
    description = read_manifest(pack_tiny(tmp_path))
    stored = next(iter(description.groups.values()))
    last = stored.extents[-1]
    flip(tmp_path / "store.wsm", last.offset + last.nbytes - 1)
    store = PackedStore(description, staging_bytes=MIB)
    with pytest.raises(StoreError, match="checksum"):
        store.read(stored.group, aligned(stored.layout.nbytes)).checked.result()
    store.close()


def test_a_killed_pack_leaves_no_manifest_and_no_superblock(tmp_path: Path) -> None:
    """No handler runs: what protects then is the order of the writes."""
    kept = pack_tiny(tmp_path).read_text()
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.stores import pack_tiny\n"
        "pack_tiny(Path(sys.argv[1]), progress=lambda nbytes: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[3], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "store.json").exists()
    assert_refuses(tmp_path / "store.wsm", kept)
