"""A GGUF file's tokenizer: the vocabulary in its metadata, and the ``tokenizers`` object that it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from llama.files import AGAIN
from llama.splits import LLAMA3_SPLIT
from wsm.errors import UnusableInput

_MODEL = "tokenizer.ggml.model"
_LLAMA3, _SMOLLM = "llama-bpe", "smollm"
_LLAMA3_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_SPM_IDS = {"bos": 1, "eos": 2}
"""Where a SentencePiece vocabulary names none, as llama.cpp has it."""
BESIDE = "put the model's tokenizer.json beside it"
STOPS = ("eos", "eot", "eom")
"""Ends of a text, of a turn and of a message: ``tokenizer.ggml.…_token_id``."""
MOST_PIECE, MOST_PIECES = 512, 1 << 23
"""Characters of a SentencePiece token, and of all together: what is joined is found by cutting each anywhere."""
_SPACE = "\u2581"
"""SentencePiece's sign for a space."""


class TokenType(IntEnum):
    """As ggml numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """``tokenizer.*`` of a file: tokens by id, with their types; ``scores`` (SentencePiece) or ``merges`` (BPE).

    ``prefix`` and ``suffix`` belong around a text. UnusableInput for what contradicts itself, or runs not here.
    """

    path: Path
    pre: str | None
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    stop_ids: frozenset[int]
    add_space_prefix: bool

    def of_type(self, kind: TokenType) -> list[str]:
        """The tokens of a type."""
        return [token for token, found in zip(self.tokens, self.types, strict=True) if found == kind]

    def tokenizer(self) -> Any:
        """A ``tokenizers.Tokenizer`` that gives the ids that llama.cpp gives."""
        import tokenizers
        from tokenizers import AddedToken, processors

        if self.pre is not None:
            made = tokenizers.Tokenizer(self._bpe())
            self._cut_as_bpe(made)
        else:
            made = tokenizers.Tokenizer(self._sentencepiece())
            self._cut_as_sentencepiece(made)
        special = [AddedToken(token, normalized=False, special=True) for token in self.of_type(TokenType.CONTROL)]
        own = [AddedToken(token, normalized=False) for token in self.of_type(TokenType.USER_DEFINED)]
        made.add_special_tokens(special)
        made.add_tokens(own)
        around = {self.tokens[token]: token for token in (*self.prefix, *self.suffix)}
        made.post_processor = processors.TemplateProcessing(
            single=[*(self.tokens[t] for t in self.prefix), "$A", *(self.tokens[t] for t in self.suffix)],
            special_tokens=list(around.items()),
        )
        return made

    def _bpe(self) -> Any:
        from tokenizers.models import BPE

        ids = {token: number for number, token in enumerate(self.tokens)}
        return BPE(ids, list(self.merges), ignore_merges=self.pre == _LLAMA3)

    def _cut_as_bpe(self, made: Any) -> None:
        from tokenizers import Regex, decoders, pre_tokenizers

        first: Any
        if self.pre == _LLAMA3:
            first = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
        else:  # each digit by itself, and the rest as GPT-2 does
            first = pre_tokenizers.Digits(individual_digits=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pre == _SMOLLM)
        made.pre_tokenizer = pre_tokenizers.Sequence([first, to_bytes])
        made.decoder = decoders.ByteLevel()

    def _sentencepiece(self) -> Any:
        """SentencePiece joins the neighbours that make the token of the best score: merges in the order of scores."""
        from tokenizers.models import BPE

        ids = {token: number for number, token in enumerate(self.tokens)}
        joined = {
            token: self.scores[number]
            for token, number in ids.items()
            if self.types[number] in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
        }
        pairs = [
            (-score, token[:cut], token[cut:])
            for token, score in joined.items()
            for cut in range(1, len(token))
            if token[:cut] in joined and token[cut:] in joined
        ]
        pairs.sort(key=lambda pair: (pair[0], len(pair[1])))
        unknown = next(iter(self.of_type(TokenType.UNKNOWN)), None)
        merges = [(left, right) for _, left, right in pairs]
        return BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)

    def _cut_as_sentencepiece(self, made: Any) -> None:
        from tokenizers import decoders, normalizers

        before = [normalizers.Prepend(_SPACE)] if self.add_space_prefix else []
        made.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
        parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if before else [])])

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: Path) -> Vocabulary | None:
        """None where the file holds no vocabulary, and where it says so, as llama.cpp does."""
        return _Read(metadata, path).vocabulary() if metadata.get(_MODEL, "no_vocab") != "no_vocab" else None


class _Read:
    """The metadata under ``tokenizer.``, each field checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata, self._path = metadata, path
        self._tokens = self._list("tokens", str)

    def vocabulary(self) -> Vocabulary:
        model, tokens = self._metadata[_MODEL], self._tokens
        if model not in ("gpt2", "llama"):
            raise self._refused(
                f"a tokenizer of model {model!r:.40}, which is not read here; gpt2 (BPE) and llama are", BESIDE
            )
        if len(set(tokens)) != len(tokens) or not all(tokens):
            raise self._refused("a token that comes twice, or is empty")
        bpe = model == "gpt2"
        pre = self._pre() if bpe else None
        types = self._list("token_type", int, len(tokens), TokenType.NORMAL)
        scores = self._list("scores", float, len(tokens), None if not bpe else 0.0)
        if not bpe and self._flag("remove_extra_whitespaces", False):
            raise self._refused("a tokenizer that removes spaces, which is not done here", BESIDE)
        merges = [pair for text in (self._list("merges", str) if bpe else []) for pair in [self._pair(text)]]
        if not bpe and (max(map(len, tokens)) > MOST_PIECE or sum(map(len, tokens)) > MOST_PIECES):
            raise self._refused(f"a token of more than {MOST_PIECE} characters, or {MOST_PIECES} in all")
        defaults = {} if bpe else _SPM_IDS
        begin = self._around("bos", defaults) if self._flag("add_bos_token", pre in (None, _LLAMA3)) else ()
        end = self._around("eos", defaults) if self._flag("add_eos_token", False) else ()
        named = {self._id(which, defaults) for which in STOPS}
        if pre == _LLAMA3:
            named |= {number for number, token in enumerate(tokens) if token in _LLAMA3_STOPS}
        return Vocabulary(
            self._path,
            pre,
            tokens,
            types,
            scores,
            merges,
            prefix=begin,
            suffix=end,
            stop_ids=frozenset(token for token in named if token is not None),
            add_space_prefix=self._flag("add_space_prefix", not bpe),
        )

    def _pre(self) -> str:
        pre = self._metadata.get("tokenizer.ggml.pre")
        if pre not in (_LLAMA3, _SMOLLM):
            raise self._refused(
                f"a pre-tokenizer {pre!r:.40}, which is not read here; {_LLAMA3} and {_SMOLLM} are", BESIDE
            )
        return str(pre)

    def _pair(self, text: str) -> tuple[str, str]:
        left, space, right = text.partition(" ")
        if not (left and space and right) or " " in right:
            raise self._refused(f"a merge that is no pair of tokens: {text!r:.40}")
        return left, right

    def _list(self, field: str, kind: type, length: int | None = None, default: Any = None) -> list[Any]:
        found = self._metadata.get(f"tokenizer.ggml.{field}")
        if found is None and default is not None and length is not None:
            return [default] * length
        if not isinstance(found, list) or not all(type(item) is kind for item in found):
            raise self._refused(f"no list of {kind.__name__} as tokenizer.ggml.{field}")
        if length is not None and len(found) != length:
            raise self._refused(f"{len(found)} of tokenizer.ggml.{field} for {length} tokens")
        return found

    def _around(self, which: str, defaults: Mapping[str, int]) -> tuple[int]:
        """The id that belongs before or behind a text."""
        if (found := self._id(which, defaults)) is None:
            raise self._refused(f"a tokenizer that puts {which.upper()} around a text, and no id of it", BESIDE)
        return (found,)

    def _id(self, which: str, defaults: Mapping[str, int]) -> int | None:
        found = self._metadata.get(f"tokenizer.ggml.{which}_token_id", defaults.get(which))
        if found is not None and not (type(found) is int and 0 <= found < len(self._tokens)):
            raise self._refused(f"{found!r:.40} as tokenizer.ggml.{which}_token_id, which is no token's id")
        return found

    def _flag(self, field: str, default: bool) -> bool:
        found = self._metadata.get(f"tokenizer.ggml.{field}", default)
        if not isinstance(found, bool):
            raise self._refused(f"{found!r:.40} as tokenizer.ggml.{field}, not true or false")
        return found

    def _refused(self, what: str, mend: str = AGAIN) -> UnusableInput:
        return UnusableInput(f"{self._path} holds {what}; {mend}")
