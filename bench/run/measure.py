"""The timing loop: rounds of generation, clocked from outside, and what each round's times and bytes come to."""

from __future__ import annotations

import statistics
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import msgspec

from bench.options.run_flags import RunOptions
from bench.result.fields import MOST_BELIEVED_PCT, ByPhase, believed
from bench.result.spread import statistic
from bench.result.types import METRICS, LinkRates, Metrics, Repeats, Statistics, Tpot
from bench.result.types_machine import LoadRate
from bench.result.types_phases import Busy, DecodedWeights, Idle, Phase, RankPhase, Stall, Traffic
from llama.generation import Generation
from llama.llm import LLaMA
from wsm.disk.checks import CheckCost, Checks
from wsm.engine.records import Interval, Transfer, moved_bytes
from wsm.engine.stretch import PhaseStats, Stretch
from wsm.layout.groups import KINDS
from wsm.plan.time import Bound, Ceiling, Estimate, Work, ceiling_of, decode_work, parts_ms, prefill_work
from wsm.store.packed_store import PackedStore

_MOVED_OVER = {"ssd": "ssd_read", "h2d": "weight_h2d", "d2h": "kv_d2h", "kv_read": "kv_read", "kv_write": "kv_write"}
LEAST_JUDGED_S = 0.02  # of a tier's moves: CUDA times an hour's run to 0.25 ms


@dataclass(frozen=True, slots=True)
class Round:
    """One generation, in seconds of the host's clock.

    ``tokens_at``: when each token had been read back. ``stretches``: what the prefill and the decode come to, known
    once all is still. ``checked``: what the checks of the store's bytes took meanwhile. ``complete_at_start``: whether
    every resident was in its tier when the clock started.
    """

    generation: Generation
    start: float
    prefill_done: float
    done: float
    tokens_at: Sequence[float]
    stretches: Sequence[Stretch]
    checked: CheckCost
    complete_at_start: bool

    @property
    def windows(self) -> dict[str, Interval]:
        """From when to when each phase went."""
        return {"prefill": (self.start, self.prefill_done), "decode": (self.prefill_done, self.done)}

    @property
    def total_tok_s(self) -> float:
        """Prompt tokens and new ones."""
        return (self.generation.prefill_tokens + self.generation.decode_tokens) / (self.done - self.start)

    @property
    def pass_ms(self) -> list[float]:
        """Time of each decode pass, from token to token."""
        return [(later - earlier) * 1e3 for earlier, later in pairwise(self.tokens_at)]


def checks_of(llm: LLaMA) -> Checks | None:
    """The checks of what comes from a packed store; None where nothing does."""
    source = llm.manager.source if llm.manager is not None else None
    return source.checks if isinstance(source, PackedStore) else None


def run_round(
    llm: LLaMA, prompts: Sequence[Sequence[int]], options: RunOptions, on_tokens: Callable[[int], None] = lambda n: None
) -> Round:
    """Generate once, from an empty KV cache; ``on_tokens`` is told after each pass how many a row took from it."""
    complete = llm.manager.tiers.loaded() if llm.manager is not None else True
    checks = checks_of(llm)
    checked_before = checks.cost if checks is not None else CheckCost()
    at: dict[str, float] = {}
    tokens_at, stretches, told = array("d"), list[Stretch](), 0

    def observe(mark: str) -> None:
        nonlocal told
        now = time.perf_counter()
        step = _next_step(llm)
        if mark == "token":
            tokens_at.append(now)
            # The last token of a row is not in its KV yet.
            made = 1 + max(kept - len(prompt) for kept, prompt in zip(llm.kv.lengths, prompts, strict=False))
            on_tokens(made - told)
            told = made
        elif mark == "queued":
            llm.telemetry.fold(step, llm.kv.passes)
        elif mark in ("start", "prefill_done", "done"):
            at[mark] = now
            records = options.trace is not None and mark != "done"
            stretches.append(llm.telemetry.begin(now, step, llm.kv.passes, records=records))

    generation = llm.generate(
        prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        ignore_eos=options.goes_on,
        observer=observe,
    )
    checked = checks.cost - checked_before if checks is not None else CheckCost()
    return Round(
        generation, **at, tokens_at=tokens_at, stretches=stretches[:2], checked=checked, complete_at_start=complete
    )


def _next_step(llm: LLaMA) -> int:
    """The place in the pass order that the computation has next; 0 where no weights are managed."""
    return llm.manager.tiers.next_step if llm.manager is not None else 0


def warm_up(
    llm: LLaMA, prompts: Sequence[Sequence[int]], options: RunOptions, on_tokens: Callable[[int], None], *, last: bool
) -> None:
    """One untimed round: the prefill and two decode passes. By the times of the ``last`` a draft settles its depth."""
    short = replace(options, max_new_tokens=warm_up_tokens(options), ignore_eos=True, trace=None)
    warm = run_round(llm, prompts, short, on_tokens)
    if last and llm.drafting is not None:
        llm.device.synchronize()
        llm.telemetry.fold(_next_step(llm), llm.kv.passes)  # what was copied ahead is of the next round
        with llm.device.current():
            llm.drafting.settle(llm.plan, warm.stretches[1].stats())


def warm_up_tokens(options: RunOptions) -> int:
    return min(3, options.max_new_tokens)


def prefill_place(llm: LLaMA, tokens: int) -> str:
    """Where a round is that has made so many ``tokens``: before the first in the prefill, and there in which layer."""
    if tokens:
        return ""
    if llm.manager is None or llm.manager.resident:
        return "prefill"
    layers = llm.config.n_layers
    return f"prefill, layer {llm.manager.tiers.next_step // len(KINDS) % layers + 1} of {layers}"


def median_round(rounds: Sequence[Round]) -> int:
    """The index of the round of median ``e2e_ms`` (the lower of two)."""
    order = sorted(range(len(rounds)), key=lambda i: metrics_of(rounds[i]).e2e_ms)
    return order[(len(order) - 1) // 2]


def forget_records(rounds: Sequence[Round], repeats: int) -> None:
    """Let go of the records of those rounds that cannot be of median time any more, of ``repeats`` in the end."""
    order = sorted(rounds, key=lambda timed: timed.done - timed.start)
    middle, to_come = (repeats - 1) // 2, repeats - len(rounds)
    for place, timed in enumerate(order):
        if not place <= middle <= place + to_come:
            for stretch in timed.stretches:
                stretch.records = None


# -- times


def metrics_of(timed: Round) -> Metrics:
    """The fixed times and rates of a round; token 1, whose logits the prefill made, takes sampling and read-back."""
    prefill_ms, decode_ms = ((end - start) * 1e3 for start, end in timed.windows.values())
    first_token_ms = (timed.tokens_at[0] - timed.prefill_done) * 1e3
    tokens, e2e_ms = timed.generation.decode_tokens, prefill_ms + decode_ms
    return Metrics(
        prefill_ms=prefill_ms,
        first_token_decode_ms=first_token_ms,
        ttft_ms=prefill_ms + first_token_ms,
        decode_ms=decode_ms,
        e2e_ms=e2e_ms,
        throughput_tok_s=tokens / (decode_ms / 1e3),
        end_to_end_tok_s=tokens / (e2e_ms / 1e3),
    )


def repeats_of(rounds: Sequence[Round]) -> Repeats:
    """Every round's metrics, and the spread of each."""
    raw = [metrics_of(timed) for timed in rounds]
    spread = {name: statistic([getattr(metrics, name) for metrics in raw]) for name in METRICS}
    return Repeats(n=len(raw), raw=raw, statistics=Statistics(**spread))


def tpot_of(pass_ms: Sequence[float]) -> Tpot | None:
    """Time of a decode pass; None without decode passes."""
    if not pass_ms:
        return None
    ordered, n = sorted(pass_ms), len(pass_ms)
    p50, p90, p99 = (ordered[-(-percent * n // 100) - 1] for percent in (50, 90, 99))
    return Tpot(mean=statistics.fmean(ordered), p50=p50, p90=p90, p99=p99, max=ordered[-1], n=n)


# -- bytes, and the floor under their time


def phases_of(
    llm: LLaMA,
    timed: Round,
    prompts: Sequence[Sequence[int]],
    ceilings: Mapping[str, Ceiling],
    predicted: Mapping[str, Estimate | None],
) -> ByPhase[Phase]:
    """Prefill and decode of a round; to be asked when the device is idle and all rounds are over."""
    rows = Counter[float](len(prompt) for prompt in prompts)
    itemsize, planned = llm.plan.bytes_a_weight, llm.plan.inputs
    prefill, decode = (stretch.stats() for stretch in timed.stretches)
    works = (
        prefill_work(llm.config, rows, prefill.passes, itemsize),
        decode_work(llm.config, rows, decode.passes, itemsize, planned.kv_token_bytes, planned.verify_rows),
    )
    found = {}
    for name, stats, work, stretch in zip(timed.windows, (prefill, decode), works, timed.stretches, strict=True):
        stats = replace(stats, flops=int(work.flops), hbm_bytes=int(work.hbm_bytes), whole=stretch.whole)
        found[name] = phase_of(stats, ceilings, predicted[name])
    return ByPhase(**found)


def phase_of(stats: PhaseStats, ceilings: Mapping[str, Ceiling], predicted: Estimate | None = None) -> Phase:
    """What a phase moved and waited for, beside its floor; ``predicted`` is one of its passes."""
    floor_ms, bound_by = floor_of(stats, ceilings)
    predicted = predicted if stats.passes else None
    spread = ceilings[ceiling_of(bound_by)].spread_pct if bound_by is not None else 0.0
    phase = Phase(
        wall_ms=stats.wall_ms,
        passes=stats.passes,
        bytes=Traffic(**stats.bytes),
        bytes_moved=Traffic(**stats.bytes_moved),
        busy_ms=Busy(**_from_0(stats.busy_ms)),
        stall_ms=Stall(**_from_0(stats.stall_ms)),
        idle_ms=Idle(**_from_0(stats.idle_ms)),
        flops=stats.flops,
        hbm_bytes=stats.hbm_bytes,
        decoded_weights=DecodedWeights(ms=stats.decoding_ms, bytes=stats.decoded_bytes),
        floor_ms=floor_ms,
        predicted_ms=predicted.ms * stats.passes if predicted is not None and predicted.steady else None,
        predicted_range_ms=None if predicted is None else [end * stats.passes for end in predicted[1:]],
        bound_by=bound_by,
        roofline_pct=None if floor_ms is None or stats.wall_ms == 0 else 100 * floor_ms / stats.wall_ms,
        ceiling_spread_pct=spread if spread > 5 else None,
    )
    return msgspec.structs.replace(phase, roofline_pct=None) if _tier_beats(phase, stats, ceilings) else phase


def _tier_beats(phase: Phase, stats: PhaseStats, ceilings: Mapping[str, Ceiling]) -> bool:
    """Whether the link or drive behind the floor was faster than its ceiling: by its busy time, and by whole moves."""
    # A move across an edge of the phase counts by its share of time, which is not always that of its bytes.
    whole = stats.whole.get(_MOVED_OVER.get(phase.bound_by or "", ""))
    busy_ms, floor_ms = phase.bound_busy_ms, phase.floor_ms
    if not whole or not busy_ms or floor_ms is None or whole.busy_s < LEAST_JUDGED_S:
        return False
    return min(whole.MBps / ceilings[str(phase.bound_by)].value, floor_ms / busy_ms) > MOST_BELIEVED_PCT / 100


def _from_0(times_ms: Mapping[str, float | None]) -> dict[str, float | None]:
    """Differences of sums may come to a little less than 0."""
    return {tier: None if ms is None else max(0.0, ms) for tier, ms in times_ms.items()}


def floor_of(stats: PhaseStats, ceilings: Mapping[str, Ceiling]) -> tuple[float | None, Bound | None]:
    """The shortest time that the bytes moved inside the phase and its operations allow, and what sets it.

    Of KV it counts what the passes used, if that is less: behind the last one more is on its way, and nobody waits.
    The link's rates beside a busy drive, ``h2d_with_ssd`` and ``h2d_with_kv``, are in the JSON for information: a floor
    may not be beaten.
    """
    moved = stats.bytes_moved
    kv = {tier: min(moved[tier], stats.bytes[tier]) for tier in ("kv_h2d", "kv_read")}
    work = Work(
        ssd_bytes=moved["ssd_read"],
        h2d_bytes=moved["weight_h2d"] + kv["kv_h2d"],
        d2h_bytes=moved["kv_d2h"],
        hbm_bytes=stats.hbm_bytes,
        flops=stats.flops,
        decoded_bytes=stats.decoded_bytes,
        kv_read_bytes=kv["kv_read"],
        kv_write_bytes=moved["kv_write"],
    )
    parts = parts_ms(work, {name: ceiling.value for name, ceiling in ceilings.items()})
    times = {bound: ms for bound, ms in parts.items() if ms is not None}
    if not times or len(times) < len(parts):
        return None, None
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def link_rates(phases: ByPhase[Phase] | ByPhase[RankPhase]) -> LinkRates:
    """Bytes over the time that the copies were busy, both phases together; None where nothing moved."""
    both = phases.prefill, phases.decode

    def rate(moved: str, busy: str) -> float | None:
        nbytes = sum(getattr(phase.bytes_moved, moved) for phase in both)
        busy_ms = sum(getattr(phase.busy_ms, busy) or 0.0 for phase in both)
        return nbytes / busy_ms / 1e3 if nbytes and busy_ms else None

    return LinkRates(
        weight_h2d_MBps=rate("weight_h2d", "h2d"),
        kv_h2d_MBps=rate("kv_h2d", "kv_h2d"),
        kv_d2h_MBps=rate("kv_d2h", "kv_d2h"),
    )


def load_rate(reads: Sequence[Transfer] | None, ceilings: Mapping[str, Ceiling]) -> LoadRate:
    """``load``, from the reads of residents; None without a manager.

    The rate counts all that was read meanwhile: the sweep that fills the residents takes streamed groups on its way.
    """
    residents = [t for t in reads or () if t.step is None]
    rate = None
    if reads is not None and residents:
        window = min(t.start for t in residents), max(t.end for t in residents)
        seconds = window[1] - window[0]
        rate = round(moved_bytes(reads, window)) / seconds / 1e6 if seconds else None
    return LoadRate(
        read_bytes=None if reads is None else sum(t.nbytes for t in residents),
        read_MBps=rate,
        ssd_pct=believed(100 * rate / ceilings["ssd"].value) if rate is not None and "ssd" in ceilings else None,
    )
