"""Prompt files: lines, headed blocks, JSON lines, JSON arrays and ShareGPT conversations. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsm.disk.files import parse_json, read_file, text_of
from wsm.errors import UnusableInput

MOST_BYTES = 1 << 30
"""Of a prompt file; the largest in common use, of ShareGPT, has 0.7 GB."""
_HEADER = re.compile(r"^=====\s*PROMPT\b.*=====\s*$")
_ARRAY = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[\s*\{\s*"')
_KEYS = ("prompt", "text", "conversations")
_EXPECTED = 'a string, {"prompt": "…"}, {"text": "…"} or a conversation of ShareGPT is expected'
_ASKING = ("human", "user")


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, which the shell's ``<(command)`` may be too.

    ``.json`` is one document, an array of entries or one entry; so is a file that begins as an array of objects.
    ``.jsonl`` and ``.ndjson`` hold an entry a line, and any other file that is seen to be JSON is read as such. Else
    there are blocks under ``===== PROMPT … =====`` headers, or one prompt a line. Of a conversation the first turn of
    the user is taken; one without is passed over. Raises UnusableInput if the file is missing, no file, larger than
    1 GiB, not UTF-8, or if an entry is empty or no prompt.
    """
    label = f"--prompts {path}"
    if not os.path.lexists(path):
        raise UnusableInput(f"{label}: no such file; bench_infer.py prompts --out {path} makes one")
    content = read_file(path, label, most_bytes=MOST_BYTES, pipes=True)
    lines = text_of(content, label).split(
        "\n"
    )  # splitlines() would also cut at U+2028 and the like, which JSON strings may hold
    entries = _json_entries(path.suffix.lower(), content, lines, label)
    if entries is not None:
        prompts = [prompt for where, entry in entries if (prompt := _prompt_of(entry, where)) is not None]
    elif any(_HEADER.match(line) for line in lines):
        prompts = _blocks(lines, label)
    else:
        prompts = [prompt for line in lines if (prompt := line.strip())]
    if not prompts:
        raise UnusableInput(f"{label} holds no prompt")
    return prompts


def _json_entries(suffix: str, content: bytes, lines: Sequence[str], label: str) -> list[tuple[str, Any]] | None:
    """Where each entry is, and what it holds; None if the file is no JSON by its name, nor by what is in it."""
    if suffix in (".jsonl", ".ndjson"):
        return _by_line(lines, label)
    if suffix == ".json" or _ARRAY.match(content):
        return _of_document(content, label)
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith(("{", "[")):
        return None
    if document := _seen_prompts(content, label):
        return document
    return _by_line(lines, label) if _seen_prompts(first.encode(), label) else None


def _seen_prompts(content: bytes, label: str) -> list[tuple[str, Any]]:
    """The entries of a document that bears no name of JSON; none if it is none, or holds anything but prompts."""
    try:
        found = _of_document(content, label)
    except UnusableInput:
        return []
    is_prompt = (isinstance(e, str) or (isinstance(e, dict) and not e.keys().isdisjoint(_KEYS)) for _, e in found)
    return found if all(is_prompt) else []


def _by_line(lines: Sequence[str], label: str) -> list[tuple[str, Any]]:
    named = ((f"{label}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    return [(where, parse_json(line.encode(), where, _EXPECTED)) for where, line in named]


def _of_document(content: bytes, label: str) -> list[tuple[str, Any]]:
    found = parse_json(content, label, "where each line is JSON by itself, name the file .jsonl")
    entries = found if isinstance(found, list) else [found]
    return [(f"{label}, entry {number}", entry) for number, entry in enumerate(entries, 1)]


def _prompt_of(entry: Any, where: str) -> str | None:
    """The prompt of an entry; None for a conversation in which the user says nothing."""
    if isinstance(entry, dict) and isinstance(turns := entry.get("conversations"), list):
        asked = (turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") in _ASKING)
        return next((text for text in asked if isinstance(text, str) and text.strip()), None)
    found = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else entry
    if not isinstance(found, str):
        raise UnusableInput(f"{where} holds no prompt: {_EXPECTED}")
    return _not_empty(found, where)


def _not_empty(prompt: str, where: str) -> str:
    if not prompt.strip():
        raise UnusableInput(f"{where} holds no prompt: it is empty")
    return prompt


def _blocks(lines: Sequence[str], label: str) -> list[str]:
    blocks: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines, 1):
        where = f"{label}, line {number}"
        if _HEADER.match(line):
            blocks.append((where, []))
        elif blocks:
            blocks[-1][1].append(line)
        elif line.strip():
            raise UnusableInput(f"{where}: text before the first ===== PROMPT … ===== header")
    return [_not_empty("\n".join(block).strip(), where) for where, block in blocks]
