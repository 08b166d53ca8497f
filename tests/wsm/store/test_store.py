"""Reading a packed store: right bytes or an error, in order, from any number of targets, whatever the drive does."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import itertools
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.inputs import read_manifest
from tests.stores import CONFIG, CountingCheckpoint, aligned, assert_equals, checkpoint, flip, pack_tiny
from wsm.errors import StoreError, UnusableInput
from wsm.layout.groups import BLOCK, GroupId
from wsm.settings import VerifyWhen
from wsm.store import packed_store
from wsm.store.description import StoreDescription
from wsm.store.packed_store import CHECKSUM_THREADS, SMALLEST_CHUNK, PackedStore, verify

FFN1 = GroupId(1, "ffn")
MIB = 1 << 20


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> StoreDescription:
    """With groups of several chunks: a wide vocabulary, so that the globals are 1.2 MB."""
    config = dataclasses.replace(CONFIG, vocab_size=4800)
    return read_manifest(pack_tiny(tmp_path_factory.mktemp("store"), source=CountingCheckpoint(config)))


class FakeDrive:
    """Stands in for ``os.preadv``: ``answer`` may cut a read short, fail, or wait."""

    def __init__(self, answer: Any = None) -> None:
        self.reads: list[tuple[int, int]] = []
        self.answer = answer
        self._lock = threading.Lock()

    def __call__(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            number = len(self.reads)
            self.reads.append((offset, len(buffers[0])))
        nbytes = self.answer(number, offset, len(buffers[0])) if self.answer else len(buffers[0])
        return os.preadv(file, [buffers[0][:nbytes]], offset) if nbytes else 0


def outcome(store: PackedStore, group: GroupId | None) -> BaseException | None:
    failure = store.read(group, aligned(store.layout(group).nbytes)).checked.exception(20)
    assert failure is None or isinstance(failure, StoreError)
    return failure


# -- right bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("targets", [1, 2, 3, 4])
def test_a_store_gives_back_the_checkpoint_s_tensors(tmp_path: Path, targets: int, dtype: torch.dtype) -> None:
    names = [str(tmp_path / f"part{number}") for number in range(targets)]
    manifest = pack_tiny(tmp_path, targets=names, dtype=dtype)
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    assert_equals(store, checkpoint(), dtype)
    store.close()


def test_a_tied_model_has_no_head_in_the_store(tmp_path: Path) -> None:
    tied = checkpoint(dataclasses.replace(CONFIG, tied_embeddings=True))
    store = PackedStore(read_manifest(pack_tiny(tmp_path, source=tied)), staging_bytes=MIB)
    assert_equals(store, tied)
    store.close()


def test_a_store_under_another_path_is_read_with_raw_device(tmp_path: Path) -> None:
    manifest = pack_tiny(tmp_path)
    (tmp_path / "store.wsm").rename(tmp_path / "moved")
    with pytest.raises(UnusableInput, match=r"store\.wsm cannot be opened: No such file"):
        PackedStore(read_manifest(manifest), staging_bytes=MIB)
    store = PackedStore(read_manifest(manifest, raw_device=str(tmp_path / "moved")), staging_bytes=MIB)
    assert_equals(store, checkpoint())
    store.close()


def test_stripes_of_several_drives_are_read_at_the_same_time(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=16000)
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    description = read_manifest(pack_tiny(tmp_path, targets=names, source=CountingCheckpoint(config)))
    files: list[int] = []

    def pread(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        files.append(file)
        return os.preadv(file, buffers, offset)

    store = PackedStore(description, staging_bytes=SMALLEST_CHUNK, pread=pread)
    assert store.threads == 1
    assert outcome(store, None) is None
    store.close()
    assert len(files) > 8
    assert all(one != next_one for one, next_one in itertools.pairwise(files[:8]))


@pytest.mark.parametrize(
    ("staging", "threads", "chunk"),
    [
        (1, 1, SMALLEST_CHUNK),
        (MIB, 4, SMALLEST_CHUNK),
        (64 * MIB, 8, 8 * MIB),
        (128 * MIB, 16, 8 * MIB),
        (1 << 40, 16, 8 * MIB),
    ],
)
def test_staging_bytes_bound_what_is_in_flight(
    packed: StoreDescription, staging: int, threads: int, chunk: int
) -> None:
    store = PackedStore(packed, staging_bytes=staging)
    store.close()
    assert (store.threads, store.chunk_bytes) == (threads, chunk)
    assert store.threads * store.chunk_bytes <= max(staging, SMALLEST_CHUNK)


def test_every_chunk_is_reported_with_its_bytes_and_times(packed: StoreDescription) -> None:
    store = PackedStore(packed, staging_bytes=4 * MIB)
    before = time.perf_counter()
    reads = {group: store.read(group, aligned(store.layout(group).nbytes)) for group in (None, FFN1)}
    for read in reads.values():
        read.checked.result(20)
    after = time.perf_counter()
    store.close()
    for group, read in reads.items():
        assert sum(chunk.nbytes for chunk in read.chunks) == packed.groups[group].layout.nbytes
        assert all(before <= chunk.start <= chunk.end <= after for chunk in read.chunks)


def test_requests_are_served_in_order_and_overlap(packed: StoreDescription) -> None:
    """The next group's first chunk is read while the last one of the group before is still under way."""
    last_of_globals = packed.groups[None].extents[0].offset + packed.groups[None].layout.nbytes - 1
    next_began = threading.Event()

    def answer(number: int, offset: int, nbytes: int) -> int:
        if offset <= last_of_globals < offset + nbytes:
            assert next_began.wait(10)
        elif offset > last_of_globals:
            next_began.set()
        return nbytes

    drive = FakeDrive(answer)
    store = PackedStore(packed, staging_bytes=2 * SMALLEST_CHUNK, pread=drive)
    reads = [store.read(group, aligned(packed.groups[group].layout.nbytes)) for group in (None, FFN1)]
    for read in reads:
        assert read.checked.exception(10) is None
    store.close()
    assert [offset for offset, _ in drive.reads] == sorted(offset for offset, _ in drive.reads)


def test_a_buffer_that_o_direct_cannot_fill_is_refused(packed: StoreDescription) -> None:
    store = PackedStore(packed, staging_bytes=MIB)
    nbytes = packed.groups[FFN1].layout.nbytes
    with pytest.raises(ValueError, match="aligned"):
        store.read(FFN1, aligned(nbytes + BLOCK)[8:])
    with pytest.raises(ValueError, match="needs"):
        store.read(FFN1, aligned(nbytes - BLOCK))
    store.close()


def test_without_o_direct_reads_are_buffered_and_a_warning_says_so(
    packed: StoreDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_direct(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", no_direct)
    dropped = list[int]()
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, nbytes, advice: dropped.append(offset))
    store = PackedStore(packed, staging_bytes=MIB)
    assert_equals(store, CountingCheckpoint(packed.config))
    # The superblock too: a cache would give the one of before, after another host has packed the store anew.
    assert dropped.count(0) == 1 + len(packed.groups)
    assert len(store.warnings) == 1
    assert "no O_DIRECT" in store.warnings[0]
    store.close()


# -- drives that misbehave


@pytest.mark.parametrize("seed", range(5))
def test_short_reads_are_read_on(packed: StoreDescription, seed: int) -> None:
    """Whole blocks as a drive gives them, and odd numbers of bytes; each read again from a whole block."""
    chance = random.Random(seed)
    drive = FakeDrive(lambda number, offset, nbytes: max(BLOCK, chance.randrange(nbytes)) if number % 3 else nbytes)

    def pread(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert offset % BLOCK == 0
        got = drive.answer(len(drive.reads), offset, len(buffers[0]))
        drive.reads.append((offset, got))
        data = os.pread(plain, got, offset)
        buffers[0][: len(data)] = data
        return len(data)

    plain = os.open(packed.targets[0], os.O_RDONLY)
    store = PackedStore(packed, staging_bytes=4 * MIB, pread=pread)
    assert_equals(store, CountingCheckpoint(packed.config))
    store.close()
    os.close(plain)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (lambda number, offset, nbytes: 0, "short read"),
        (lambda number, offset, nbytes: nbytes if number else BLOCK, "short read"),
    ],
)
def test_a_target_that_ends_early_is_a_store_error(packed: StoreDescription, answer: Any, named: str) -> None:
    end = packed.groups[FFN1].extents[0].offset + BLOCK

    def cut(number: int, offset: int, nbytes: int) -> int:
        return int(answer(number, offset, nbytes)) if offset < end else 0

    store = PackedStore(packed, staging_bytes=MIB, pread=FakeDrive(cut))
    failure = outcome(store, FFN1)
    assert isinstance(failure, StoreError)
    assert named in str(failure)
    assert "L1.ffn" in str(failure)
    assert packed.targets[0] in str(failure)
    store.close()


def test_a_read_error_names_group_target_and_offset(packed: StoreDescription) -> None:
    def fail(number: int, offset: int, nbytes: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    store = PackedStore(packed, staging_bytes=MIB, pread=FakeDrive(fail))
    offset = packed.groups[FFN1].extents[0].offset
    failure = outcome(store, FFN1)
    assert isinstance(failure, StoreError)
    assert f"{packed.targets[0]} at byte {offset}, in L1.ffn: read error: Input/output error" in str(failure)
    store.close()


def test_after_a_failure_nothing_writes_into_the_buffer_any_more(packed: StoreDescription) -> None:
    """One chunk fails at once while another is slow: the read ends after the slow one, so the buffer may go."""
    release, slow_done = threading.Event(), threading.Event()

    def answer(number: int, offset: int, nbytes: int) -> int:
        if number == 0:
            assert release.wait(10)
            slow_done.set()
            return nbytes
        raise OSError(errno.EIO, "Input/output error")

    store = PackedStore(packed, staging_bytes=2 * SMALLEST_CHUNK, pread=FakeDrive(answer))
    slow_was_done: list[bool] = []
    read = store.read(None, aligned(packed.groups[None].layout.nbytes))
    for future in (read.arrived, read.checked):
        future.add_done_callback(lambda _: slow_was_done.append(slow_done.is_set()))
        with pytest.raises(concurrent.futures.TimeoutError):
            future.exception(0.05)
        assert not future.cancel()
    release.set()
    assert isinstance(read.checked.exception(10), StoreError)
    store.close()
    assert slow_was_done == [True, True]


def test_a_failed_group_does_not_harm_the_next(packed: StoreDescription) -> None:
    def answer(number: int, offset: int, nbytes: int) -> int:
        if number == 0:
            raise OSError(errno.EIO, "Input/output error")
        return nbytes

    store = PackedStore(packed, staging_bytes=MIB, pread=FakeDrive(answer))
    assert isinstance(outcome(store, None), StoreError)
    assert outcome(store, FFN1) is None
    assert outcome(store, None) is None
    store.close()


# -- closing


def test_close_in_the_middle_of_a_read_joins_the_threads_and_tells_the_askers(packed: StoreDescription) -> None:
    began = threading.Event()

    def slow(number: int, offset: int, nbytes: int) -> int:
        began.set()
        time.sleep(0.02)
        return nbytes

    store = PackedStore(packed, staging_bytes=SMALLEST_CHUNK, pread=FakeDrive(slow))
    buffers = [aligned(packed.groups[None].layout.nbytes) for _ in range(3)]
    reads = [store.read(None, buffer) for buffer in buffers]
    assert began.wait(10)
    store.close()
    failures = [read.checked.exception(0) for read in reads]
    assert all(isinstance(failure, StoreError) and "closed" in str(failure) for failure in failures)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wsm-io")]
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.read(None, buffers[0])


def test_a_store_that_cannot_be_opened_leaves_no_file_open(tmp_path: Path) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    flip(tmp_path / "store.wsm", 20)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreError):
        PackedStore(description, staging_bytes=MIB)
    assert len(os.listdir("/proc/self/fd")) == before


# -- wrong, changed and damaged stores


def test_a_flipped_byte_is_found_at_the_first_read_and_by_verify(tmp_path: Path) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    flip(tmp_path / "store.wsm", description.groups[FFN1].extents[0].offset + 1000)
    store = PackedStore(description, staging_bytes=MIB)
    failure = outcome(store, FFN1)
    assert isinstance(failure, StoreError)
    assert "L1.ffn" in str(failure)
    assert "checksum" in str(failure)
    assert isinstance(outcome(store, FFN1), StoreError), "a bad group is bad every time"
    seen: list[int] = []
    bad = verify(store, progress=seen.append)
    assert [sentence[:6] for sentence in bad] == ["L1.ffn"]
    assert sum(seen) == description.nbytes
    store.close()


def test_verify_names_every_bad_group(tmp_path: Path) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    for group in (None, GroupId(0, "attn"), GroupId(2, "ffn")):
        flip(tmp_path / "store.wsm", description.groups[group].extents[0].offset)
    store = PackedStore(description, staging_bytes=MIB)
    assert [sentence.split(" (")[0] for sentence in verify(store)] == ["the globals", "L0.attn", "L2.ffn"]
    store.close()


@pytest.mark.parametrize("verify", ["first", "always", "auto"])
def test_damage_after_the_first_read_is_found_unless_only_that_is_checked(tmp_path: Path, verify: VerifyWhen) -> None:
    """``auto`` checks every read until it knows that the checks are the slower part."""
    description = read_manifest(pack_tiny(tmp_path))
    store = PackedStore(description, staging_bytes=MIB, verify=verify)
    assert outcome(store, FFN1) is None
    flip(tmp_path / "store.wsm", description.groups[FFN1].extents[0].offset)
    assert isinstance(outcome(store, FFN1), StoreError) is (verify != "first")
    store.close()


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("begun_only", [True, False])
def test_a_store_that_is_packed_anew_while_it_is_read_is_noticed_at_the_next_read(
    tmp_path: Path, verify: VerifyWhen, begun_only: bool
) -> None:
    """By a program that heeds no lock, or over the network; packing takes the superblock away first."""
    store = PackedStore(read_manifest(pack_tiny(tmp_path)), staging_bytes=MIB, verify=verify)
    assert outcome(store, FFN1) is None
    other = tmp_path / "other"
    other.mkdir()
    pack_tiny(other)  # the same weights, so the same bytes but for the superblock
    anew = bytes(BLOCK) if begun_only else (other / "store.wsm").read_bytes()
    with (tmp_path / "store.wsm").open("r+b") as file:
        file.write(anew)
    said = "bears no packed store" if begun_only else "is another store or was overwritten"
    assert said in str(outcome(store, FFN1))
    store.close()


def test_a_truncated_store_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    os.truncate(tmp_path / "store.wsm", description.groups[FFN1].extents[0].offset + BLOCK)
    with pytest.raises(StoreError, match=r"store\.wsm ends at byte .*L1\.ffn.*cut short"):
        PackedStore(description, staging_bytes=MIB)


def test_a_store_truncated_while_it_is_open_is_a_short_read(tmp_path: Path) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    store = PackedStore(description, staging_bytes=MIB)
    os.truncate(tmp_path / "store.wsm", description.groups[FFN1].extents[0].offset + BLOCK + 100)
    failure = outcome(store, FFN1)
    assert isinstance(failure, StoreError)
    assert "short read" in str(failure)
    assert outcome(store, GroupId(0, "attn")) is None
    store.close()


@pytest.mark.parametrize(
    ("offset", "named"), [(0, "no packed store"), (9, "damaged"), (30, "damaged"), (55, "damaged")]
)
def test_a_changed_superblock_is_refused(tmp_path: Path, offset: int, named: str) -> None:
    description = read_manifest(pack_tiny(tmp_path))
    flip(tmp_path / "store.wsm", offset)
    with pytest.raises(StoreError, match=rf"store\.wsm.*{named}.*re-pack"):
        PackedStore(description, staging_bytes=MIB)


def test_another_store_under_the_manifest_is_refused(tmp_path: Path) -> None:
    """A re-pack under an old manifest: same model, same layout, another store."""
    old = pack_tiny(tmp_path).read_text()
    pack_tiny(tmp_path)
    (tmp_path / "old.json").write_text(old)
    with pytest.raises(StoreError, match=r"another store or was overwritten"):
        PackedStore(read_manifest(tmp_path / "old.json"), staging_bytes=MIB)


def test_a_manifest_edited_by_hand_is_refused(tmp_path: Path) -> None:
    manifest = pack_tiny(tmp_path)
    text = manifest.read_text()
    digits = text.split('"checksum": "')[2][:32]
    manifest.write_text(text.replace(digits, "0" * 32))
    with pytest.raises(StoreError, match="another manifest"):
        PackedStore(read_manifest(manifest), staging_bytes=MIB)


def test_stripes_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    manifest = pack_tiny(tmp_path, targets=[a, b])
    with pytest.raises(StoreError, match="part 2 of 2"):
        PackedStore(read_manifest(manifest, raw_device=f"{b},{a}"), staging_bytes=MIB)


@pytest.mark.parametrize("target", ["/dev/null", "."])
def test_what_is_neither_file_nor_device_is_refused(packed: StoreDescription, target: str) -> None:
    description = dataclasses.replace(packed, targets=(target,))
    with pytest.raises(UnusableInput, match="neither a file nor a block device"):
        PackedStore(description, staging_bytes=MIB)


def test_an_empty_target_is_refused(packed: StoreDescription, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(StoreError, match="bears no packed store"):
        PackedStore(dataclasses.replace(packed, targets=(str(tmp_path / "empty"),)), staging_bytes=MIB)


# -- checksums on threads of their own


class HeldChecksums:
    """Every checksum waits until ``go``; ``raises`` instead, if given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, raises: BaseException | None = None) -> None:
        self.go, self.begun, self._raises = threading.Event(), threading.Semaphore(0), raises
        self._real = packed_store.xxh3_128
        monkeypatch.setattr(packed_store, "xxh3_128", self)

    def __call__(self, image: memoryview) -> Any:
        self.begun.release()
        assert self.go.wait(20)
        if self._raises is not None:
            raise self._raises
        return self._real(image)


def test_groups_are_read_while_others_are_checked(packed: StoreDescription, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldChecksums(monkeypatch)
    store = PackedStore(packed, staging_bytes=SMALLEST_CHUNK)
    assert store.threads == 1
    groups = [GroupId(0, "attn"), GroupId(0, "ffn"), GroupId(1, "attn")]
    reads = [store.read(group, aligned(store.layout(group).nbytes)) for group in groups]
    assert [read.arrived.exception(20) for read in reads] == [None] * len(groups)
    assert not any(read.checked.done() for read in reads)
    held.go.set()
    assert [read.checked.exception(20) for read in reads] == [None] * len(groups)
    store.close()


def test_close_waits_for_checksums_under_way_and_answers_every_read_once(
    packed: StoreDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, store = HeldChecksums(monkeypatch), PackedStore(packed, staging_bytes=MIB)
    groups = [group for group in packed.groups if group is not None] * 8
    answers: list[BaseException | None] = []
    for group in groups:
        read = store.read(group, aligned(store.layout(group).nbytes))
        read.checked.add_done_callback(lambda checked: answers.append(checked.exception()))
    assert all(held.begun.acquire(timeout=20) for _ in range(CHECKSUM_THREADS))
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    held.go.set()
    closing.join(20)
    assert not closing.is_alive()
    assert len(answers) == len(groups)
    assert answers.count(None) >= CHECKSUM_THREADS


def test_a_chunk_under_way_while_the_store_closes_is_answered_once(packed: StoreDescription) -> None:
    """Its checksum is still asked for, of threads that are closed after those that read."""
    under_way, go = threading.Event(), threading.Event()

    def answer(number: int, offset: int, nbytes: int) -> int:
        under_way.set()
        assert go.wait(20)
        return nbytes

    store = PackedStore(packed, staging_bytes=MIB, pread=FakeDrive(answer))
    answers: list[BaseException | None] = []
    read = store.read(FFN1, aligned(store.layout(FFN1).nbytes))
    read.checked.add_done_callback(lambda checked: answers.append(checked.exception()))
    assert under_way.wait(20)
    closing = threading.Thread(target=store.close)
    closing.start()
    time.sleep(0.05)
    go.set()
    closing.join(20)
    assert not closing.is_alive()
    assert len(answers) == 1


@pytest.mark.parametrize("broken", ["drive", "checksum"])
def test_bytes_have_arrived_where_only_the_check_fails(tmp_path: Path, broken: str) -> None:
    def fail(number: int, offset: int, nbytes: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    description = read_manifest(pack_tiny(tmp_path))
    drive = FakeDrive(fail if broken == "drive" else None)
    if broken == "checksum":
        extent = description.groups[FFN1].extents[0]
        flip(tmp_path / "store.wsm", extent.offset + 100)
    store = PackedStore(description, staging_bytes=MIB, pread=drive)
    read = store.read(FFN1, aligned(store.layout(FFN1).nbytes))
    arrived_first: list[bool] = []
    read.checked.add_done_callback(lambda _: arrived_first.append(read.arrived.done()))
    assert isinstance(read.checked.exception(20), StoreError)
    store.close()
    assert arrived_first == [True]
    assert (read.arrived.exception() is None) == (broken == "checksum")


def test_a_checksum_that_cannot_be_made_reaches_the_asker(
    packed: StoreDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    HeldChecksums(monkeypatch, MemoryError("no room")).go.set()
    store = PackedStore(packed, staging_bytes=MIB)
    with pytest.raises(MemoryError, match="no room"):
        store.read(FFN1, aligned(store.layout(FFN1).nbytes)).checked.result(20)
    store.close()


def test_threads_that_cannot_start_leave_nothing_open(
    packed: StoreDescription, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = threading.Thread.start, set(threading.enumerate())
    opened = len(os.listdir("/proc/self/fd"))
    for at in (1, CHECKSUM_THREADS, CHECKSUM_THREADS + 1, CHECKSUM_THREADS + 3):
        calls = itertools.count(1)

        def start(thread: threading.Thread, calls: Any = calls, at: int = at) -> None:
            if next(calls) == at:
                raise RuntimeError("can't start new thread")
            real(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start"):
                PackedStore(packed, staging_bytes=MIB)
        assert set(threading.enumerate()) <= before
        assert len(os.listdir("/proc/self/fd")) == opened
