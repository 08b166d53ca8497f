"""Prefill, decode and sampling over any weight source: the one loop that the API and the benchmark share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.batch import prefill_batch, waves
from llama.decoding import Decoder, Decoding, New, NodePasses, TokenPasses
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.sampling import Sampling, check_sampling
from llama.speculation.draft import Draft
from wsm import stop
from wsm.errors import UnusableInput
from wsm.words import counted

Observer = Callable[[str], None]
"""Called with "start", "pass" (before each pass), "queued" (after it, while the device may still compute),
"prefill_done", "token" (after each read-back), "done".
"""


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to generate; ``chunk_tokens`` and ``wave_rows`` bound what a pass of the prefill computes at once.

    ``verify_rows`` are the nodes of a row in every decode pass.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: frozenset[int]
    ignore_eos: bool
    chunk_tokens: int
    wave_rows: int
    verify_rows: int = 1

    @property
    def sampling(self) -> Sampling:
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class Generation:
    """New tokens of each row (a stop token ends a row and is counted), and the passes that they took.

    ``accepted`` has, of each row, how many it took from each decode pass until its end. ``margins``: of each token how
    far its logit was above the largest other; empty where a row has one node, and above temperature 0.
    """

    tokens: list[list[int]]
    prefill_tokens: int
    prefill_passes: int
    decode_passes: int
    texts: list[str] | None = None
    accepted: list[list[int]] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)

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
    draft: Draft | None = None,
) -> Generation:
    """New tokens for every prompt (one row each); ``kv`` is emptied first.

    Token 1 comes from the prefill's last logits. Of one node a row n tokens take n - 1 decode passes; of more, fewer
    where a ``draft`` proposes what the model draws, and the tokens are those without it. Rows that ended keep their
    place in the batch, for fixed shapes, but their tokens are dropped. UnusableInput for an empty prompt, one that
    ``kv`` has no room for, or impossible options.
    """
    _check(model, kv, prompts, options, draft)
    if draft is not None and draft.nodes != options.verify_rows:
        raise ValueError(f"a draft of {draft.nodes} nodes a row, where {options.verify_rows} are verified")
    kv.reset()
    rows = _Rows(kv, options, len(prompts))
    in_nodes = options.verify_rows > 1
    if model.graphs is not None and not in_nodes:
        longest = max(map(len, prompts))
        last = longest + options.max_new_tokens - 1
        model.graphs.prepare(model.layers, len(prompts), longest + 1, last, options.chunk_tokens)
    if draft is not None:
        draft.prepare(len(prompts))
    _wait_for(model.device)  # for the tree that the generation before drafted last, which is not this one's time
    observer("start")
    logits, positions, prefill_passes = _prefill(model, kv, prompts, options, observer)
    if draft is not None:
        draft.prefill(prompts)
    _wait_for(model.device)
    observer("prefill_done")
    decoding = Decoding(model, kv, options.sampling, options.chunk_tokens, observer)
    decoder: Decoder = TokenPasses(decoding, positions)
    if in_nodes:
        decoder = NodePasses(decoding, positions, options.verify_rows, options.max_new_tokens, draft)
    rows.take(decoder.first(logits))
    observer("token")
    stop.check()
    while rows.going:
        rows.take_pass(decoder.next())
        observer("token")
        stop.check()
    observer("done")
    margins = rows.margins if any(rows.margins) else []
    prompt_tokens = sum(map(len, prompts))
    return Generation(rows.tokens, prompt_tokens, prefill_passes, rows.passes, accepted=rows.accepted, margins=margins)


def _wait_for(device: torch.device) -> None:
    """Until all that is queued for the computation on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class _Rows:
    """What is kept of each row: its new tokens, up to its end, their margins, and how many came from each pass."""

    def __init__(self, kv: KVCache, options: GenerationOptions, count: int) -> None:
        self._kv, self._most = kv, options.max_new_tokens
        self._stop_ids = frozenset[int]() if options.ignore_eos else options.stop_ids
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.margins: list[list[float]] = [[] for _ in range(count)]
        self.accepted: list[list[int]] = [[] for _ in range(count)]
        self.going = set(range(count))
        self.passes = 0

    def take(self, new: New) -> dict[int, int]:
        """New tokens of each row, of which those behind its end are dropped; how many each row that goes on took."""
        taken = dict[int, int]()
        for row in sorted(self.going):
            before = len(self.tokens[row])
            for token in new.tokens[row]:
                self.tokens[row].append(token)
                if token in self._stop_ids or len(self.tokens[row]) >= self._most:
                    self.going.remove(row)
                    self._kv.end_row(row)
                    break
            taken[row] = len(self.tokens[row]) - before
            if new.margins:
                self.margins[row] += new.margins[row][: taken[row]]
        return taken

    def take_pass(self, new: New) -> None:
        """Those of a decode pass."""
        self.passes += 1
        for row, count in self.take(new).items():
            self.accepted[row].append(count)


def _check(
    model: Transformer,
    kv: KVCache,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    draft: Draft | None,
) -> None:
    check_sampling(options.temperature, options.top_p)
    for flag, value in (
        ("--max-new-tokens", options.max_new_tokens),
        ("--prefill-chunk-tokens", options.chunk_tokens),
        ("rows a wave", options.wave_rows),
        ("--verify-rows", options.verify_rows),
    ):
        if value < 1:
            raise UnusableInput(f"{flag} must be 1 or more, not {value}")
    if not 0 < len(prompts) <= kv.batch:
        raise UnusableInput(f"{counted(len(prompts), 'prompt')} for a KV cache of {counted(kv.batch, 'row')}")
    room = min(kv.tokens - (options.verify_rows - 1), model.max_tokens)
    room = room if draft is None else min(room, draft.room)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UnusableInput(f"prompt {row} is empty")
        if len(prompt) + options.max_new_tokens > room:
            raise UnusableInput(
                f"prompt {row} has {counted(len(prompt), 'token')}; with {options.max_new_tokens} new that is more "
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
    for rows in waves(len(prompts), options.wave_rows):
        observer("pass")
        batch = prefill_batch([prompts[row] for row in rows], rows, model.device)
        logits.append(model.forward(batch, kv, chunk_tokens=options.chunk_tokens, logits="last"))
        positions.append(batch.positions[batch.last] + 1)
        observer("queued")
    return torch.cat(logits), torch.cat(positions), len(logits)
