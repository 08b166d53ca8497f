"""Direct I/O: files and block devices opened past the page cache, and locked."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat

from wsm.disk.blockdev import unusable_target
from wsm.disk.safety import refuse_in_dev
from wsm.errors import UnusableInput
from wsm.layout.groups import BLOCK


def aligned_block(content: bytes = b"") -> mmap.mmap:
    """4096 aligned bytes that begin with ``content``, as O_DIRECT asks."""
    block = mmap.mmap(-1, BLOCK)
    block[: len(content)] = content
    return block


def open_direct(path: str, flags: int) -> int:
    """``path``, opened with ``flags``, past the page cache where that can be; raises UnusableInput if it fails."""
    try:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # Without O_DIRECT, as on some network filesystems; a file that the first try made is ours.
        return os.open(path, flags & ~os.O_EXCL if flags & os.O_CREAT else flags, 0o644)
    except OSError as error:
        raise unusable_target(path, error) from error


def is_buffered(file: int) -> bool:
    """Whether an open file goes through the page cache."""
    return not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT


def lock(file: int, how: int, refusal: str) -> None:
    """Hold an open target by LOCK_EX, or to read it by LOCK_SH; UnusableInput with ``refusal`` if others have it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UnusableInput(refusal) from None
    except OSError:
        return  # a filesystem without locks


def open_for_reading(target: str) -> tuple[int, bool]:
    """A store's target, open and locked for reading (else UnusableInput); whether it goes through the page cache."""
    try:
        mode = os.stat(target).st_mode
    except OSError as error:
        raise unusable_target(target, error) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UnusableInput(f"{target} is neither a file nor a block device: name the target of `pack --to`")
    if stat.S_ISREG(mode):
        refuse_in_dev(target, target)
    file = open_direct(target, os.O_RDONLY)
    try:
        lock(file, fcntl.LOCK_SH, f"{target} is being packed just now: wait until that is over")
    except UnusableInput:
        os.close(file)
        raise
    return file, is_buffered(file)
