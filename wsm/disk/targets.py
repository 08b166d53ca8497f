"""Files and block devices to write to: what must not be written, how one is taken, how its first block is sealed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from wsm.disk.atomic import sync_directory
from wsm.disk.blockdev import is_block_device, logical_block, target_size, unusable_target
from wsm.disk.direct import lock, open_direct
from wsm.disk.safety import check_writable, refuse_in_dev
from wsm.errors import DoesNotFit, UnusableInput
from wsm.layout.groups import BLOCK


def sealed(fields: bytes) -> bytes:
    """A superblock, the first 4096 bytes of a target: ``fields``, their xxh3-64, zeros."""
    return (fields + xxhash.xxh3_64_digest(fields)).ljust(BLOCK, b"\0")


def unsealed(block: bytes, nbytes: int) -> bytes | None:
    """The ``nbytes`` of fields in a superblock; None if they are damaged."""
    fields = block[:nbytes]
    return fields if xxhash.xxh3_64_digest(fields) == block[nbytes : nbytes + 8] else None


def check_targets(targets: Sequence[str], nbytes: int, *, force: bool) -> list[str]:
    """What will be overwritten of files or block devices that are each to take ``nbytes``, a phrase each.

    Refuses what must not be written (UnusableInput) or is too small (DoesNotFit), in the order of the contract in
    docs/ARCHITECTURE.md. With ``force``, devices and files pass that hold a filesystem or the like.
    """
    if len({os.path.realpath(target) for target in targets}) != len(targets):
        raise UnusableInput("--to names one target twice")
    lost, filesystems = [], dict[int, list[Path]]()
    for target in targets:
        if is_block_device(target):
            lost.append(_check_device(target, nbytes, force))
            continue
        path = check_place(target, f"--to {target}")
        if path.exists():
            lost.append(_described(target, check_writable(str(path), force=force, label=target)))
        filesystems.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in filesystems.values():
        # Several targets may be on one filesystem; what they hold already is theirs again.
        room = free_bytes(paths[0].parent) + sum(path.stat().st_blocks * 512 for path in paths if path.exists())
        if room < nbytes * len(paths):
            raise DoesNotFit(
                f"{', '.join(map(str, paths))}: the store takes {nbytes * len(paths) / 1e9:.3f} GB, the filesystem has "
                f"{room / 1e9:.3f} GB free; nothing was written"
            )
    return lost


def _check_device(target: str, nbytes: int, force: bool) -> str:
    with reading(target) as file:
        found = check_writable(target, force=force)
        check_blocks(file, target, "stores are")
        room = target_size(file)
    if room < nbytes:
        raise DoesNotFit(
            f"{target} is too small: the store takes {nbytes / 1e9:.3f} GB, the device has {room / 1e9:.3f} GB; "
            "nothing was written"
        )
    return _described(target, found)


def _described(target: str, found: Sequence[str]) -> str:
    return f"{target} (which bears {' and '.join(found)})" if found else target


@contextlib.contextmanager
def reading(device: str) -> Iterator[int]:
    """A block device, open to be looked at; raises UnusableInput if it cannot be opened."""
    try:
        file = os.open(device, os.O_RDONLY)
    except OSError as error:
        raise unusable_target(device, error) from error
    try:
        yield file
    finally:
        os.close(file)


def check_blocks(file: int, label: str, what: str) -> None:
    """Refuse a device (``label`` in the sentence) whose blocks are larger than ``what`` is aligned to."""
    if (block := logical_block(file)) > BLOCK:
        raise UnusableInput(f"{label} has logical blocks of {block} bytes; {what} aligned to {BLOCK}")


def check_place(target: str, label: str) -> Path:
    """The resolved path of a file to write to; refuses (``label`` in the sentence) what no file can be."""
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        raise UnusableInput(f"{label} is neither a file nor a block device")
    refuse_in_dev(path, label)
    if not path.parent.is_dir():
        raise UnusableInput(f"{label}: its directory does not exist; make it first")
    return path


def free_bytes(place: Path | int) -> int:
    """What the filesystem of a directory or open file has left for us."""
    usage = os.statvfs(place)
    return usage.f_bavail * usage.f_frsize


def open_target(target: str) -> tuple[int, bool]:
    """A target, open for writing past the page cache, a device exclusively; whether it is a file made just now."""
    if is_block_device(target):
        return open_direct(target, os.O_RDWR | os.O_EXCL), False
    path = os.path.realpath(target)
    new = not os.path.exists(path)
    return open_direct(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0)), new


def take(file: int, target: str) -> None:
    """Make an open target ours alone; raises UnusableInput if somebody else has it."""
    refusal = f"{target} is in use by another run or pack: nothing was written; wait until that is over"
    lock(file, fcntl.LOCK_EX, refusal)


@contextlib.contextmanager
def opened(target: str) -> Iterator[int]:
    """A target, open for writing and ours alone (else UnusableInput); a file that is new goes if the body raises."""
    file, new = open_target(target)
    path = os.path.realpath(target)
    try:
        take(file, target)
        if new:
            try:
                sync_directory(Path(path).parent)
            except OSError as error:
                raise unusable_target(path, error) from error
        yield file
    except BaseException:
        if new:
            os.unlink(path)
        raise
    finally:
        os.close(file)
