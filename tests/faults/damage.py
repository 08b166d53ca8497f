"""What can happen to a file: bytes changed, cut off, moved; fields changed; something else in its place."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path
from typing import Any

BLOCK = 4096
_RAW = "@@RAW@@"
_ODD: tuple[Any, ...] = (None, True, False, -1, 0, 1, 2, 7, 10**30, -(10**30), 0.5, 1e308, "", "x", "\0", [], {}, [[]])
_ODDER = (
    *("NaN", "-Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 5000, '"\\ud800"'),
    *("[" * 500 + "]" * 500, "[" * 99999),
)
KINDS = ("absent", "empty", "directory", "pipe", "socket", "link to itself", "device")


def place_instead(rng: random.Random, path: Path) -> str:
    """Put something that is no such file in its place."""
    kind = rng.choice(KINDS)
    path.unlink(missing_ok=True)
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's name is short
        try:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full", "/dev/tty"]))
    return f"{path.name}: {kind}"


def damage_bytes(rng: random.Random, path: Path, start: int = 0, end: int | None = None) -> str:
    """Change bytes from ``start`` up to ``end``, or cut the file off there."""
    content = bytearray(path.read_bytes())
    end = len(content) if end is None else end
    at = rng.randrange(start, max(end, start + 1))
    what = rng.choice(["bit", "byte", "zeros", "cut", "swap", "insert", "random"])
    if what == "bit" and content:
        content[at] ^= 1 << rng.randrange(8)
    elif what == "byte" and content:
        content[at] = rng.randrange(256)
    elif what == "zeros":
        length = min(rng.choice([1, 16, BLOCK]), end - at)
        content[at : at + length] = bytes(length)
    elif what == "cut":
        at = at - at % BLOCK if rng.random() < 0.5 else at
        del content[at:]
    elif what == "swap":
        size = min(rng.choice([1, 16, BLOCK]), max(1, (end - start) // 2))
        one, two = (start + size * rng.randrange(max(1, (end - start) // size)) for _ in range(2))
        first, second = content[one : one + size], content[two : two + size]
        if len(first) == len(second):
            content[one : one + size], content[two : two + size] = second, first
    elif what == "insert":
        content[at:at] = rng.randbytes(rng.choice([1, 7, BLOCK]))
    else:
        length = min(rng.choice([2, 64, BLOCK]), end - at)
        content[at : at + length] = rng.randbytes(length)
    path.write_bytes(content)
    return f"{path.name}: {what} at {at}"


def damage_json(rng: random.Random, path: Path) -> str:
    """Change, remove, add or repeat a field anywhere in a JSON file."""
    document = json.loads(path.read_text())
    places: list[tuple[Any, Any, str]] = []

    def walk(value: Any, said: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key, f"{said}.{key}"))
            walk(inner, f"{said}.{key}")

    walk(document, "")
    # As many of the outer fields as of the many inner ones.
    outer = [place for place in places if place[0] is document]
    holder, key, said = rng.choice(outer if rng.random() < 0.5 else places)
    what, raw = rng.choice(["odd", "odd", "odder", "remove", "twice", "move", "nudge"]), ""
    if what == "remove":
        del holder[key]
    elif what == "move":
        other, place, _ = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[place])) if other is not holder else _nudged(rng, holder[key])
    elif what == "nudge":
        holder[key] = _nudged(rng, holder[key])
    elif what == "twice" and isinstance(holder, dict):
        holder[_RAW] = _RAW
        raw = f"{json.dumps(key)}: {json.dumps(rng.choice(_ODD))}"
    else:
        if what == "odd":
            holder[key] = rng.choice(_ODD)
        else:
            holder[key], raw = _RAW, rng.choice(_ODDER)
    text = json.dumps(document)
    text = text.replace(f'"{_RAW}": "{_RAW}"', raw) if what == "twice" else text.replace(f'"{_RAW}"', raw)
    path.write_text(text)
    return f"{path.name}: {said} {what} {raw[:20] or repr(holder[key] if what != 'remove' else '')[:40]}"


def _nudged(rng: random.Random, value: Any) -> Any:
    """A value of the same type that is not the same."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, value * 2, -value, value / 2, value - 1])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value[::-1], value.upper()])
    return value * 2 if isinstance(value, list) else {**value, "more": 1}
