"""Small files that are there whole or not at all, and files that processes take turns by."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from wsm import stop
from wsm.errors import UnusableInput

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write that more room, or a higher limit, would mend."""


def sync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` outlast a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_left_behind(path: Path) -> None:
    """Remove the temporary files of ``path`` that a killed process has left; a living one has its own locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}.tmp"):
        with contextlib.suppress(OSError), left.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _open_temporary(path: Path) -> TextIO:
    """A new file, locked; again where somebody has removed it before it was, taking it for left behind."""
    while True:
        # A name from the command line may hold bytes that are no text: they are written as escapes.
        file = path.open("x", encoding="utf-8", errors="backslashreplace")
        try:
            with contextlib.suppress(OSError):  # a filesystem without locks: nobody gets one to remove it by
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text``: temporary file, fsync, rename. An OSError leaves nothing behind, and an older file as it was.

    It names ``path``, of which a full disk's own error says nothing. Temporary files of the same path that a killed
    process has left go first. UnusableInput for what is no file, as /dev/null: a rename would put one in its place.
    """
    named, path = path, path.resolve()
    if path.exists() and not path.is_file():
        raise UnusableInput(f"{named} is no file and cannot be written: name another")
    remove_left_behind(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _open_temporary(beside) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)  # while it is locked: once closed it would pass for left behind
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(named)) from error
        raise


def nearest(folder: Path) -> Path:
    """The folder, or else what is there of the way to it: where it would be made."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def check_folder(folder: Path, label: str) -> None:
    """UnusableInput, with ``label`` (a flag and its path) in the sentence, where no file can be made in ``folder``."""
    if not folder.is_dir():
        raise UnusableInput(f"{label} cannot be written: its directory does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnusableInput(f"{label} cannot be written ({error.strerror}); name another") from error


@contextlib.contextmanager
def locked(path: Path, label: str, *, busy: str | None = None) -> Iterator[None]:
    """Hold a lock file (made where there is none, its mtime set) alone: wait for it, or refuse with ``busy``.

    UnusableInput, with ``label`` in the sentence, where it cannot be made. Whoever holds it may remove it.
    """
    while True:
        stop.check()
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UnusableInput(f"{label} cannot be used: {path.name}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UnusableInput(f"{label} cannot be used: {path.name} is no file")
            if _taken(file, path):
                os.utime(file)
                yield
                return
        finally:
            os.close(file)
        if busy is not None:
            raise UnusableInput(busy)
        time.sleep(stop.LOOK_S)


def _taken(file: int, path: Path) -> bool:
    """Try to lock an open file; False where another process has it, or has removed it from its place meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a filesystem without locks
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(file))
    return False
