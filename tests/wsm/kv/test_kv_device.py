"""KV on a file or device: right bytes or an error, and never a byte over what somebody may need."""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.inputs import read_manifest
from tests.stores import aligned, assert_equals, checkpoint, flip, loop_device, pack_tiny
from wsm import threads
from wsm.disk import blockdev, safety, targets
from wsm.errors import DoesNotFit, KVDeviceError, UnusableInput
from wsm.kv import device as kv_device
from wsm.kv import target as kv_target
from wsm.kv.device import THREADS, KVDevice, blocks_of
from wsm.kv.target import MAGIC, kv_superblock, run_of
from wsm.layout.groups import BLOCK
from wsm.settings import VerifyWhen
from wsm.store.packed_store import PackedStore
from wsm.threads import ThreadsStuck

KIB, MIB = 1 << 10, 1 << 20
Answer = Callable[[int, int, int], int]


class FakeDrive:
    """Stands in for ``os.preadv`` or ``os.pwritev``: of call ``number`` it moves as many bytes as ``answer`` says."""

    def __init__(self, real: Callable[..., int], answer: Answer = lambda number, offset, nbytes: nbytes) -> None:
        self.real, self.answer = real, answer
        self.calls: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def __call__(self, file: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert offset % BLOCK == 0, "O_DIRECT refuses this"
        with self._lock:
            number = len(self.calls)
            self.calls.append((offset, sum(map(len, buffers))))
        moved = self.answer(number, *self.calls[number])
        whole = moved - moved % BLOCK  # the rest of a broken block is lost, as on a drive
        for buffer in buffers:
            part = buffer[:whole]
            if part:
                offset += self.real(file, [part], offset)
                whole -= len(part)
        return moved


def failing(code: int) -> Answer:
    def answer(number: int, offset: int, nbytes: int) -> int:
        raise OSError(code, os.strerror(code))

    return answer


def faulty(path: str, what: str, answer: Answer) -> tuple[KVDevice, Callable[..., None]]:
    """A device of 1 MiB whose drive reads or writes (``what``) as ``answer`` says; and that request."""
    if what == "read":
        device = KVDevice(path, MIB, weights=[], pread=FakeDrive(os.preadv, answer))
        return device, device.read
    device = KVDevice(path, MIB, weights=[], pwrite=FakeDrive(os.pwritev, answer))
    return device, device.write


def filled(path: str, nbytes: int, **more: Any) -> KVDevice:
    """A device that all was written on: only that may be read."""
    device = KVDevice(path, nbytes, weights=[], **more)
    assert outcome(device.write, 0, aligned(nbytes).zero_()) is None
    return device


def random_bytes(nbytes: int, seed: int = 0) -> Tensor:
    out = aligned(nbytes)
    out.copy_(torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return out


def outcome(request: Callable[..., Future[None]], offset: int, buffer: Tensor) -> BaseException | None:
    """How a request of one move, by a method of a device, ended."""
    unit: int = request.__self__._unit  # type: ignore[attr-defined]
    return request([(offset, blocks_of(buffer, unit))]).exception(20)


def kv_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("wsm-kv")]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "kv")


# -- right bytes


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_was_written_is_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Stretches of any size and place, against the same in memory; short transfers on the way."""
    blocks = 96
    whole = [8 * BLOCK, 5 * BLOCK + 100, BLOCK]
    pread, pwrite = (
        FakeDrive(real, lambda n, offset, nbytes: min(nbytes, whole[n % 3])) for real in (os.preadv, os.pwritev)
    )
    path = str(tmp_path_factory.mktemp("kv") / "kv")
    device = filled(path, blocks * BLOCK, threads=3, pread=pread, pwrite=pwrite)
    expected = torch.zeros(blocks * BLOCK, dtype=torch.uint8)
    for seed in range(4):
        begin = data.draw(st.integers(0, blocks - 1))
        count = data.draw(st.integers(1, blocks - begin))
        part = random_bytes(count * BLOCK, seed)
        assert outcome(device.write, begin * BLOCK, part) is None
        expected[begin * BLOCK : (begin + count) * BLOCK] = part
    found = aligned(blocks * BLOCK)
    assert outcome(device.read, 0, found) is None
    device.close()
    assert torch.equal(found, expected)


def test_a_unit_of_several_megabytes_comes_back_through_the_real_drive(path: str) -> None:
    """As KV comes: ``[rows, n_kv_heads, tokens, 2, record]``; in pieces of one size, so many that all threads work."""
    kv = random_bytes(72 * MIB).view(2, 4, 9 * 256, 2, -1)
    write, read = FakeDrive(os.pwritev), FakeDrive(os.preadv)
    device = KVDevice(path, 74 * MIB, weights=[], unit=MIB, threads=2, pread=read, pwrite=write)
    assert device.warnings == []
    assert outcome(device.write, 2 * MIB, kv) is None
    found = aligned(72 * MIB).view(kv.shape)
    assert outcome(device.read, 2 * MIB, found) is None
    device.close()
    assert torch.equal(found, kv)
    for drive in (read, write):
        assert [nbytes for _, nbytes in drive.calls] == [12 * MIB] * 6


def test_blocks_that_lie_apart_in_memory_lie_together_on_the_drive(path: str) -> None:
    """Short transfers in the middle of a block; the blocks between stay as they are."""
    unit, whole = 16 * KIB, [3 * 16 * KIB, 5 * BLOCK, 16 * KIB + 100]
    pread, pwrite = (
        FakeDrive(real, lambda n, offset, nbytes: min(nbytes, whole[n % 3])) for real in (os.preadv, os.pwritev)
    )
    device = KVDevice(path, 40 * unit, weights=[], unit=unit, threads=1, pread=pread, pwrite=pwrite)
    content = random_bytes(80 * unit).view(40, 2, unit)
    assert device.write([(0, blocks_of(content, unit)[1::2])]).exception(20) is None
    together = aligned(40 * unit).view(40, unit)
    assert outcome(device.read, 0, together) is None
    assert torch.equal(together, content[:, 1])
    apart = aligned(80 * unit).zero_().view(40, 2, unit)
    assert device.read([(3 * unit, blocks_of(apart, unit)[6::2])]).exception(20) is None
    device.close()
    assert torch.equal(apart[3:, 0], content[3:, 1])
    assert not apart[:, 1].any()
    assert not apart[:3].any()


def test_moves_that_follow_one_another_on_the_drive_are_cut_as_one(path: str) -> None:
    """Whatever their sizes; what lies elsewhere begins a piece of its own."""
    drive = FakeDrive(os.preadv)
    device = filled(path, 8 * MIB, unit=64 * KIB, threads=2, pread=drive)
    blocks, unit = blocks_of(aligned(4 * MIB), 64 * KIB), 64 * KIB
    moves = [(MIB, blocks[:1]), (MIB + unit, blocks[1:40]), (MIB + 40 * unit, blocks[40:48]), (0, blocks[48:56])]
    assert device.read(moves).exception(20) is None
    device.close()
    assert sorted(drive.calls) == [(BLOCK, 8 * unit), (BLOCK + MIB, 24 * unit), (BLOCK + MIB + 24 * unit, 24 * unit)]


def test_a_row_that_is_left_out_costs_no_more_calls_than_it_must(path: str) -> None:
    """28 runs of 31 blocks where a piece takes 16: two of each, and none is small."""
    drive = FakeDrive(os.preadv)
    device = filled(path, 32 * 28 * MIB // 16, unit=64 * KIB, threads=6, pread=drive)
    blocks, unit = blocks_of(aligned(28 * 2 * MIB), 64 * KIB), 64 * KIB
    with mock.patch.object(kv_device, "LARGEST_PIECE", 16 * unit):
        read = device.read([(32 * unit * n, blocks[32 * n : 32 * n + 31]) for n in range(28)])
    assert read.exception(20) is None
    device.close()
    assert len(drive.calls) == 2 * 28
    assert {nbytes // unit for _, nbytes in drive.calls} == {15, 16}


def test_a_piece_is_one_call_of_the_system_however_small_its_blocks(path: str) -> None:
    drive = FakeDrive(os.preadv)
    device = filled(path, 10 * MIB, threads=1, pread=drive)
    assert outcome(device.read, 0, aligned(10 * MIB)) is None
    device.close()
    assert [nbytes for _, nbytes in drive.calls] == [854 * BLOCK, 854 * BLOCK, 852 * BLOCK]


def test_what_is_forgotten_counts_as_never_written(path: str) -> None:
    device = filled(path, MIB)
    device.forget()
    assert isinstance(outcome(device.read, 0, aligned(MIB)), KVDeviceError)
    device.close()


def test_work_beside_a_read_is_part_of_the_request(path: str) -> None:
    device, done = filled(path, MIB), list[int]()
    assert device.read([(0, blocks_of(aligned(MIB), BLOCK))], beside=[partial(done.append, 1)]).exception(10) is None
    assert device.read([], beside=[partial(done.append, 2)]).exception(10) is None
    assert device.read([]).exception(10) is None
    failed = device.read([], beside=[lambda: done[7]]).exception(10)
    device.close()
    assert done == [1, 2]
    assert isinstance(failed, IndexError)


def test_all_threads_work_on_one_large_request(path: str) -> None:
    """Each read waits until all are under way: fewer at a time would never end."""
    together = threading.Barrier(THREADS)

    def answer(number: int, offset: int, nbytes: int) -> int:
        together.wait(10)
        return nbytes

    device = filled(path, 4 * MIB, pread=FakeDrive(os.preadv, answer))
    assert outcome(device.read, 0, aligned(4 * MIB)) is None
    device.close()


def test_requests_are_begun_in_the_order_asked(path: str) -> None:
    drive = FakeDrive(os.preadv)
    device = filled(path, MIB, threads=1, pread=drive)
    offsets = [512 * KIB, 0, 768 * KIB, 4 * KIB]
    finished = list[int]()

    def tell(offset: int, ended: Future[None]) -> None:
        assert ended.exception() is None
        finished.append(offset)

    for offset in offsets:
        device.read([(offset, blocks_of(aligned(BLOCK), BLOCK))]).add_done_callback(partial(tell, offset))
    assert outcome(device.read, 0, aligned(BLOCK)) is None
    device.close()
    assert finished == offsets
    assert [offset for offset, _ in drive.calls] == [BLOCK + offset for offset in [*offsets, 0]]


def test_the_superblock_stands_before_the_data_and_its_bytes_are_these(path: str) -> None:
    run = bytes(range(16))
    fields = b"WSMKV\0\0\0" + struct.pack("<II", 1, 0) + run
    assert kv_superblock(run) == (fields + xxhash.xxh3_64_digest(fields)).ljust(4096, b"\0")
    assert run_of(kv_superblock(run)) == run
    assert run_of(kv_superblock(run).replace(b"\x05", b"\x06")) is None
    device = KVDevice(path, 2 * BLOCK, weights=[])
    content = random_bytes(BLOCK)
    assert outcome(device.write, BLOCK, content) is None
    on_file = Path(path).read_bytes()
    device.close()
    assert on_file[:BLOCK].startswith(MAGIC)
    assert run_of(on_file[:BLOCK]) is not None
    assert on_file[BLOCK : 2 * BLOCK] == bytes(BLOCK)
    assert on_file[2 * BLOCK :] == content.numpy().tobytes()


def test_without_o_direct_a_warning_says_so_and_writes_wait_for_the_drive(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.open, list[int]()

    def no_direct(name: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", no_direct)
    monkeypatch.setattr(os, "fdatasync", synced.append)
    device = KVDevice(path, MIB, weights=[])
    assert len(device.warnings) == 1
    assert "no O_DIRECT" in device.warnings[0]
    content, found = random_bytes(MIB), aligned(MIB)
    assert outcome(device.write, 0, content) is None
    assert len(synced) == 4
    assert outcome(device.read, 0, found) is None
    assert len(synced) == 4
    assert torch.equal(found, content)
    monkeypatch.setattr(os, "fdatasync", lambda file: failing(errno.EIO)(0, 0, 0))
    failure = outcome(device.write, 0, content)
    assert isinstance(failure, KVDeviceError)
    assert "write error: Input/output error" in str(failure)
    device.close()


@pytest.mark.parametrize(
    ("offset", "buffer", "named"),
    [
        (0, lambda: aligned(2 * BLOCK)[8 : BLOCK + 8], "are no blocks"),
        (0, lambda: aligned(BLOCK)[:100], "are no blocks"),
        (0, lambda: aligned(BLOCK)[:0], "not whole blocks of 4096"),
        (512, lambda: aligned(BLOCK), "not whole blocks of 4096"),
        (3 * BLOCK, lambda: aligned(2 * BLOCK), "are not in the 16384 bytes"),
        (-BLOCK, lambda: aligned(BLOCK), "are not in the 16384 bytes"),
        (0, lambda: aligned(2 * BLOCK).view(2, 2, -1)[:, 0], "in one piece"),
    ],
)
def test_a_request_that_o_direct_cannot_serve_is_refused(
    path: str, offset: int, buffer: Callable[[], Tensor], named: str
) -> None:
    device = KVDevice(path, 4 * BLOCK - 1, weights=[])
    for request in (device.read, device.write):
        with pytest.raises((ValueError, RuntimeError), match=named):
            request([(offset, blocks_of(buffer(), BLOCK))])
    device.close()


# -- drives that misbehave


@pytest.mark.parametrize(
    ("what", "code", "reason"),
    [
        ("read", errno.EIO, "read error: Input/output error"),
        ("write", errno.EIO, "write error: Input/output error"),
        ("write", errno.ENOSPC, "write error: No space left on device"),
    ],
)
def test_an_error_of_the_drive_names_path_byte_reason_and_mend(path: str, what: str, code: int, reason: str) -> None:
    device, request = faulty(path, what, failing(code))
    failure = outcome(request, 8 * BLOCK, aligned(BLOCK))
    assert isinstance(failure, KVDeviceError)
    assert str(failure) == (
        f"{path} at byte {9 * BLOCK}, in offloaded KV: {reason}; check the drive, or name another --kv-device"
    )
    device.close()


@pytest.mark.parametrize("what", ["read", "write"])
@pytest.mark.parametrize("moved", [0, 100])
def test_a_drive_that_gives_no_more_is_an_error_not_a_hang(path: str, what: str, moved: int) -> None:
    device, request = faulty(path, what, lambda number, offset, nbytes: moved if offset > 2 * BLOCK else BLOCK)
    failure = outcome(request, 0, aligned(8 * BLOCK))
    assert isinstance(failure, KVDeviceError)
    assert f"{path} at byte {3 * BLOCK}, in offloaded KV: short {what}" in str(failure)
    device.close()


def test_a_failed_request_does_not_harm_the_next(path: str) -> None:
    def answer(number: int, offset: int, nbytes: int) -> int:
        return failing(errno.EIO)(number, offset, nbytes) if number == 0 else nbytes

    device = KVDevice(path, MIB, weights=[], threads=1, pwrite=FakeDrive(os.pwritev, answer))
    content, found = random_bytes(MIB), aligned(MIB)
    assert isinstance(outcome(device.write, 0, content), KVDeviceError)
    assert outcome(device.write, 0, content) is None
    assert outcome(device.read, 0, found) is None
    device.close()
    assert torch.equal(found, content)


def test_after_a_failure_nothing_touches_the_buffer_any_more(path: str) -> None:
    """One chunk fails at once while another is slow: the request ends after the slow one, with the first failure."""
    release, slow_over, slow_was_over = threading.Event(), threading.Event(), list[bool]()

    def answer(number: int, offset: int, nbytes: int) -> int:
        if number == 0:
            assert release.wait(10)
            slow_over.set()
            return nbytes
        return failing(errno.EIO)(number, offset, nbytes)

    drive = FakeDrive(os.preadv, answer)
    device = KVDevice(path, 20 * MIB, weights=[], threads=2, pread=drive)
    read = device.read([(0, blocks_of(aligned(20 * MIB), BLOCK))])
    read.add_done_callback(lambda _: slow_was_over.append(slow_over.is_set()))
    with pytest.raises(concurrent.futures.TimeoutError):
        read.exception(0.05)
    release.set()
    assert isinstance(read.exception(10), KVDeviceError)
    device.close()
    assert slow_was_over == [True]
    assert len(drive.calls) == 2, "the other three chunks are not worth reading any more"


# -- checksums


def test_all_64_bits_of_a_checksum_are_compared(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's integers of both sides of 2**63 would become floats, which tell only 53 bits apart."""
    sums = iter([5, 2**64 - 1, 5, 2**64 - 3])
    monkeypatch.setattr(kv_device, "xxh3_64", lambda block: next(sums))
    device = KVDevice(path, 2 * BLOCK, weights=[])
    device._n_threads = 1
    assert outcome(device.write, 0, aligned(2 * BLOCK).zero_()) is None
    assert isinstance(outcome(device.read, 0, aligned(2 * BLOCK)), KVDeviceError)
    device.close()


def test_a_unit_that_was_right_and_could_not_be_written_again_is_not_read(path: str) -> None:
    def answer(number: int, offset: int, nbytes: int) -> int:
        return failing(errno.EIO)(number, offset, nbytes) if number else nbytes

    device = KVDevice(path, BLOCK, weights=[], verify="first", pwrite=FakeDrive(os.pwritev, answer))
    assert outcome(device.write, 0, random_bytes(BLOCK)) is None
    assert outcome(device.read, 0, aligned(BLOCK)) is None
    assert isinstance(outcome(device.write, 0, random_bytes(BLOCK, 1)), KVDeviceError)
    assert isinstance(outcome(device.read, 0, aligned(BLOCK)), KVDeviceError)
    device.close()


@pytest.mark.parametrize("at", [BLOCK, BLOCK + 3 * 64 * KIB + 77])
def test_a_flipped_byte_is_noticed_and_the_unit_is_named(path: str, at: int) -> None:
    unit = 64 * KIB
    device = KVDevice(path, MIB, weights=[], unit=unit)
    assert outcome(device.write, 0, random_bytes(MIB)) is None
    flip(Path(path), at)
    failure = outcome(device.read, 0, aligned(MIB))
    assert isinstance(failure, KVDeviceError)
    assert f"{path} at byte {at - (at - BLOCK) % unit}, in offloaded KV: what was read is not what" in str(failure)
    assert outcome(device.read, 512 * KIB, aligned(512 * KIB)) is None, "what is sound there can be read"
    device.close()


@pytest.mark.parametrize("verify", ["auto", "always", "first"])
def test_a_byte_that_flips_after_a_first_right_read_is_noticed_unless_only_first_reads_are_checked(
    path: str, verify: VerifyWhen
) -> None:
    device, found = KVDevice(path, MIB, weights=[], verify=verify), aligned(MIB)
    assert outcome(device.write, 0, random_bytes(MIB)) is None
    assert outcome(device.read, 0, found) is None
    flip(Path(path), BLOCK + 5)
    assert isinstance(outcome(device.read, 0, found), KVDeviceError) is (verify != "first")
    assert outcome(device.write, 0, random_bytes(MIB, 1)) is None
    flip(Path(path), BLOCK + 5)
    assert isinstance(outcome(device.read, 0, found), KVDeviceError), "what is written anew is checked anew"
    device.close()


class _Slow:
    """Checksums whose first comparison is slow: what may come between it and the mark that all is right does."""

    def __init__(self, sums: Any, between: Callable[[], None]) -> None:
        self._sums, self._between = sums, between

    def __getitem__(self, units: slice) -> Any:
        found, between = self._sums[units].copy(), self._between
        self._between = lambda: None
        between()
        return found

    def __setitem__(self, units: slice, sums: Any) -> None:
        self._sums[units] = sums


def test_what_is_written_while_an_older_read_is_compared_is_checked_at_its_first_read(path: str) -> None:
    device, found = KVDevice(path, BLOCK, weights=[], verify="first"), aligned(BLOCK)
    assert outcome(device.write, 0, random_bytes(BLOCK)) is None
    writes = list[Future[None]]()

    def write() -> None:
        writes.append(device.write([(0, blocks_of(random_bytes(BLOCK, 1), BLOCK))]))
        concurrent.futures.wait(writes, timeout=0.2)  # it has to wait itself for the mark

    device._sums = _Slow(device._sums, write)  # type: ignore[assignment]
    assert outcome(device.read, 0, found) is None
    assert writes[0].exception(10) is None
    flip(Path(path), BLOCK + 5)
    assert isinstance(outcome(device.read, 0, found), KVDeviceError)
    device.close()


def test_a_write_that_the_drive_lost_is_noticed(path: str) -> None:
    """It says that all was written, and keeps what was there before."""
    lost = FakeDrive(lambda file, buffers, offset: 0)
    device = filled(path, MIB, pwrite=lost)
    assert outcome(device.write, 0, random_bytes(MIB)) is None
    assert isinstance(outcome(device.read, 0, aligned(MIB)), KVDeviceError)
    device.close()


def test_what_this_run_has_not_written_is_never_taken_for_kv(path: str) -> None:
    device = KVDevice(path, MIB, weights=[])
    assert outcome(device.write, 0, random_bytes(512 * KIB)) is None
    assert outcome(device.read, 0, aligned(512 * KIB)) is None
    assert isinstance(outcome(device.read, 0, aligned(MIB)), KVDeviceError)
    device.close()


# -- closing


def test_close_joins_the_threads_and_answers_what_is_pending(path: str) -> None:
    release, began = threading.Event(), threading.Event()

    def slow(number: int, offset: int, nbytes: int) -> int:
        began.set()
        assert release.wait(10)
        return nbytes

    device = filled(path, MIB, threads=1, pread=FakeDrive(os.preadv, slow))
    answers: list[BaseException | None] = []
    for number in range(3):  # the first is one chunk and under way, the others wait
        read = device.read([(0, blocks_of(aligned(BLOCK if number == 0 else MIB), BLOCK))])
        read.add_done_callback(lambda ended: answers.append(ended.exception()))
    assert began.wait(10)
    closing = threading.Thread(target=device.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "a thread still writes into the buffer"
    release.set()
    closing.join(10)
    assert [type(answer) for answer in answers] == [KVDeviceError, KVDeviceError, type(None)]
    assert "was closed before" in str(answers[0])
    assert kv_threads() == []
    assert not os.path.exists(path)
    device.close()
    with pytest.raises(RuntimeError, match="closed"):
        device.read([(0, blocks_of(aligned(BLOCK), BLOCK))])
    assert len(answers) == 3


def test_where_a_thread_is_stuck_another_close_goes_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release, began, before = threading.Event(), threading.Event(), open_files()

    def stuck(number: int, offset: int, nbytes: int) -> int:
        began.set()
        assert release.wait(20)
        return nbytes

    device = filled(path, BLOCK, threads=1, pread=FakeDrive(os.preadv, stuck))
    read = device.read([(0, blocks_of(aligned(BLOCK), BLOCK))])
    assert began.wait(10)
    monkeypatch.setattr(threads, "JOIN_S", 0.02)
    for _ in range(2):
        with pytest.raises(ThreadsStuck, match="wsm-kv-0"):
            device.close()
        assert os.path.exists(path)
    release.set()
    assert read.exception(10) is None
    monkeypatch.undo()
    device.close()
    assert kv_threads() == []
    assert not os.path.exists(path)
    assert open_files() == before


def test_a_file_that_a_failing_filesystem_keeps_is_taken_by_the_next_run(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    before, device = open_files(), KVDevice(path, MIB, weights=[])
    with monkeypatch.context() as failing_drive:
        failing_drive.setattr(os, "unlink", refused)
        with pytest.raises(KVDeviceError, match=f"{path} cannot be removed .Read-only file system.: remove it"):
            device.close()
    assert os.path.exists(path)
    assert open_files() == before
    device.close()
    KVDevice(path, MIB, weights=[]).close()
    assert not os.path.exists(path)


def test_a_file_that_this_run_made_is_private_and_goes_again(path: str) -> None:
    before = open_files()
    device = KVDevice(path, MIB, weights=[])
    assert len(kv_threads()) == THREADS
    assert os.stat(path).st_mode & 0o777 == 0o600
    device.close()
    assert not os.path.exists(path)
    assert open_files() == before


def test_a_file_that_was_there_stays_empty(path: str) -> None:
    Path(path).touch()
    device = KVDevice(path, MIB, weights=[])
    assert os.path.getsize(path) == MIB + BLOCK
    device.close()
    assert os.path.getsize(path) == 0


def test_what_a_killed_run_left_behind_is_taken_again(path: str) -> None:
    Path(path).write_bytes(kv_superblock(bytes(16)) + b"old" * 5000)
    device = KVDevice(path, MIB, weights=[])
    assert run_of(Path(path).read_bytes()[:BLOCK]) not in (None, bytes(16))
    device.close()
    assert os.path.getsize(path) == 0


def test_a_file_that_a_killed_run_had_made_goes_with_the_next_one(path: str) -> None:
    Path(path).write_bytes(kv_superblock(bytes(16), made=True) + b"old" * 5000)
    KVDevice(path, MIB, weights=[]).close()
    assert not os.path.exists(path)


@pytest.mark.parametrize("content", [kv_superblock(bytes(16)), b"letters" * 1000])
def test_a_file_that_somebody_else_has_taken_over_is_left_to_him(path: str, content: bytes) -> None:
    """As another run may, where the filesystem has no locks; or under the same name, in a file of its own."""
    device = KVDevice(path, MIB, weights=[])
    with open(path, "r+b") as file:
        file.write(content)
    device.close()
    assert Path(path).read_bytes().startswith(content)
    os.unlink(path)
    device = KVDevice(path, MIB, weights=[])
    os.rename(path, path + ".moved")
    Path(path).write_bytes(content)
    device.close()
    assert Path(path).read_bytes() == content


# -- what must not be written


def refused(path: str, named: str, *, weights: Sequence[str] = (), nbytes: int = MIB) -> None:
    """Exit 2 with a sentence, no thread and no file left open."""
    before = open_files()
    with pytest.raises(UnusableInput, match=named) as caught:
        KVDevice(path, nbytes, weights=weights)
    assert path in str(caught.value)
    assert open_files() == before
    assert kv_threads() == []


def test_a_weights_store_is_refused_and_stays_as_it_is_byte_for_byte(tmp_path: Path) -> None:
    """Whether or not it is this run's, under whatever name, in use or not."""
    manifest = pack_tiny(tmp_path)
    store_file = tmp_path / "store.wsm"
    (tmp_path / "soft").symlink_to(store_file)
    os.link(store_file, tmp_path / "hard")
    before = store_file.read_bytes()
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    for name in ("store.wsm", "soft", "hard"):
        path = str(tmp_path / name)
        refused(path, "bears a packed store of weights: nothing was written")
        refused(path, "where the weights of this run lie", weights=["elsewhere", str(store_file)])
    assert_equals(store, checkpoint())
    store.close()
    assert store_file.read_bytes() == before


def test_weights_without_a_superblock_are_known_by_the_run_s_own_list(tmp_path: Path) -> None:
    """A version 1 store; even one that begins as offloaded KV does."""
    weights = tmp_path / "v1.raw"
    weights.write_bytes(kv_superblock(bytes(16)) + bytes(5 * BLOCK))
    before = weights.read_bytes()
    (tmp_path / "soft").symlink_to(weights)
    refused(str(tmp_path / "soft"), "where the weights of this run lie", weights=[str(weights)])
    assert weights.read_bytes() == before
    refused(str(tmp_path / "missing"), "where the weights of this run lie", weights=[str(tmp_path / "missing")])


def test_a_file_that_holds_something_else_is_refused(path: str) -> None:
    for content in (b"x", b"letters" * 2000, bytes(BLOCK), MAGIC.ljust(BLOCK, b"\0")):
        Path(path).write_bytes(content)
        refused(path, "holds something that is no offloaded KV: nothing was written")
        assert Path(path).read_bytes() == content


def test_what_can_be_no_file_is_refused(tmp_path: Path) -> None:
    refused(str(tmp_path), "neither a file nor a block device")
    refused("/dev/null", "neither a file nor a block device")
    refused(str(tmp_path / "no/kv"), "directory does not exist")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(str(tmp_path / "loop"), "cannot be opened")


def test_two_runs_do_not_share_a_file(path: str) -> None:
    first = KVDevice(path, MIB, weights=[])
    content, found = random_bytes(MIB), aligned(MIB)
    assert outcome(first.write, 0, content) is None
    before = open_files()
    with pytest.raises(UnusableInput, match="in use by another run"):
        KVDevice(path, MIB, weights=[])
    assert open_files() == before
    assert outcome(first.read, 0, found) is None
    assert torch.equal(found, content)
    first.close()
    KVDevice(path, MIB, weights=[]).close()


def test_somebody_who_writes_before_the_file_is_locked_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock
    Path(path).touch()

    def late(file: int, how: int) -> None:
        real(file, how)
        Path(path).write_bytes(b"WSMSTORE".ljust(BLOCK, b"\0"))

    monkeypatch.setattr(fcntl, "flock", late)
    refused(path, "bears a packed store of weights")
    assert Path(path).read_bytes() == b"WSMSTORE".ljust(BLOCK, b"\0")


def test_devices_are_refused_in_order_weights_use_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands in for a device that has everything wrong with it, mended one by one; nothing is written."""
    disk = tmp_path / "sdz"
    disk.write_bytes(b"WSMSTORE".ljust(8 * BLOCK, b"\0"))
    path, busy, borne = str(disk), ["sdz is mounted on /data"], ["a signature of type ext4"]
    related = {"8:0": "sdz", "8:1": "sdz1"}
    monkeypatch.setattr(kv_target, "is_block_device", lambda name: True)
    monkeypatch.setattr(kv_target, "related_devices", lambda name: related)
    monkeypatch.setattr(kv_target, "device_number", lambda name: "8:1")
    monkeypatch.setattr(safety, "why_file_busy", lambda name, root: busy[0] if busy else None)
    monkeypatch.setattr(safety, "signatures", lambda name, mend: borne)
    monkeypatch.setattr(targets, "logical_block", lambda file: 8192)
    monkeypatch.setattr(kv_target, "open_target", lambda name: pytest.fail("opened for writing"))
    before = disk.read_bytes()
    # The weights lie on a partition of the disk.
    (tmp_path / "sdz1").touch()
    refused(path, r"weights of this run lie \(.*sdz1\)", weights=[str(tmp_path / "sdz1")])
    del related["8:1"]
    refused(path, "bears a packed store of weights", weights=[str(tmp_path / "sdz1")])
    assert disk.read_bytes() == before
    disk.write_bytes(bytes(8 * BLOCK))
    refused(path, r"is in use \(sdz is mounted on /data\): nothing was written; name a free device")
    busy.clear()
    refused(path, r"bears a signature of type ext4: nothing was written; .*`wipefs -a .*sdz` clears it, or name a file")
    borne.clear()
    refused(path, "logical blocks of 8192 bytes")
    assert disk.read_bytes() == bytes(8 * BLOCK)


def test_without_blkid_the_mend_is_not_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(UnusableInput, match="install util-linux, or name a file") as caught:
        blockdev.signatures("/dev/x", mend="name a file")
    assert "--force" not in str(caught.value)


# -- room


def test_the_space_of_a_file_is_reserved_at_the_start(path: str) -> None:
    device = KVDevice(path, 8 * MIB, weights=[])
    assert os.stat(path).st_blocks * 512 >= 8 * MIB
    device.close()


def test_a_filesystem_without_the_room_is_said_in_bytes_at_the_start(path: str) -> None:
    needed = 1 << 60
    with pytest.raises(
        DoesNotFit, match=rf"{path} is too small: the KV takes .* GB .{needed + BLOCK} bytes.* has .* GB .* free; name"
    ):
        KVDevice(path, needed, weights=[])
    assert not os.path.exists(path)
    Path(path).touch()
    with pytest.raises(DoesNotFit):
        KVDevice(path, needed, weights=[])
    assert os.path.getsize(path) == 0


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_space_that_is_gone_when_it_is_reserved_leaves_nothing_behind(
    path: str, code: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, offset: int, nbytes: int) -> None:
        os.truncate(file, nbytes // 2)
        raise OSError(code, os.strerror(code))

    if there:
        Path(path).touch()
    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_files()
    with pytest.raises(
        DoesNotFit, match=f"takes 0.001 GB .{MIB + BLOCK} bytes. there.*{os.strerror(code)}.*--batch-size"
    ):
        KVDevice(path, MIB, weights=[])
    assert open_files() == before
    assert (os.path.getsize(path) if there else os.path.exists(path)) == 0


def test_a_drive_that_takes_no_superblock_is_a_store_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, offset: failing(errno.EIO)(0, 0, 0))
    with pytest.raises(KVDeviceError, match=f"{path} cannot be written: Input/output error; check the drive"):
        KVDevice(path, MIB, weights=[])
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, offset: BLOCK)
    with pytest.raises(KVDeviceError, match=f"{path} does not keep what is written to it"):
        KVDevice(path, MIB, weights=[])
    assert not os.path.exists(path)


def test_threads_that_cannot_start_leave_nothing_behind(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = threading.Thread.start, list[None]()

    def start(thread: threading.Thread) -> None:
        started.append(None)
        if len(started) > 3:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = open_files()
    with pytest.raises(RuntimeError, match="can't start"):
        KVDevice(path, MIB, weights=[])
    assert kv_threads() == []
    assert open_files() == before
    assert not os.path.exists(path)


# -- real devices


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "disk.img", 16 * MIB) as name:
        yield name


def bytes_of(device: str) -> bytes:
    with open(device, "rb") as file:
        return file.read()


@pytest.mark.root
def test_a_block_device_is_written_read_and_keeps_its_superblock(disk: str) -> None:
    nbytes = 16 * MIB - BLOCK
    content, found = random_bytes(nbytes), aligned(nbytes)
    device = KVDevice(disk, nbytes, weights=["/elsewhere"])
    assert device.warnings == []
    assert outcome(device.write, 0, content) is None
    assert outcome(device.read, 0, found) is None
    assert torch.equal(found, content)
    with pytest.raises(UnusableInput, match=f"{disk} is in use"):
        KVDevice(disk, MIB, weights=[])
    device.close()
    first = run_of(bytes_of(disk)[:BLOCK])
    assert first is not None
    KVDevice(disk, MIB, weights=[]).close()
    assert run_of(bytes_of(disk)[:BLOCK]) not in (None, first)


@pytest.mark.root
def test_too_small_a_device_is_said_in_bytes_and_stays_as_it_is(disk: str) -> None:
    before = bytes_of(disk)
    with pytest.raises(
        DoesNotFit,
        match=f"{disk} is too small: the KV takes 0.017 GB .{16 * MIB + BLOCK} .* has 0.017 GB .{16 * MIB} bytes.;",
    ):
        KVDevice(disk, 16 * MIB, weights=[])
    assert bytes_of(disk) == before


@pytest.mark.root
def test_a_device_that_bears_weights_or_a_filesystem_stays_as_it_is(tmp_path: Path, disk: str) -> None:
    manifest = pack_tiny(tmp_path, targets=[disk])
    before = bytes_of(disk)
    refused(disk, "bears a packed store of weights")
    refused(disk, "where the weights of this run lie", weights=[disk])
    assert bytes_of(disk) == before
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    assert_equals(store, checkpoint())
    store.close()
    mkfs = shutil.which("mkfs.ext4", path=f"{os.defpath}:/usr/sbin:/sbin")
    if mkfs is None:
        pytest.skip("mkfs.ext4 is not installed")
    subprocess.run([mkfs, "-q", "-F", disk], check=True)
    before = bytes_of(disk)
    refused(disk, f"bears a signature of type ext4.*`wipefs -a {disk}`")
    assert bytes_of(disk) == before


@pytest.mark.root
def test_a_loop_device_over_the_weights_file_is_the_weights_store(tmp_path: Path) -> None:
    pack_tiny(tmp_path)
    losetup = shutil.which("losetup", path=f"{os.defpath}:/usr/sbin:/sbin")
    if os.geteuid() != 0 or losetup is None:
        pytest.skip("needs root and losetup")
    store = tmp_path / "store.wsm"
    before = store.read_bytes()
    made = subprocess.run([losetup, "--find", "--show", str(store)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"losetup fails here: {made.stderr.strip()}")
    try:
        refused(made.stdout.strip(), "bears a packed store of weights")
    finally:
        subprocess.run([losetup, "--detach", made.stdout.strip()], check=True)
    assert store.read_bytes() == before
