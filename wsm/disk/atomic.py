"""Small files that are there whole or not at all, and JSON read from one."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

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

    It names ``path``, of which a full disk's own error says nothing.
    """
    named, path = path, path.resolve()
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(named)) from error
        raise


def read_json(path: Path, label: str, mend: str) -> Any:
    """What a JSON file holds; raises UnusableInput, naming it ``label``, if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"{label} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"{label} is damaged (no JSON: {error}); {mend}") from error
