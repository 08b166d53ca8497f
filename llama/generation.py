"""Prefill, decode and sampling over any weight source: the one loop that the API and the benchmark share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.batch import decode_batch, prefill_batch
from llama.config import UnusableInput
from llama.kv_cache import KVCache
from llama.model import Transformer
from llama.sampling import check_sampling, sample

Observer = Callable[[str], None]
"""Called with "start", "pass" (before each pass), "prefill_done", "token" (after each token's read-back), "done"."""


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


@dataclass(frozen=True, slots=True)
class Generation:
    """New tokens of each row (a stop token ends a row and is counted), and the passes that they took."""

    tokens: list[list[int]]
    prefill_passes: int
    decode_passes: int


def _nothing(mark: str) -> None:
    """The observer of nobody."""


def generate(
    model: Transformer,
    kv: KVCache,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    observer: Observer = _nothing,
) -> Generation:
    """New tokens for every prompt (one row each).

    Token 1 comes from the prefill's last logits, so n tokens take n - 1 decode passes. Rows that ended keep their
    place in the batch, for fixed shapes, but their tokens are dropped.

    Raises:
        UnusableInput: for an empty prompt, one that ``kv`` has no room for, or impossible sampling options.
    """
    _check(kv, prompts, options)
    generator = torch.Generator(model.device).manual_seed(options.seed)
    observer("start")
    logits, waves = _prefill(model, kv, prompts, options, observer)
    _finish(model.device)
    observer("prefill_done")
    tokens: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    passes = 0
    while True:
        picked = sample(logits, temperature=options.temperature, top_p=options.top_p, generator=generator)
        for row, token in enumerate(picked.tolist()):
            if running[row]:
                tokens[row].append(token)
                ended = token in options.stop_ids and not options.ignore_eos
                running[row] = not ended and len(tokens[row]) < options.max_new_tokens
        observer("token")
        if not any(running):
            break
        observer("pass")
        logits = model.forward(
            decode_batch(picked, lengths, model.device), kv, chunk_tokens=options.chunk_tokens, logits="last"
        )
        lengths = [length + 1 for length in lengths]
        passes += 1
    observer("done")
    return Generation(tokens, waves, passes)


def _check(kv: KVCache, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> None:
    check_sampling(options.temperature, options.top_p)
    if options.max_new_tokens < 1:
        raise UnusableInput(f"--max-new-tokens must be 1 or more, not {options.max_new_tokens}")
    if not prompts or len(prompts) != kv.batch:
        raise UnusableInput(f"{len(prompts)} prompts for a KV cache of {kv.batch} rows")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UnusableInput(f"prompt {row} is empty")
        if len(prompt) + options.max_new_tokens > kv.tokens:
            raise UnusableInput(
                f"prompt {row} has {len(prompt)} tokens; with {options.max_new_tokens} new ones that is more "
                f"than the {kv.tokens} that the KV cache holds: raise --max-seq-len"
            )


def _prefill(
    model: Transformer, kv: KVCache, prompts: Sequence[Sequence[int]], options: GenerationOptions, observer: Observer
) -> tuple[Tensor, int]:
    """Last logits of every row, float32 ``[B, vocab]``; a wave of rows is one pass through all layers."""
    logits = []
    for first in range(0, len(prompts), options.wave_rows):
        rows = range(first, min(first + options.wave_rows, len(prompts)))
        observer("pass")
        batch = prefill_batch([prompts[row] for row in rows], rows, model.device)
        logits.append(model.forward(batch, kv, chunk_tokens=options.chunk_tokens, logits="last"))
    return torch.cat(logits), len(logits)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
