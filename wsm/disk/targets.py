"""The files and devices that a store lies on: what must not be written, and how they are opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from wsm.disk.atomic import sync_directory
from wsm.disk.blockdev import (
    check_writable,
    device_size,
    is_block_device,
    logical_block,
    loop_device_over,
    unusable_target,
)
from wsm.errors import DoesNotFit, UnusableInput
from wsm.layout.groups import BLOCK


def check_targets(targets: Sequence[str], nbytes: int, *, force: bool) -> list[str]:
    """Refuse what must not be written, in the order of DESIGN section 7: in use, bears a signature, too small.

    Args:
        targets: files or block devices, each to take ``nbytes``.
        force: let block devices pass that bear a filesystem or the like.

    Returns:
        What will be overwritten, a phrase each; empty if nothing is.

    Raises:
        UnusableInput: for a target that must not be written.
        DoesNotFit: for one that is too small.
    """
    if len({os.path.realpath(target) for target in targets}) != len(targets):
        raise UnusableInput("--to names one target twice")
    lost, filesystems = [], dict[int, list[Path]]()
    for target in targets:
        if is_block_device(target):
            lost.append(_check_device(target, nbytes, force))
            continue
        path = Path(os.path.realpath(target))
        if path.exists() and not path.is_file():
            raise UnusableInput(f"--to {target} is neither a file nor a block device")
        if not path.parent.is_dir():
            raise UnusableInput(f"--to {target}: its directory does not exist")
        if path.exists():
            if loop := loop_device_over(path):
                raise UnusableInput(
                    f"{target} is in use (it is the contents of {loop}): nothing was written; name another file, or "
                    f"detach it: losetup -d /dev/{loop}"
                )
            lost.append(target)
        filesystems.setdefault(path.parent.stat().st_dev, []).append(path)
    for paths in filesystems.values():
        _check_room(paths, nbytes * len(paths))
    return lost


def _check_device(target: str, nbytes: int, force: bool) -> str:
    try:
        file = os.open(target, os.O_RDONLY)
    except OSError as error:
        raise unusable_target(target, error) from error
    try:
        found = check_writable(target, force=force)
        room, block = device_size(file), logical_block(file)
    finally:
        os.close(file)
    if block > BLOCK:
        raise UnusableInput(f"{target} has logical blocks of {block} bytes; stores are aligned to {BLOCK}")
    if room < nbytes:
        raise DoesNotFit(
            f"{target} is too small: the store takes {nbytes / 1e9:.3f} GB, the device has {room / 1e9:.3f} GB; "
            "nothing was written"
        )
    return f"{target} (which bears {' and '.join(found)})" if found else target


def _check_room(paths: Sequence[Path], nbytes: int) -> None:
    """Several targets may lie on one filesystem; what they hold already is theirs again."""
    usage = os.statvfs(paths[0].parent)
    held = sum(path.stat().st_blocks * 512 for path in paths if path.exists())
    room = usage.f_bavail * usage.f_frsize + held
    if room < nbytes:
        raise DoesNotFit(
            f"{', '.join(map(str, paths))}: the store takes {nbytes / 1e9:.3f} GB, the filesystem has "
            f"{room / 1e9:.3f} GB free; nothing was written"
        )


@contextlib.contextmanager
def opened(target: str) -> Iterator[int]:
    """A target, open for writing past the page cache, and ours alone.

    A file that did not exist before goes again if the body raises.

    Raises:
        UnusableInput: if it cannot be opened, or somebody else has it.
    """
    if is_block_device(target):
        path, new, flags = target, False, os.O_RDWR | os.O_EXCL
    else:
        path = os.path.realpath(target)
        new = not os.path.exists(path)
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0)
    file = open_direct(path, flags)
    try:
        lock(file, target)
        if new:
            _sync_directory(path)
        yield file
    except BaseException:
        if new:
            os.unlink(path)
        raise
    finally:
        os.close(file)


def _sync_directory(path: str) -> None:
    try:
        sync_directory(Path(path).parent)
    except OSError as error:
        raise unusable_target(path, error) from error


def open_direct(path: str, flags: int) -> int:
    """``path``, opened with ``flags`` past the page cache where its filesystem can.

    Raises:
        UnusableInput: if it cannot be opened.
    """
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise unusable_target(path, error) from error
    # Without O_DIRECT, as on some network filesystems; a file that the first try made is ours.
    try:
        return os.open(path, flags & ~os.O_EXCL if flags & os.O_CREAT else flags, 0o644)
    except OSError as error:
        raise unusable_target(path, error) from error


def lock(file: int, target: str) -> None:
    """Make an open target ours alone. Readers of a store hold a shared lock on it, so nothing is written over that.

    Raises:
        UnusableInput: if somebody else has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UnusableInput(
            f"{target} is in use by another run or pack: nothing was written; wait until that is over"
        ) from None
    except OSError:
        return  # a filesystem without locks


def open_for_reading(target: str) -> tuple[int, bool]:
    """A file or block device, open past the page cache where that works; whether it does not.

    Raises:
        UnusableInput: if it cannot be opened, or is being packed.
    """
    try:
        mode = os.stat(target).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UnusableInput(f"{target} is neither a file nor a block device: name the target of `pack --to`")
        try:
            file, buffered = os.open(target, os.O_RDONLY | os.O_DIRECT), False
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file, buffered = os.open(target, os.O_RDONLY), True
    except OSError as error:
        raise unusable_target(target, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UnusableInput(f"{target} is being packed just now: wait until that is over") from None
    except OSError:
        pass  # a filesystem without locks
    return file, buffered
