"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from wsm.errors import UnusableInput


def sync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` outlast a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text``: temporary file, fsync, rename. An OSError leaves nothing behind, and an older file as it was.

    UnusableInput for what is no file, as /dev/null: a rename would put one in its place.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UnusableInput(f"{path} is no file and cannot be written: name another")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
