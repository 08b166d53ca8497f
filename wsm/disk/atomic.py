"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` outlast a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text``: temporary file, fsync, rename. An OSError leaves nothing behind, and an older file as it was."""
    path = path.resolve()
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
