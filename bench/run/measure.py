"""The timing loop: rounds of generation, clocked from outside, and the phases that they consist of."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llama.generation import Generation
from llama.llm import LLaMA
from wsm.engine.telemetry import Interval, PhaseStats
from wsm.plan.time import decode_work, prefill_work


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of every round are picked, and how many."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Round:
    """One generation, in seconds of the host's clock; ``steps`` are places in the endless pass order.

    Attributes:
        tokens_at: when each token had been read back; the first one closes ``first_token``.
        steps: at the start, at the end of the prefill, at the end.
        passes: begun since the model's start, at the same moments.
        complete_at_start: whether every resident was in its tier when the clock started.
    """

    generation: Generation
    start: float
    prefill_done: float
    tokens_at: tuple[float, ...]
    done: float
    steps: tuple[int, int, int]
    passes: tuple[int, int, int]
    complete_at_start: bool

    @property
    def prefill_ms(self) -> float:
        return (self.prefill_done - self.start) * 1e3

    @property
    def first_token_ms(self) -> float:
        """Sampling and read-back of token 1, whose logits the prefill made."""
        return (self.tokens_at[0] - self.prefill_done) * 1e3

    @property
    def decode_ms(self) -> float:
        return (self.done - self.prefill_done) * 1e3

    @property
    def pass_ms(self) -> list[float]:
        """Time of each decode pass, from token to token."""
        return [(later - earlier) * 1e3 for earlier, later in zip(self.tokens_at, self.tokens_at[1:], strict=False)]


class _Clock:
    """An observer of the generation loop."""

    def __init__(self, llm: LLaMA, on_token: Callable[[], None]) -> None:
        self._llm, self._on_token = llm, on_token
        self.at: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.passes: dict[str, int] = {}
        self.tokens_at: list[float] = []

    def __call__(self, mark: str) -> None:
        now = time.perf_counter()
        if mark == "token":
            self.tokens_at.append(now)
            self._on_token()
        elif mark != "pass":
            self.at[mark] = now
            self.passes[mark] = self._llm.kv.passes
            self.steps[mark] = self._llm.manager.next_step if self._llm.manager is not None else 0


def run_round(
    llm: LLaMA, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: Callable[[], None] = lambda: None
) -> Round:
    """Generate once, from an empty KV cache; ``on_token`` is called after each token of the batch."""
    complete = llm.manager.loaded() if llm.manager is not None else True
    clock = _Clock(llm, on_token)
    generation = llm.generate(
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        observer=clock,
    )
    return Round(
        generation=generation,
        start=clock.at["start"],
        prefill_done=clock.at["prefill_done"],
        tokens_at=tuple(clock.tokens_at),
        done=clock.at["done"],
        steps=(clock.steps["start"], clock.steps["prefill_done"], clock.steps["done"]),
        passes=(clock.passes["start"], clock.passes["prefill_done"], clock.passes["done"]),
        complete_at_start=complete,
    )


def warm_up(llm: LLaMA, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """One untimed round: the prefill and two decode passes."""
    run_round(llm, prompts, replace(sampling, max_new_tokens=min(3, sampling.max_new_tokens), ignore_eos=True))


def phases_of(llm: LLaMA, timed: Round, prompts: Sequence[Sequence[int]]) -> tuple[PhaseStats, PhaseStats]:
    """Prefill and decode of a round; to be asked when the device is idle and all rounds are over."""
    windows = (timed.start, timed.prefill_done), (timed.prefill_done, timed.done)
    spans = range(timed.steps[0], timed.steps[1]), range(timed.steps[1], timed.steps[2])
    passes = range(timed.passes[0], timed.passes[1]), range(timed.passes[1], timed.passes[2])
    rows = Counter[float](len(prompt) for prompt in prompts)
    itemsize = llm.inputs.dtype.itemsize
    works = (
        prefill_work(llm.config, rows, len(passes[0]), itemsize),
        decode_work(llm.config, rows, len(passes[1]), itemsize, llm.plan.inputs.kv_token_bytes),
    )
    prefill, decode = (
        replace(_phase(llm, name, window, steps, numbers), flops=int(work.flops), hbm_bytes=int(work.hbm_bytes))
        for name, window, steps, numbers, work in zip(("prefill", "decode"), windows, spans, passes, works, strict=True)
    )
    return prefill, decode


def _phase(llm: LLaMA, name: str, window: Interval, steps: range, passes: range) -> PhaseStats:
    return llm.telemetry.phase(name, window, steps if llm.manager is not None else range(0), passes)
