"""Files that are read: never one that could be read for ever, and JSON that is JSON."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from wsm import stop
from wsm.errors import UnusableInput

MOST_BYTES = 256 << 20
"""Of a file that is read whole: prompts, results, configs, manifests, tokenizers. Shards are mapped, without limit."""
PIPE_LIMIT_S = 60.0
"""For as long a pipe is read. One whose writer never ends is refused then."""
_MOST_DEPTH = 100
_KINDS: dict[Callable[[int], bool], str] = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a block device",
}


def check_regular_file(path: Path, label: str = "", *, most_bytes: int | None = None, pipes: bool = False) -> None:
    """Refuse (UnusableInput) what is not there or no file, before it is opened: a pipe or a device may never end.

    ``label`` names it in the sentence, else its path. ``most_bytes``: a larger file is refused too. ``pipes`` may pass.
    """
    label = label or str(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UnusableInput(f"{label} cannot be read: {_reason(error)}") from error
    if kind := next((name for test, name in _KINDS.items() if test(found.st_mode)), None):
        if not (pipes and stat.S_ISFIFO(found.st_mode)):
            raise UnusableInput(f"{label} cannot be read: it is {kind}, not a file")
    elif most_bytes is not None and found.st_size > most_bytes:
        raise _too_large(label, most_bytes)


def read_file(path: Path, label: str = "", *, most_bytes: int = MOST_BYTES, pipes: bool = False) -> bytes:
    """All that a file holds; raises UnusableInput for what :func:`check_regular_file` refuses, or cannot be read.

    With ``pipes`` the shell's ``<(command)`` is read as well, for :data:`PIPE_LIMIT_S` at most.
    """
    stop.check()
    label = label or str(path)
    check_regular_file(path, label, most_bytes=most_bytes, pipes=pipes)
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            content = _read_most(file.fileno(), label, most_bytes + 1)
    except OSError as error:
        raise UnusableInput(f"{label} cannot be read: {_reason(error)}") from error
    if len(content) > most_bytes:  # a pipe, or a file of /proc, tells no size before
        raise _too_large(label, most_bytes)
    return content


def begins_with(path: Path, mark: bytes) -> bool:
    """Whether a file has nothing but blanks, or begins with ``mark`` behind them; not if it cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return text.startswith(mark) or (not text and len(head) < 4096)


def text_of(content: bytes, label: str) -> str:
    """UTF-8, with or without a byte order mark; raises UnusableInput, naming it ``label``, for anything else."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{label} is not UTF-8 text: {error}") from error


def _read_most(file: int, label: str, most: int) -> bytes:
    """What comes before the end, ``most`` bytes at most; the file is open without waiting."""
    end, parts, got = time.monotonic() + PIPE_LIMIT_S, list[bytes](), 0
    while got < most:
        try:
            part = os.read(file, min(most - got, 16 << 20))
        except BlockingIOError:
            stop.check()
            if time.monotonic() > end:
                raise UnusableInput(f"{label} did not come to its end in {PIPE_LIMIT_S:.0f} s; name a file") from None
            select.select([file], [], [], min(stop.LOOK_S, PIPE_LIMIT_S))
            continue
        if not part:
            break
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def _too_large(label: str, most_bytes: int) -> UnusableInput:
    return UnusableInput(f"{label} is larger than {most_bytes / 1e6:.0f} MB, which no such file is; name another")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def parse_json(content: bytes, label: str, mend: str) -> Any:
    """What JSON text holds; UnusableInput, with ``label`` and ``mend``, if it is none.

    Python's reader takes more than JSON is: numbers that are none or that no float holds, a key twice, half a
    surrogate pair. What lies deeper than 100 levels is refused too: each who walks through it may recurse.
    """
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=_object)
        if fault := _fault(found):
            raise ValueError(fault.removeprefix(".") if len(fault) < 200 else f"...{fault[-150:]}")
        if "\\ud" in text.lower():  # surrogateescape: so Python writes a path that is no text
            json.dumps(found, ensure_ascii=False).encode("utf-8", errors="surrogateescape")
    except (ValueError, RecursionError) as error:
        reason = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)
        raise UnusableInput(f"{label} is damaged (no JSON: {reason}); {mend}") from error
    return found


def read_json(path: Path, label: str, mend: str) -> Any:
    """What a JSON file holds; raises UnusableInput, naming it ``label``, if it is missing, no file, or damaged."""
    return parse_json(read_file(path, label), label, mend)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r:.60} comes twice")
    return found


def _fault(value: Any, depth: int = 0) -> str | None:
    """The key of what no JSON file of ours holds, and why: a number beyond floats, or a hundred levels."""
    if depth > _MOST_DEPTH:
        return f" is nested deeper than {_MOST_DEPTH} levels"
    inner: Iterable[tuple[object, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = (("[]", item) for item in value)
    elif isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # nor NaN
        text = json.dumps(value)
        return f" is {text if len(text) <= 40 else f'{text[:37]}...'}"
    for key, item in inner:
        if fault := _fault(item, depth + 1):
            return f".{key}{fault}"
    return None
