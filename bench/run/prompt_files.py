"""Prompt files: lines, headed blocks, JSON lines, JSON arrays, ShareGPT conversations and chats. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from wsm.disk.files import parse_json, read_file, text_of
from wsm.errors import UnusableInput

Message: TypeAlias = dict[str, str]
"""A ``role`` and a ``content``."""
MOST_BYTES = 1 << 30
"""Of a prompt file; the largest in common use, of ShareGPT, has 0.7 GB."""
_HEADER = re.compile(r"^=====\s*PROMPT\b.*=====\s*$")
_ARRAY = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[\s*\{\s*"')
_KEYS = ("prompt", "text", "conversations", "messages")
_EXPECTED = 'a string, {"prompt": "…"}, {"text": "…"}, {"messages": […]} or a conversation of ShareGPT is expected'
_ASKING = ("human", "user")


def user_says(text: str) -> list[Message]:
    """A chat of one message."""
    return [{"role": "user", "content": text}]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, as :func:`read_chats`; of a chat the first message of the user."""
    return [next(m["content"] for m in chat if m["role"] == "user") for chat in read_chats(path)]


def read_chats(path: Path) -> list[list[Message]]:
    """Chats of a file, which the shell's ``<(command)`` may be too; a prompt is one message of the user.

    ``.json`` is one document, an array of entries or one entry; so is a file that begins as an array of objects.
    ``.jsonl`` and ``.ndjson`` hold an entry a line, and any other file that is seen to be JSON is read as such. Else
    there are blocks under ``===== PROMPT … =====`` headers, or one prompt a line. Of a conversation of
    ShareGPT the first turn of the user is taken, of ``messages`` all up to the user's last; one in which the user says
    nothing is passed over. Raises UnusableInput if the file is missing, no file, larger than
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
        chats = [chat for where, entry in entries if (chat := _chat_of(entry, where))]
    elif any(_HEADER.match(line) for line in lines):
        chats = [user_says(prompt) for prompt in _blocks(lines, label)]
    else:
        chats = [user_says(prompt) for line in lines if (prompt := line.strip())]
    if not chats:
        raise UnusableInput(f"{label} holds no prompt")
    return chats


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


def _chat_of(entry: Any, where: str) -> list[Message]:
    """The chat of an entry; empty for a conversation in which the user says nothing."""
    if isinstance(entry, dict) and isinstance(turns := entry.get("conversations"), list):
        asked = (turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") in _ASKING)
        return next((user_says(text) for text in asked if isinstance(text, str) and text.strip()), [])
    if isinstance(entry, dict) and isinstance(messages := entry.get("messages"), list):
        return _up_to_the_user([_message_of(message, where) for message in messages])
    found = entry.get("prompt", entry.get("text")) if isinstance(entry, dict) else entry
    if not isinstance(found, str):
        raise UnusableInput(f"{where} holds no prompt: {_EXPECTED}")
    return user_says(_not_empty(found, where))


def _message_of(message: Any, where: str) -> Message:
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UnusableInput(f'{where}: a message is not {{"role": "…", "content": "…"}} with texts')
    return {"role": role, "content": content}


def _up_to_the_user(messages: list[Message]) -> list[Message]:
    """Without the answers behind the user's last message, for the model is to give that one."""
    asked = [n for n, message in enumerate(messages, 1) if message["role"] == "user" and message["content"].strip()]
    return messages[: asked[-1]] if asked else []


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
