"""Text to token ids and back: Llama 3's tokenizer.model, Hugging Face's tokenizer.json, plain bytes."""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tiktoken

from llama.config import ModelConfig
from llama.files import AGAIN, read_json, refuse_pointer
from llama.splits import LLAMA3_SPLIT, digestible_pieces
from wsm.disk.files import read_file
from wsm.errors import UnusableInput
from wsm.words import counted, plural

if TYPE_CHECKING:
    from llama.checkpoint.gguf_vocabulary import Vocabulary


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer."""

    vocab_size: int
    """Ids run from 0 to this, exclusively; a model's embedding may be padded beyond it."""
    prefix: tuple[int, ...]
    """Special ids that belong before a text, often the beginning of text, often none."""
    suffix: tuple[int, ...]
    """Special ids that belong after a text, mostly none."""
    stop_ids: frozenset[int]
    warnings: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, which may be of any length, without prefix and suffix; UnusableInput if it has none here."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, without special tokens; ids of no token are skipped, broken UTF-8 is replaced."""


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt, prefix and suffix around them once, also where the text itself begins or ends with them."""
    prefix, suffix, ids = list(tokenizer.prefix), list(tokenizer.suffix), tokenizer.encode(text)
    if ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    if suffix and ids[-len(suffix) :] == suffix:
        ids = ids[: -len(suffix)]
    return [*prefix, *ids, *suffix]


def keep_last(tokenizer: Tokenizer, prompt: Sequence[int], most: int) -> list[int]:
    """A prompt of :func:`encode_prompt` cut to ``most`` tokens: prefix, its last ones, suffix, as transformers has it.

    UnusableInput if there is not even room for prefix and suffix.
    """
    if len(prompt) <= most:
        return list(prompt)
    before, after = len(tokenizer.prefix), len(tokenizer.suffix)
    if most < before + after:
        raise UnusableInput(
            f"a prompt has room for {counted(most, 'token')}, but the model's tokenizer puts "
            f"{before + after} special {plural(before + after, 'one')} around it; raise --max-seq-len or lower "
            "--max-new-tokens"
        )
    end = len(prompt) - after
    return [*prompt[:before], *prompt[end - (most - before - after) : end], *prompt[end:]]


def load_tokenizer(directory: Path | None, config: ModelConfig, vocabulary: Vocabulary | None = None) -> Tokenizer:
    """The tokenizer beside a checkpoint; without a directory (synthetic weights) the byte tokenizer.

    ``vocabulary``, in the weights' own file, counts before what is beside it, but for tokenizer.json. UnusableInput if
    there is none that can be read, or it does not fit ``config.vocab_size``.
    """
    if directory is None:
        return ByteTokenizer(config)
    if (directory / "tokenizer.json").exists():
        return HFTokenizer(directory, config)
    if vocabulary is not None:
        return GGUFTokenizer(vocabulary, config)
    if (directory / "tokenizer.model").exists():
        return Llama3Tokenizer(directory / "tokenizer.model", config)
    if _json_if_any(directory / "tokenizer_config.json").get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer(config)
    raise UnusableInput(f"{directory} has neither tokenizer.json nor tokenizer.model; copy the model's tokenizer there")


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then the beginning and the end of a text; for models without a vocabulary."""

    vocab_size = 258
    prefix: tuple[int, ...] = (256,)
    suffix: tuple[int, ...] = ()
    stop_ids = frozenset({257})
    warnings: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig) -> None:
        if config.vocab_size < self.vocab_size:
            raise UnusableInput(
                f"the byte tokenizer needs a vocabulary of {self.vocab_size} ids; {config.name} has {config.vocab_size}"
            )

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")


SPECIAL_TOKENS = 256
_BEGIN = "<|begin_of_text|>"
_STOPS = (1, 8, 9)
"""Places of end_of_text, eom_id and eot_id among the special tokens; begin_of_text is the first."""


class Llama3Tokenizer:
    """Llama 3's ``tokenizer.model``: lines of a base64 token and its rank, and 256 special tokens after them.

    As in Meta's own code begin_of_text goes before a text, and special tokens inside one are read as plain text; only
    a text that begins with ``<|begin_of_text|>`` already is not given another. UnusableInput for a damaged file,
    LLaMA 2's SentencePiece, or a size other than ``config.vocab_size``.
    """

    suffix: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._path, ranks = path, _read_ranks(path)
        self.vocab_size = len(ranks) + SPECIAL_TOKENS
        if self.vocab_size != config.vocab_size:
            raise _wrong_size(path, self.vocab_size, config)
        self._encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self._plain_ids = len(ranks)
        self.prefix: tuple[int, ...] = (len(ranks),)
        self.stop_ids = frozenset(len(ranks) + place for place in _STOPS)

    def encode(self, text: str) -> list[int]:
        with _explained(f"{self._path} cannot cut this text"):
            pieces = map(self._encoding.encode_ordinary, digestible_pieces(text.removeprefix(_BEGIN)))
            return list(chain.from_iterable(pieces))

    def decode(self, ids: Iterable[int]) -> str:
        plain = [token for token in ids if 0 <= token < self._plain_ids]
        return self._encoding.decode_bytes(plain).decode("utf-8", errors="replace")


def _read_ranks(path: Path) -> dict[bytes, int]:
    refuse_pointer(path)
    content = read_file(path)
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
    """Hugging Face's ``tokenizer.json``; stop ids from the JSON files beside it, as transformers takes them.

    Its own post-processor says which special ids belong around a text, and ``add_bos_token`` in tokenizer_config.json
    does not: so transformers 5 has it wherever there is a tokenizer.json. Special tokens in a text are recognised.
    UnusableInput for a damaged file, or a size that is another model's.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._take(directory / "tokenizer.json", _open_hf, config)
        self.stop_ids = frozenset(stop_ids_named(directory, config) or self._named_stop(directory))

    def _take(self, path: Path, read: Callable[[Path], Any], config: ModelConfig) -> None:
        try:
            import tokenizers  # noqa: F401
        except ImportError as error:
            raise UnusableInput(f"{path} needs the tokenizers package: pip install tokenizers") from error
        self._path, self._tokenizer, self._embedded = path, read(path), config.vocab_size
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Embeddings are often padded, to a multiple of 64 or so, and now and then a token was added that has no place
        # in them; a gap beyond that is another model's tokenizer.
        beyond = self.vocab_size - config.vocab_size
        if beyond > max(MOST_BEYOND, 0.05 * config.vocab_size) or self.vocab_size < 0.95 * config.vocab_size:
            raise _wrong_size(path, self.vocab_size, config)
        self.prefix, self.suffix = self._special_around()
        self.warnings: tuple[str, ...] = (_tokens_beyond(path, beyond, config),) if beyond > 0 else ()

    def _special_around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the post-processor puts before and after a text."""
        with _explained(f"{self._path}: its rules cannot cut a text", AGAIN):
            whole, bare = (self._tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
        mask = whole.special_tokens_mask
        before = mask.index(0) if 0 in mask else len(mask)
        prefix, suffix = whole.ids[:before], whole.ids[before + len(bare.ids) :]
        if whole.ids != [*prefix, *bare.ids, *suffix]:
            raise UnusableInput(f"{self._path}: its post-processor does more than put tokens around a text; {AGAIN}")
        self._check_embedded([*prefix, *suffix])
        return tuple(prefix), tuple(suffix)

    def _check_embedded(self, ids: Sequence[int]) -> None:
        if beyond := [token for token in ids if token >= self._embedded]:
            name = self._tokenizer.id_to_token(beyond[0])
            raise UnusableInput(
                f"{self._path} gives {name!r} the id {beyond[0]}, for which the model has no embedding (it has "
                f"{self._embedded}): leave that token out, or take the tokenizer that came with these weights"
            )

    def _named_stop(self, directory: Path) -> list[int]:
        token = _json_if_any(directory / "tokenizer_config.json").get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        found_id = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
        return [] if found_id is None else [found_id]

    def encode(self, text: str) -> list[int]:
        # Half of a surrogate pair is no text that can be encoded.
        whole = text.encode("utf-8", errors="replace").decode("utf-8")
        with _explained(f"{self._path}: its rules cannot cut this text"):
            ids: list[int] = self._tokenizer.encode(whole, add_special_tokens=False).ids
        self._check_embedded(ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        known = [token for token in ids if 0 <= token < self.vocab_size]
        with _explained(f"{self._path}: its rules cannot join these tokens"):
            text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text


class GGUFTokenizer(HFTokenizer):
    """The vocabulary of a GGUF file; stop ids are those that it names."""

    def __init__(self, vocabulary: Vocabulary, config: ModelConfig) -> None:
        self._take(vocabulary.path, lambda path: _built(vocabulary), config)
        self.stop_ids = vocabulary.stop_ids


def _built(vocabulary: Vocabulary) -> Any:
    with _explained(f"{vocabulary.path}: its vocabulary contradicts itself", AGAIN):
        return vocabulary.tokenizer()


MOST_BEYOND = 256
"""Tokens that a tokenizer may have beyond the embedding, in a small vocabulary; in a large one 5 %."""


def _tokens_beyond(path: Path, beyond: int, config: ModelConfig) -> str:
    return (
        f"{path} has {counted(beyond, 'token')} beyond the {config.vocab_size} of the model's embedding: a prompt "
        "with such a token is refused"
    )


def stop_ids_named(directory: Path, config: ModelConfig) -> list[int]:
    """The ids that end a text, by Hugging Face's JSON files alone; none where they name none."""
    for file in ("generation_config.json", "config.json"):
        named = _json_if_any(directory / file).get("eos_token_id")
        ids = named if isinstance(named, list) else [named]
        if found := [token for token in ids if type(token) is int and 0 <= token < config.vocab_size]:
            return found
    return []


@contextlib.contextmanager
def _explained(what: str, mend: str = "change the text, or take the model's original tokenizer") -> Iterator[None]:
    """UnusableInput for what a tokenizer's compiled code raises; its panics are no Exceptions."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UnusableInput(f"{what} ({reason}); {mend}") from error
        raise


def _open_hf(path: Path) -> Any:
    import tokenizers

    refuse_pointer(path)
    content = read_file(path)
    with _explained(f"{path} is damaged, or newer than the tokenizers package", AGAIN):
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # Both may be left over in the file from training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _json_if_any(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _wrong_size(path: Path, tokens: int, config: ModelConfig) -> UnusableInput:
    return UnusableInput(
        f"{path} has {tokens} tokens, but the model's vocabulary has {config.vocab_size}: it is another model's "
        "tokenizer; take the one that came with these weights"
    )
