"""Prefill, decode and sampling over any weight source: the one loop that the API and the benchmark share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.batch import TokenBatch, decode_batch, prefill_batch
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.sampling import Sampling, check_sampling, sample
from wsm import stop
from wsm.errors import UnusableInput

Observer = Callable[[str], None]
"""Called with "start", "pass" (before each pass), "queued" (after it, while the device may still compute),
"prefill_done", "token" (after each token's read-back), "done".
"""


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to generate; ``chunk_tokens`` and ``wave_rows`` bound what a pass of the prefill computes at once."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: frozenset[int]
    ignore_eos: bool
    chunk_tokens: int
    wave_rows: int

    @property
    def sampling(self) -> Sampling:
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class Generation:
    """New tokens of each row (a stop token ends a row and is counted), and the passes that they took."""

    tokens: list[list[int]]
    prefill_tokens: int
    prefill_passes: int
    decode_passes: int
    texts: list[str] | None = None

    @property
    def decode_tokens(self) -> int:
        """New tokens of all rows; those of rows past their end do not count."""
        return sum(map(len, self.tokens))


@torch.inference_mode()
def generate(
    model: Transformer,
    kv: KVCache,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    observer: Observer = lambda mark: None,
) -> Generation:
    """New tokens for every prompt (one row each); ``kv`` is emptied first.

    Token 1 comes from the prefill's last logits, so n tokens take n - 1 decode passes. Rows that ended keep their
    place in the batch, for fixed shapes, but their tokens are dropped. UnusableInput for an empty prompt, one that
    ``kv`` has no room for, or impossible options.
    """
    _check(model, kv, prompts, options)
    kv.reset()
    stop_ids = frozenset[int]() if options.ignore_eos else options.stop_ids
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    if model.graphs is not None:
        longest = max(map(len, prompts))
        last = longest + options.max_new_tokens - 1
        model.graphs.prepare(model.layers, len(prompts), longest + 1, last, options.chunk_tokens)
    observer("start")
    logits, positions, waves = _prefill(model, kv, prompts, options, observer)
    places = torch.arange(len(prompts), device=model.device)
    if model.device.type == "cuda":
        torch.cuda.current_stream(model.device).synchronize()
    observer("prefill_done")
    batch: TokenBatch | None = None
    passes = 0
    while True:
        finite = torch.isfinite(logits).all()
        logits.masked_fill_(~finite, 0.0)  # a draw from anything else would be the device's own failure
        picked = sample(logits, places, positions, **options.sampling)
        for row, token in enumerate(_read_back(model, picked, finite)):
            if row in going:
                rows[row].append(token)
                if token in stop_ids or len(rows[row]) >= options.max_new_tokens:
                    going.remove(row)
                    kv.end_row(row)
        observer("token")
        stop.check()
        if not going:
            break
        observer("pass")
        batch = batch.followed_by(picked) if batch else decode_batch(picked, kv.lengths[: len(rows)], model.device)
        logits = model.forward(batch, kv, chunk_tokens=options.chunk_tokens, logits="last")
        positions = positions + 1
        observer("queued")
        passes += 1
    observer("done")
    return Generation(rows, sum(map(len, prompts)), waves, passes)


def _read_back(model: Transformer, picked: Tensor, finite: Tensor) -> list[int]:
    """The picked tokens on the host, in one copy with whether their logits were finite, else UnusableInput."""
    *tokens, sound = torch.cat((picked, finite.view(1).to(picked.dtype))).tolist()
    if not sound:
        raise UnusableInput(
            f"{model.config.name} gives logits that are not finite: its weights are damaged, or too large for the "
            "dtype; take the checkpoint again, or another --dtype"
        )
    return tokens


def _check(model: Transformer, kv: KVCache, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> None:
    check_sampling(options.temperature, options.top_p)
    for flag, value in (
        ("--max-new-tokens", options.max_new_tokens),
        ("--prefill-chunk-tokens", options.chunk_tokens),
        ("rows a wave", options.wave_rows),
    ):
        if value < 1:
            raise UnusableInput(f"{flag} must be 1 or more, not {value}")
    if not 0 < len(prompts) <= kv.batch:
        raise UnusableInput(f"{len(prompts)} prompts for a KV cache of {kv.batch} rows")
    room = min(kv.tokens, model.max_tokens)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UnusableInput(f"prompt {row} is empty")
        if len(prompt) + options.max_new_tokens > room:
            raise UnusableInput(
                f"prompt {row} has {len(prompt)} tokens; with {options.max_new_tokens} new ones that is more "
                f"than the {room} that the KV cache holds: raise --max-seq-len"
            )
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise UnusableInput(
                f"prompt {row} has token ids from {min(prompt)} to {max(prompt)}; {model.config.name} knows "
                f"0 to {model.vocab_size - 1}: use the tokenizer of this model"
            )


def _prefill(
    model: Transformer, kv: KVCache, prompts: Sequence[Sequence[int]], options: GenerationOptions, observer: Observer
) -> tuple[Tensor, Tensor, int]:
    """Last logits of every row, float32 ``[B, vocab]``, the positions of the tokens to come, int64 ``[B]``, and waves.

    A wave of rows is one pass through all layers.
    """
    logits, positions = [], []
    for first in range(0, len(prompts), options.wave_rows):
        rows = range(first, min(first + options.wave_rows, len(prompts)))
        observer("pass")
        batch = prefill_batch([prompts[row] for row in rows], rows, model.device)
        logits.append(model.forward(batch, kv, chunk_tokens=options.chunk_tokens, logits="last"))
        positions.append(batch.positions[batch.last] + 1)
        observer("queued")
    return torch.cat(logits), torch.cat(positions), len(logits)
