"""Small files that are there whole or not at all, and JSON read from one."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import uuid
from pathlib import Path
from typing import Any, TextIO

from wsm.errors import UnusableInput


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
        file = path.open("x", encoding="utf-8")
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

    Temporary files of the same path that a killed process has left go first.
    """
    path = path.resolve()
    remove_left_behind(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _open_temporary(beside) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path, label: str, mend: str) -> Any:
    """What a JSON file holds; raises UnusableInput, naming it ``label``, if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"{label} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"{label} is damaged (no JSON: {error}); {mend}") from error
