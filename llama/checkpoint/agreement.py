"""A pair of models of known agreement: a target whose next token is known, and a draft that is right so often.

Random models agree on nothing, and real weights of 70B are not at hand everywhere. Here row π(t) of the head is row t
of the embedding, and the embedding is so large that what the layers add does not matter: after t comes π(t). All
tokens stand on one circle, and π steps along it. The draft steps along another circle for some tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint.synthetic import BLOCK_VALUES, SyntheticCheckpoint
from llama.config import ModelConfig
from llama.names import EMBEDDING, Cut
from wsm.layout.model import SourceFile

OUTWEIGHS = 4
"""How many times larger than what all layers add together the embedding is."""
_SHARE_OF_FFN = 0.36
"""Mean square of silu(a) * b, for a and b normal of variance 1."""
_STRETCH = 64
"""Tokens of the circle of which a stretch has its share of wrong guesses: so every run of 256 tokens has it, too."""
_ROWS = 64
_SEED = 20_000
_LEAST, _MOST, _APART = 0.01, 0.95, 4


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often a draft's first choice is the target's token, and how often its second is; shares of all tokens."""

    agree: float
    second: float = 0.0

    @property
    def believed(self) -> tuple[float, float]:
        """The probabilities that the draft gives its two choices: the shares, but never 0 or 1, and well apart.

        Rows of the vocabulary are not quite at right angles: closer choices would now and then change places.
        """
        second = min(max(self.second, _LEAST), _MOST / (1 + _APART))
        return min(max(self.agree, _APART * second), _MOST - second), second


def untied(config: ModelConfig, mark: str) -> ModelConfig:
    """The shape with a head of its own, for π lies in the difference between head and embedding."""
    return dataclasses.replace(config, name=f"{config.name}:{mark}", tied_embeddings=False)


class CycleTarget(SyntheticCheckpoint):
    """A synthetic model that goes once round its whole vocabulary; the layers are a synthetic model's as always."""

    def __init__(self, config: ModelConfig, *, seed: int, dtype: torch.dtype, mark: str = "cycle") -> None:
        super().__init__(untied(config, mark), seed=seed, dtype=dtype)

    def sources(self) -> tuple[SourceFile, ...]:
        (plain,) = super().sources()
        recipe = f"{plain.digest} cycle 1 {self.embedding_scale}"
        return (dataclasses.replace(plain, digest=hashlib.sha256(recipe.encode()).hexdigest()[:32]),)

    @property
    def embedding_scale(self) -> float:
        """A power of two by which the embedding exceeds a plain synthetic model's, whose rows are of length 1.

        A layer adds to each channel of the residual some q_dim / dim from the attention and 0.36 ffn_dim / dim from
        the feed-forward block, in mean squares, as norms hand on channels of 1 and matrices have a variance of 1 / dim.
        """
        config = self.config
        wide = config.n_heads * config.head_dim + _SHARE_OF_FFN * config.ffn_dim
        added = math.sqrt(config.n_layers * wide / config.dim)
        return float(2.0 ** math.ceil(math.log2(OUTWEIGHS * added * math.sqrt(config.dim))))

    @cached_property
    def circle(self) -> Tensor:
        """int64 ``[vocab]``, all tokens in the order in which they follow each other; the same for every model."""
        return torch.randperm(self.config.vocab_size, generator=torch.Generator().manual_seed(_SEED))

    @cached_property
    def next_tokens(self) -> Tensor:
        """π, int64 ``[vocab]``: what comes after each token."""
        return _mapping(self.circle, self.circle.roll(-1))

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        if name == "output.weight":
            self._fill_head(out, cut)
        else:
            super().fill(name, out, cut)
            if name == f"{EMBEDDING}.weight":
                out.mul_(self.embedding_scale)

    def _fill_head(self, out: Tensor, cut: Cut) -> None:
        for into, rows in self._rows(_mapping(self.next_tokens), out, cut):
            into.copy_(rows)

    def _rows(self, tokens: Tensor, out: Tensor, cut: Cut) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of ``out [cut.rows, cut.columns]`` with the plain embedding's rows of these tokens, one for each row
        of the whole head; a part is small enough for a core's cache."""
        windows = self._block("matrix", out.dtype).as_strided((BLOCK_VALUES, cut.columns), (1, 1), cut.column)
        starts = self.start(f"{EMBEDDING}.weight") + tokens[cut.row : cut.row + cut.rows] * self.config.dim
        for into, begin in zip(out.split(_ROWS), starts.split(_ROWS), strict=True):
            yield into, F.embedding(begin % BLOCK_VALUES, windows)


class CycleDraft(CycleTarget):
    """A draft whose two likeliest tokens are the target's next one as often as ``agreement`` says.

    Its probabilities say so, too, of all tokens alike: a tree that grows by them is that of an honest draft.
    """

    def __init__(self, config: ModelConfig, agreement: Agreement, *, seed: int, dtype: torch.dtype) -> None:
        mark = f"agree={agreement.agree:g},second={agreement.second:g}"
        super().__init__(config, seed=seed, dtype=dtype, mark=mark)
        self.agreement = agreement

    @cached_property
    def choices(self) -> tuple[Tensor, Tensor]:
        """First and second choice after each token, two permutations of the vocabulary, int64 ``[vocab]``.

        Both give the right token for those that they are right for. The others hand theirs round among themselves,
        one place on for the first choice and one place back for the second, so that it is never right by chance.
        """
        first, second = _kinds(self.config.vocab_size, self.agreement)
        made = []
        for is_right, shift in ((first, -1), (second, 1)):
            others = self.circle[~is_right]
            tokens = torch.cat([self.circle[is_right], others])
            made.append(_mapping(tokens, self.next_tokens[torch.cat([self.circle[is_right], others.roll(shift)])]))
        return made[0], made[1]

    def realised(self, rows: Sequence[Sequence[int]]) -> Agreement | None:
        """The shares in a run's tokens, the first of each row being what the others follow; None without others."""
        before = torch.tensor([token for row in rows for token in row[:-1]], dtype=torch.int64)
        after = torch.tensor([token for row in rows for token in row[1:]], dtype=torch.int64)
        if not len(before):
            return None
        first, second = ((choice[before] == after).double().mean().item() for choice in self.choices)
        return Agreement(first, second)

    def _fill_head(self, out: Tensor, cut: Cut) -> None:
        """Row v: of the token whose first choice v is, and less of the one whose second choice it is."""
        (p1, p2), config = self.agreement.believed, self.config
        # A logit is the product of a row and a residual of length sqrt(dim); those of all other tokens are near 0.
        first = math.log(config.vocab_size * p1 / (1 - p1 - p2))
        second = first - math.log(p1 / p2)
        choices = (_mapping(choice) for choice in self.choices)
        parts = zip(*(self._rows(tokens, out, cut) for tokens in choices), strict=True)
        for (into, likely), (_, less) in parts:
            torch.mul(likely, first / math.sqrt(config.dim), out=into).add_(less, alpha=second / math.sqrt(config.dim))


def _mapping(tokens: Tensor, images: Tensor | None = None) -> Tensor:
    """int64 ``[vocab]`` that takes each of ``tokens``, a permutation, to its image: without images, to its place."""
    made = torch.empty_like(tokens)
    made[tokens] = torch.arange(len(tokens)) if images is None else images
    return made


def _kinds(vocab_size: int, agreement: Agreement) -> tuple[Tensor, Tensor]:
    """By places on the circle, whether the first and whether the second choice is right; both bool ``[vocab]``.

    Places are drawn within stretches, each of which has its share.
    """
    generator = torch.Generator().manual_seed(_SEED + 1)
    ends = torch.arange(0, vocab_size + _STRETCH, _STRETCH).clamp_(max=vocab_size)
    seconds = (ends * agreement.second).round().long().diff().tolist()
    wrongs = (ends * (1 - agreement.agree)).round().long().diff().tolist()
    first, second = torch.ones(vocab_size, dtype=torch.bool), torch.zeros(vocab_size, dtype=torch.bool)
    for begin, length, wrong, also in zip(ends.tolist(), ends.diff().tolist(), wrongs, seconds, strict=False):
        drawn = begin + torch.randperm(length, generator=generator)
        first[drawn[:wrong]] = False
        second[drawn[: min(also, wrong)]] = True
    return first, second
