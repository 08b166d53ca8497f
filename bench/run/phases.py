"""What a round's measurements say: metrics, phases, floors, and warnings about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.result.spread import statistic
from bench.result.types import METRICS
from bench.run.measure import Round
from wsm.engine.telemetry import Interval, PhaseStats, Transfer, merged, moved_bytes
from wsm.plan.ceilings import Ceiling
from wsm.plan.floor import Bound, Work, ceiling_of, parts_ms


def round_metrics(timed: Round) -> dict[str, Any]:
    """The fixed times and rates of a round."""
    tokens, prompt_tokens = timed.generation.decode_tokens, timed.generation.prefill_tokens
    decode_s = timed.decode_ms / 1e3
    e2e_s = (timed.prefill_ms + timed.decode_ms) / 1e3
    return {
        "prefill_tokens_total": prompt_tokens,
        "decode_tokens_total": tokens,
        "prefill_ms": timed.prefill_ms,
        "first_token_decode_ms": timed.first_token_ms,
        "ttft_ms": timed.prefill_ms + timed.first_token_ms,
        "decode_ms": timed.decode_ms,
        "e2e_ms": timed.prefill_ms + timed.decode_ms,
        "throughput_tok_s": tokens / decode_s,
        "end_to_end_tok_s": tokens / e2e_s,
        "total_tok_s": (tokens + prompt_tokens) / e2e_s,
    }


def median_round(rounds: Sequence[Round]) -> int:
    """The index of the round of median ``e2e_ms`` (the lower of two)."""
    order = sorted(range(len(rounds)), key=lambda i: rounds[i].prefill_ms + rounds[i].decode_ms)
    return order[(len(order) - 1) // 2]


def repeats_part(rounds: Sequence[Round]) -> dict[str, Any]:
    """Every round's metrics, and the spread of each."""
    raw = [{name: round_metrics(timed)[name] for name in METRICS} for timed in rounds]
    return {
        "n": len(rounds),
        "raw": raw,
        "statistics": {name: statistic([metrics[name] for metrics in raw]) for name in METRICS},
    }


def tpot_part(pass_ms: Sequence[float]) -> dict[str, Any] | None:
    """Time of a decode pass: mean, p50, p90, max and n; None without decode passes."""
    if not pass_ms:
        return None
    ordered = sorted(pass_ms)

    def percentile(share: float) -> float:
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    return {
        "mean": statistics.fmean(ordered),
        "p50": percentile(0.5),
        "p90": percentile(0.9),
        "max": ordered[-1],
        "n": len(ordered),
    }


def floor_of(stats: PhaseStats, ceilings: Mapping[str, Ceiling]) -> tuple[float | None, Bound | None]:
    """The shortest time that the bytes moved inside the phase and its operations allow, and what sets it.

    The link's rate beside a busy SSD, ``h2d_with_ssd``, is in the JSON for information: a floor may not be beaten.
    """
    moved = stats.bytes_moved
    work = Work(
        ssd_bytes=moved["ssd_read"],
        h2d_bytes=moved["weight_h2d"] + moved["kv_h2d"],
        d2h_bytes=moved["kv_d2h"],
        hbm_bytes=stats.hbm_bytes,
        flops=stats.flops,
    )
    parts = parts_ms(work, {name: ceiling.value for name, ceiling in ceilings.items()})
    times = {bound: ms for bound, ms in parts.items() if ms is not None}
    if not times or len(times) < len(parts):
        return None, None
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def phase_part(
    stats: PhaseStats, ceilings: Mapping[str, Ceiling], predicted_pass_ms: float | None = None
) -> dict[str, Any]:
    """One entry of ``phases``."""
    floor_ms, bound_by = floor_of(stats, ceilings)
    spread = _spread(bound_by, ceilings)
    roofline = None if floor_ms is None or stats.wall_ms == 0 else 100 * floor_ms / stats.wall_ms
    return {
        "wall_ms": stats.wall_ms,
        "passes": stats.passes,
        "bytes": stats.bytes,
        "bytes_moved": stats.bytes_moved,
        "busy_ms": stats.busy_ms,
        "stall_ms": stats.stall_ms,
        "idle_ms": stats.idle_ms,
        "flops": stats.flops,
        "hbm_bytes": stats.hbm_bytes,
        "floor_ms": floor_ms,
        "predicted_ms": None if predicted_pass_ms is None else predicted_pass_ms * stats.passes or None,
        "bound_by": bound_by,
        "roofline_pct": roofline,
        "ceiling_spread_pct": spread if spread is not None and spread > 5 else None,
    }


def _spread(bound_by: Bound | None, ceilings: Mapping[str, Ceiling]) -> float | None:
    return ceilings[ceiling_of(bound_by)].spread_pct if bound_by is not None else None


def io_part(stats: Sequence[PhaseStats]) -> dict[str, float | None]:
    """Bytes over the time that the copies were busy, both phases together; None where nothing moved."""

    def rate(moved: str, busy: str) -> float | None:
        nbytes = sum(phase.bytes_moved[moved] for phase in stats)
        busy_ms = sum(phase.busy_ms.get(busy) or 0.0 for phase in stats)
        return nbytes / busy_ms / 1e3 if nbytes and busy_ms else None

    return {
        "weight_h2d_MBps": rate("weight_h2d", "h2d"),
        "kv_h2d_MBps": rate("kv_h2d", "kv_h2d"),
        "kv_d2h_MBps": rate("kv_d2h", "kv_d2h"),
    }


def beaten_floors(phases: Mapping[str, PhaseStats], ceilings: Mapping[str, Ceiling]) -> list[str]:
    """A line for each phase that was faster than its floor by over 5 %: no floor may be, so its ceiling was wrong."""
    warnings = []
    for name, stats in phases.items():
        floor_ms, bound_by = floor_of(stats, ceilings)
        if floor_ms is not None and floor_ms > 1.05 * stats.wall_ms:
            warnings.append(
                f"{name}: faster than the floor, so the ceiling of {bound_by} was measured too low "
                "(other work on the machine, or a device that varies): roofline_pct says little"
            )
    return warnings


def plan_warnings(phases: Mapping[str, PhaseStats], bytes_per_pass: Mapping[str, int]) -> list[str]:
    """A line for each phase whose passes used other bytes than planned, by more than 1 %."""
    warnings = []
    for name, stats in phases.items():
        for tier in ("ssd_read", "weight_h2d"):
            planned, used = bytes_per_pass[tier] * stats.passes, stats.bytes[tier]
            if abs(used - planned) > 0.01 * max(planned, 1):
                warnings.append(
                    f"{name}: {used / 1e6:.1f} MB of {tier} were used, {planned / 1e6:.1f} MB were planned: "
                    "paging did not go as planned"
                )
    return warnings


def prediction_warnings(phases: Mapping[str, PhaseStats], pass_ms: Mapping[str, float | None]) -> list[str]:
    """A line for each phase that took over 5 % more or less than was predicted from the medians of the probe.

    The prediction is a steady pass's; what was staged before a phase or for the next one is counted as it moved.
    """
    warnings = []
    for name, stats in phases.items():
        moved, used = stats.bytes_moved["weight_h2d"], stats.bytes["weight_h2d"]
        expected_ms = (pass_ms[name] or 0.0) * stats.passes * (moved / used if used else 1.0)
        if expected_ms and abs(stats.wall_ms - expected_ms) > 0.05 * expected_ms:
            warnings.append(
                f"{name}: took {stats.wall_ms:.0f} ms, {expected_ms:.0f} were predicted: either the pass waited for "
                "more than bytes (see stall_ms), or the machine was not as fast as while it was probed (see the "
                "ceilings' spread), and roofline_pct is as doubtful"
            )
    return warnings


def drive_warnings(reads: Sequence[Transfer], window: Interval) -> list[str]:
    """A line where the drive's rate in the last third of the phase fell below four fifths of that in the first."""
    inside = sorted((t for t in reads if window[0] <= t.start and t.end <= window[1]), key=lambda t: t.end)
    third = len(inside) // 3
    if third < 3:
        return []
    first, last = _read_MBps(inside[:third]), _read_MBps(inside[-third:])
    if last >= 0.8 * first:
        return []
    return [
        f"the drive slowed down in the run, from {first:.0f} to {last:.0f} MB/s: the ssd figures, and the floor where "
        "the SSD bounds it, are a mean of both; let it cool, or fill its cache less (trim it, leave room)"
    ]


def _read_MBps(reads: Sequence[Transfer]) -> float:
    """Rate while any of ``reads`` was under way."""
    busy_s = sum(end - start for start, end in merged((t.start, t.end) for t in reads))
    return sum(t.nbytes for t in reads) / busy_s / 1e6 if busy_s else float("inf")


def load_part(reads: Sequence[Transfer] | None, ceilings: Mapping[str, Ceiling]) -> dict[str, float | None]:
    """``load``, from the reads of residents; None without a manager.

    The rate counts all that was read meanwhile: the sweep that fills the residents takes streamed groups on its way.
    """
    residents = [t for t in reads or () if t.step is None]
    if reads is None or not residents:
        return {"read_bytes": None if reads is None else 0, "read_MBps": None, "ssd_pct": None}
    nbytes = sum(t.nbytes for t in residents)
    window = min(t.start for t in residents), max(t.end for t in residents)
    if window[0] == window[1]:
        return {"read_bytes": nbytes, "read_MBps": None, "ssd_pct": None}
    rate = moved_bytes(reads, window) / (window[1] - window[0]) / 1e6
    percent = 100 * rate / ceilings["ssd"].value if "ssd" in ceilings else None
    return {"read_bytes": nbytes, "read_MBps": rate, "ssd_pct": percent}
