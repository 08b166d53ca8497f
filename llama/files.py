"""A model's small files, as a download leaves them; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wsm.disk import files
from wsm.errors import UnusableInput

AGAIN = "download it from the original checkpoint again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint; UnusableInput if it is missing, no JSON, or no object."""
    content = files.read_json(path, str(path), AGAIN)
    if not isinstance(content, dict):
        raise UnusableInput(f"{path} holds no JSON object; {AGAIN}")
    return content


def refuse_pointer(path: Path) -> None:
    """Refuse (UnusableInput) what git leaves in place of a large file that it has not downloaded."""
    files.check_regular_file(path)
    try:
        with path.open("rb") as file:
            is_pointer = file.read(64).startswith(b"version https://git-lfs")
    except OSError as error:
        raise UnusableInput(f"{path} cannot be read: {error.strerror}") from error
    if is_pointer:
        raise UnusableInput(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in that directory")
