"""What makes the figures of a run doubtful, a sentence each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch

from bench.result.types_machine import KV, BytesPerPass
from bench.result.types_phases import DecodedWeights, Phase
from wsm.engine.stretch import MoveRate, together
from wsm.plan.time import STEADY_PCT, Ceiling, Work, ceiling_of, parts_ms
from wsm.words import counted, plural

FEWEST_FOR_OUTLIER, FEWEST_FOR_TREND = 4, 5
OUTLIER_DEVIATIONS, OUTLIER_SHARE = 5.0, 0.05
TREND_SHARE, TREND_DEVIATIONS = 0.02, 1.96
_MAD_TO_STDEV = 1.4826
"""Of a normal distribution: its standard deviation over its median absolute deviation."""


def beaten_floors(phases: Mapping[str, Phase]) -> Iterator[str]:
    """A line for each phase that was faster than its floor by over 5 %: no floor may be, so its ceiling was wrong.

    So it was where the phase took longer, and the link or drive that its floor is of was busy for less than that.
    """
    for name, phase in phases.items():
        if phase.beats_floor and phase.floor_ms is not None:
            took = f"took {phase.wall_ms:.0f} ms, less than its floor of"
            if phase.wall_ms >= phase.floor_ms:
                took = f"{phase.bound_by} was busy for {phase.bound_busy_ms or 0:.0f} ms of it, less than the floor of"
            yield (
                f"{name}: {took} {phase.floor_ms:.0f} ms: the ceiling of "
                f"{phase.bound_by} was disturbed while it was measured (other work on the machine, or a device that "
                "varies), so roofline_pct is null; measure again on a quiet machine"
            )


def disturbed_ceilings(phases: Mapping[str, Phase]) -> Iterator[str]:
    """A line for each ceiling whose samples varied too much for the floor that it is behind: see ``STEADY_PCT``.

    Of a phase that beat its floor there is a line already.
    """
    behind = dict[tuple[str, float], list[str]]()
    for name, phase in phases.items():
        spread = phase.ceiling_spread_pct or 0.0
        if phase.bound_by is not None and spread > STEADY_PCT and not phase.beats_floor:
            behind.setdefault((ceiling_of(phase.bound_by), spread), []).append(name)
    for (ceiling, spread), names in behind.items():
        yield (
            f"{' and '.join(names)}: the ceiling of {ceiling}, behind "
            f"{plural(len(names), 'this floor', 'these floors')}, varied by {spread:.0f} % while it was measured (over "
            f"{STEADY_PCT:.0f} % is not steady), so floor_ms and roofline_pct are doubtful; measure again on a quiet "
            "machine"
        )


def plan_warnings(phases: Mapping[str, Phase], planned: BytesPerPass) -> Iterator[str]:
    """A line for each phase whose passes used other bytes than planned, by more than 1 %."""
    for name, phase in phases.items():
        for tier in ("ssd_read", "weight_h2d"):
            used, expected = getattr(phase.bytes, tier), getattr(planned, tier) * phase.passes
            if abs(used - expected) > 0.01 * max(expected, 1):
                yield (
                    f"{name}: {used / 1e6:.1f} MB of {tier} were used, {expected / 1e6:.1f} MB were planned: "
                    "paging did not go as planned"
                )


def prediction_warnings(phases: Mapping[str, Phase]) -> Iterator[str]:
    """A line for each phase that took over 5 % more or less than was predicted from the medians of the probe.

    The prediction is a steady pass's; what was staged before a phase or for the next one is counted as it moved.
    """
    for name, phase in phases.items():
        moved, used = phase.bytes_moved.weight_h2d, phase.bytes.weight_h2d
        expected_ms = (phase.predicted_ms or 0.0) * (moved / used if used else 1.0)
        if expected_ms and abs(phase.wall_ms - expected_ms) > 0.05 * expected_ms:
            yield (
                f"{name}: took {phase.wall_ms:.0f} ms, {expected_ms:.0f} were predicted: either the pass waited for "
                "more than bytes (see stall_ms), or the machine was not as fast as while it was probed (see the "
                "ceilings' spread), and roofline_pct is as doubtful"
            )


def drive_warnings(passes: Sequence[MoveRate]) -> list[str]:
    """A line where the drive's rate in the last third of the passes fell below four fifths of that in the first.

    Fewer than three reads in either say nothing.
    """
    third = len(passes) // 3
    first, last = map(together, (passes[:third], passes[len(passes) - third :]))
    if min(first.moves, last.moves) < 3 or last.MBps >= 0.8 * first.MBps:
        return []
    return [
        f"the drive slowed down in the run, from {first.MBps:.0f} to {last.MBps:.0f} MB/s: the ssd figures, and the "
        "floor where the SSD bounds it, are a mean of both; let it cool, or fill its cache less (trim it, leave room)"
    ]


def blocks_left_out(kv: KV) -> Iterator[str]:
    """That decode steps have not seen the whole context."""
    if not kv.exact:
        yield (
            f"decode steps attended over {math.floor(100 * kv.fraction_fetched)} % of the context that lies below the "
            f"GPU, {kv.topk_blk} blocks of 256 tokens at a time: tokens may differ from those of all; "
            "--topk-blk 0 takes all"
        )


def early_ends(tokens: Sequence[int], most: int) -> Iterator[str]:
    """A line where rows ended at a stop token; ``tokens`` are those of each row, ``most`` what was asked for."""
    early = sorted(count for count in tokens if count < most)
    if early:
        after = f"{early[0]}" if early[0] == early[-1] else f"{early[0]} to {early[-1]}"
        yield (
            f"{len(early)} of {counted(len(tokens), 'row')} ended at a stop token, after "
            f"{after} of {counted(most, 'token')}: to compare times, run to the full length with --ignore-eos"
        )


def steadiness_warnings(e2e_ms: Sequence[float]) -> list[str]:
    """A line for a first round that stands out, and one for rounds that grow or shrink one after the other."""
    outlier = _outlier_first(e2e_ms) if len(e2e_ms) >= FEWEST_FOR_OUTLIER else ()
    return [*outlier, *(_trend(e2e_ms) if len(e2e_ms) >= FEWEST_FOR_TREND else ())]


def _outlier_first(e2e_ms: Sequence[float]) -> Iterator[str]:
    """The first round against the others: off by over 5 % and by over 5 of their robust standard deviations."""
    first, rest = e2e_ms[0], e2e_ms[1:]
    middle = statistics.median(rest)
    deviation = _MAD_TO_STDEV * statistics.median(abs(sample - middle) for sample in rest)
    if abs(first - middle) > max(OUTLIER_DEVIATIONS * deviation, OUTLIER_SHARE * middle):
        why = "the machine was not warm; raise --warmup-rounds"
        if first < middle:
            why = "later rounds were slower, by heat or by other work on the machine; measure again, cooled and quiet"
        yield f"the first round took {first:.1f} ms, the median of the others is {middle:.1f} ms: {why}"


def _trend(e2e_ms: Sequence[float]) -> Iterator[str]:
    """Mann and Kendall's test at 5 %, and a change over all rounds (Theil and Sen's slope) above 2 %."""
    n = len(e2e_ms)
    pairs = [(j - i, e2e_ms[j] - e2e_ms[i]) for i in range(n) for j in range(i + 1, n)]
    balance = sum((change > 0) - (change < 0) for _, change in pairs)
    deviations = (abs(balance) - 1) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    change = statistics.median(change / distance for distance, change in pairs) * (n - 1)
    share = change / statistics.median(e2e_ms)
    if deviations >= TREND_DEVIATIONS and abs(share) >= TREND_SHARE:
        yield (
            f"e2e_ms {'rises' if share > 0 else 'falls'} by {100 * abs(share):.1f} % from the first to the last of {n} "
            "rounds: no steady state was reached; raise --warmup-rounds, and see whether the drive or the chip gets hot"
        )


def unmeasured(
    device: torch.device, ceilings: Mapping[str, Ceiling], phases: Mapping[str, Phase], *, no_probe: bool
) -> Iterator[str]:
    """Why figures are null or mean little."""
    unknown_floors = (_work_of(phase) for phase in phases.values() if phase.floor_ms is None)
    rates = {name: ceiling.value for name, ceiling in ceilings.items()}
    parts = (part for work in unknown_floors for part in parts_ms(work, rates).items())
    if lacking := [*dict.fromkeys(ceiling_of(bound) for bound, ms in parts if ms is None)]:
        what = f"no ceiling of {' and '.join(lacking)}" if ceilings else "no ceilings"
        unknown = "floor and roofline are not known"
        if no_probe:
            yield (
                f"{what} (--no-probe, and the cache has none of this model in this mode with these budgets, drives and "
                f"checks): {unknown}; run it once without --no-probe, on a quiet machine"
            )
        elif lacking == ["ssd"]:
            yield f"the SSD could not be probed in so little CPU memory: {unknown}"
        else:
            yield f"{what} could be measured: {unknown}"
    if device.type != "cuda":
        yield "the compute device is the CPU: GPU figures are null, and roofline_pct is informative only"


def _work_of(phase: Phase) -> Work:
    """What a phase moved, computed and decoded."""
    moved, decoded = phase.bytes_moved, phase.decoded_weights
    return Work(
        ssd_bytes=moved.ssd_read,
        h2d_bytes=moved.weight_h2d + moved.kv_h2d,
        d2h_bytes=moved.kv_d2h,
        hbm_bytes=phase.hbm_bytes,
        flops=phase.flops,
        decoded_bytes=decoded.bytes if isinstance(decoded, DecodedWeights) else 0,
        kv_read_bytes=moved.kv_read,
        kv_write_bytes=moved.kv_write,
    )
