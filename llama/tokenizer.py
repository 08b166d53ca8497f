"""Text to token ids and back: Llama 3's tokenizer.model, Hugging Face's tokenizer.json, plain bytes."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import tiktoken

from llama.config import ModelConfig
from llama.files import AGAIN, read_json, refuse_pointer
from wsm.errors import UnusableInput


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer."""

    vocab_size: int
    """Ids run from 0 to this, exclusively; a model's embedding may be padded beyond it."""
    bos_id: int
    stop_ids: frozenset[int]

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Ids of ``text``, which may be of any length; with ``bos`` the beginning-of-text id comes first."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, without special tokens; ids of no token are skipped, broken UTF-8 is replaced."""


def load_tokenizer(directory: Path | None, config: ModelConfig) -> Tokenizer:
    """The tokenizer beside a checkpoint; without a directory (synthetic weights) the byte tokenizer.

    UnusableInput if there is none that can be read, or it does not fit ``config.vocab_size``.
    """
    if directory is None:
        return ByteTokenizer(config)
    if (directory / "tokenizer.json").is_file():
        return HFTokenizer(directory, config)
    if (directory / "tokenizer.model").is_file():
        return Llama3Tokenizer(directory / "tokenizer.model", config)
    if _json_if_any(directory / "tokenizer_config.json").get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer(config)
    raise UnusableInput(f"{directory} has neither tokenizer.json nor tokenizer.model; copy the model's tokenizer there")


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then the beginning and the end of a text; for models without a vocabulary."""

    vocab_size = 258
    bos_id = 256
    stop_ids = frozenset({257})

    def __init__(self, config: ModelConfig) -> None:
        if config.vocab_size < self.vocab_size:
            raise UnusableInput(
                f"the byte tokenizer needs a vocabulary of {self.vocab_size} ids; {config.name} has {config.vocab_size}"
            )

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [self.bos_id] * bos + list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")


SPECIAL_TOKENS = 256
_STOPS = (1, 8, 9)
"""Places of end_of_text, eom_id and eot_id among the special tokens; begin_of_text is the first."""
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 cuts a text before merging bytes (meta-llama/llama3, tokenizer.py)."""


class Llama3Tokenizer:
    """Llama 3's ``tokenizer.model``: lines of a base64 token and its rank, and 256 special tokens after them.

    Special tokens in a text are read as plain text, as Meta's own code does. UnusableInput for a damaged file,
    LLaMA 2's SentencePiece, or a size other than ``config.vocab_size``.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        ranks = _read_ranks(path)
        self.vocab_size = len(ranks) + SPECIAL_TOKENS
        if self.vocab_size != config.vocab_size:
            raise _wrong_size(path, self.vocab_size, config)
        self._encoding = tiktoken.Encoding(path.name, pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.bos_id = len(ranks)
        self.stop_ids = frozenset(len(ranks) + place for place in _STOPS)

    def encode(self, text: str, *, bos: bool) -> list[int]:
        pieces = map(self._encoding.encode_ordinary, digestible_pieces(text))
        return [self.bos_id] * bos + list(chain.from_iterable(pieces))

    def decode(self, ids: Iterable[int]) -> str:
        plain = [token for token in ids if 0 <= token < self.bos_id]
        return self._encoding.decode_bytes(plain).decode("utf-8", errors="replace")


MOST_CHARS, LONGEST_RUN = 400_000, 25_000
_RUN = re.compile(r"\s+|\S+")


def digestible_pieces(text: str) -> Iterator[str]:
    """Cuts where tiktoken would overflow or slow down: every 400 000 characters, and runs longer than 25 000.

    A run is of whitespace alone or of anything else alone. The limits are Meta's, so the ids are too.
    """
    for start in range(0, len(text), MOST_CHARS):
        chunk = text[start : start + MOST_CHARS]
        cuts = [cut for run in _RUN.finditer(chunk) for cut in range(run.start(), run.end(), LONGEST_RUN)[1:]]
        yield from (chunk[a:b] for a, b in zip([0, *cuts], [*cuts, len(chunk)], strict=True))


def _read_ranks(path: Path) -> dict[bytes, int]:
    refuse_pointer(path)
    content = path.read_bytes()
    if b"<unk>" in content[:256]:
        raise UnusableInput(
            f"{path} is a SentencePiece model (LLaMA 2), which is not read here; put tokenizer.json and "
            "tokenizer_config.json of the same model's Hugging Face release beside it"
        )
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UnusableInput(f"{path} is damaged (no lines of a base64 token and its rank); {AGAIN}") from error
    has_every_byte = all(bytes([byte]) in ranks for byte in range(256))
    if sorted(ranks.values()) != list(range(len(pairs))) or not has_every_byte:
        raise UnusableInput(f"{path} is damaged or cut short (tokens are missing or named twice); {AGAIN}")
    return ranks


class HFTokenizer:
    """Hugging Face's ``tokenizer.json``; begin and stop ids from the JSON files beside it, as transformers takes them.

    Special tokens in a text are recognised, as transformers does. UnusableInput for a damaged file, a size that does
    not fit ``config.vocab_size``, or no begin id.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        path = directory / "tokenizer.json"
        self._tokenizer = _open_hf(path)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Embeddings are often padded, to a multiple of 64 or so; a gap beyond 5 % is another model's tokenizer.
        if not 0.95 * config.vocab_size <= self.vocab_size <= config.vocab_size:
            raise _wrong_size(path, self.vocab_size, config)
        stops = self._special_ids(directory, "eos")
        # Models that mark only the end of a text use the same mark before the first one.
        begins = self._special_ids(directory, "bos") or stops
        if not begins:
            raise UnusableInput(
                f"{directory}: no file names the begin or the end of a text (bos_token_id, eos_token_id); put the "
                "model's tokenizer_config.json beside tokenizer.json"
            )
        self.bos_id, self.stop_ids = begins[0], frozenset(stops)
        if self.bos_id >= config.vocab_size:
            raise UnusableInput(
                f"{directory}: bos_token_id {self.bos_id} is no token of a vocabulary of {config.vocab_size}"
            )

    def _special_ids(self, directory: Path, role: str) -> list[int]:
        for file in ("generation_config.json", "config.json"):
            named = _json_if_any(directory / file).get(f"{role}_token_id")
            ids = named if isinstance(named, list) else [named]
            if found := [token for token in ids if isinstance(token, int) and token >= 0]:
                return found
        token = _json_if_any(directory / "tokenizer_config.json").get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        found_id = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
        return [] if found_id is None else [found_id]

    def encode(self, text: str, *, bos: bool) -> list[int]:
        # Half of a surrogate pair is no text that can be encoded.
        whole = text.encode("utf-8", errors="replace").decode("utf-8")
        ids: list[int] = self._tokenizer.encode(whole, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids

    def decode(self, ids: Iterable[int]) -> str:
        known = [token for token in ids if 0 <= token < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text


def _open_hf(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UnusableInput(f"{path} needs the tokenizers package: pip install tokenizers") from error
    refuse_pointer(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise UnusableInput(f"{path} is damaged, or newer than the tokenizers package ({error}); {AGAIN}") from error
    # Both may be left over in the file from training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json_if_any(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _wrong_size(path: Path, tokens: int, config: ModelConfig) -> UnusableInput:
    return UnusableInput(
        f"{path} has {tokens} tokens, but the model's vocabulary has {config.vocab_size}: it is another model's "
        "tokenizer; take the one that came with these weights"
    )
