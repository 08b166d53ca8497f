"""Prompt files: read, and made of texts of an exact number of tokens. Imports no torch."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama.tokenizer import Tokenizer
from wsm.errors import UnusableInput

DEFAULT_FILE = Path(__file__).resolve().parents[2] / "prompts" / "prompts_default.txt"
_HEADER = re.compile(r"^=====\s*PROMPT\b.*=====\s*$")
_WORDS = Path(__file__).with_name("words.txt")


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: ``.jsonl``; blocks under ``===== PROMPT … =====`` headers; else one a line.

    Raises:
        UnusableInput: if it is missing, not UTF-8, empty, or a line of ``.jsonl`` holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UnusableInput(f"--prompts {path}: no such file; bench_infer.py prompts --out {path} makes one") from None
    except OSError as error:
        raise UnusableInput(f"--prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UnusableInput(f"--prompts {path} is not UTF-8 text: {error}") from error
    lines = text.split("\n")  # splitlines() would also cut at U+2028 and the like, which JSON strings may hold
    if path.suffix == ".jsonl":
        prompts = [_json_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    elif any(_HEADER.match(line) for line in lines):
        prompts = _blocks(path, lines)
    else:
        prompts = [line.strip() for line in lines]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UnusableInput(f"--prompts {path} holds no prompt")
    return prompts


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"--prompts {path}, line {number} is no JSON: {error}") from error
    found = entry if isinstance(entry, str) else None
    if isinstance(entry, dict):
        found = entry.get("prompt", entry.get("text"))
    if not isinstance(found, str):
        raise UnusableInput(
            f'--prompts {path}, line {number} holds no prompt: {{"prompt": "…"}} or a string is expected'
        )
    return found


def _blocks(path: Path, lines: Sequence[str]) -> list[str]:
    blocks: list[list[str]] = []
    for number, line in enumerate(lines, 1):
        if _HEADER.match(line):
            blocks.append([])
        elif blocks:
            blocks[-1].append(line)
        elif line.strip():
            raise UnusableInput(f"--prompts {path}, line {number}: text before the first ===== PROMPT … ===== header")
    return ["\n".join(block).strip() for block in blocks]


def make_prompts(tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> Iterator[str]:
    """``count`` texts of random words that the tokenizer cuts into exactly ``tokens`` tokens each, BOS not counted."""
    numbers, words = random.Random(seed), _WORDS.read_text(encoding="utf-8").split()
    tokens_a_word = len(tokenizer.encode(" ".join(words), bos=False)) / len(words)
    for _ in range(count):
        yield _exact_text(tokenizer, tokens, numbers, words, tokens_a_word)


def _exact_text(
    tokenizer: Tokenizer, tokens: int, numbers: random.Random, words: Sequence[str], tokens_a_word: float
) -> str:
    def length(text: str) -> int:
        return len(tokenizer.encode(text, bos=False))

    text = numbers.choice(words)
    # Encoding is what takes the time: nearly all that is missing at once, then nearly all of the rest.
    while (short := tokens - length(text)) > 2 * tokens_a_word:
        text += " " + " ".join(numbers.choice(words) for _ in range(max(1, int(0.9 * short / tokens_a_word))))
        while length(text) > tokens:
            text = text.rpartition(" ")[0]
    for _ in range(2000):
        missing = tokens - length(text)
        if missing == 0:
            return text
        if missing < 0:
            text = text.rpartition(" ")[0] or numbers.choice("abcdefgh")
            continue
        ending = " " + numbers.choice(words) if missing > 1 and numbers.random() < 0.5 else numbers.choice("abcdefgh.")
        if length(text + ending) <= tokens:
            text += ending
    raise UnusableInput(f"no text of exactly {tokens} tokens was found with this tokenizer; try another --tokens")


def prompt_file(texts: Sequence[str], tokens: int) -> str:
    """The text of a prompt file: one headed block a prompt."""
    return "".join(f"===== PROMPT {n:04d} | tokens={tokens} =====\n{text}\n\n" for n, text in enumerate(texts))
