"""How long a pass takes, at least (the floor) and by prediction; ``bench`` asks it of what was measured, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from wsm.layout.groups import KINDS
from wsm.layout.model import ModelShape
from wsm.plan.plan import Plan

Bound = Literal["ssd", "h2d", "d2h", "hbm", "compute", "weight_decode"]


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best rate seen of one resource: ``value`` in ``unit`` (MBps = 10^6 B/s, or TFLOPs), and the median."""

    value: float
    median: float
    unit: str
    spread_pct: float
    how: str


class Work(NamedTuple):
    """What has to be moved from and to each tier, in bytes, computed, in floating-point operations, and decoded."""

    ssd_bytes: float = 0
    h2d_bytes: float = 0
    d2h_bytes: float = 0
    hbm_bytes: float = 0
    flops: float = 0
    decoded_bytes: float = 0


class Floor(NamedTuple):
    """The least time of one pass, what bounds it, and each resource's own time, in ms; ``passes`` in the phase."""

    ms: float
    bound_by: Bound
    parts_ms: Mapping[Bound, float]
    passes: int


_BOUNDS: tuple[Bound, ...] = ("ssd", "h2d", "d2h", "hbm", "compute", "weight_decode")
"""The resources, in the order of :class:`Work`."""


def ceiling_of(bound: Bound) -> str:
    """The name of the ceiling that is behind a bound."""
    return "matmul" if bound == "compute" else bound


def parts_ms(work: Work, ceilings: Mapping[str, float]) -> dict[Bound, float | None]:
    """Milliseconds that each resource needs for what it is asked for at all; None where its ceiling is not known.

    Their maximum is the floor (docs/ARCHITECTURE.md): T >= max(B_ssd / bw_ssd, B_h2d / bw_h2d, B_d2h / bw_d2h,
    B_hbm / bw_hbm, FLOPs / peak). The link's ceiling is its best rate, alone: a floor may not be beaten. ``ceilings``
    are ``ssd``, ``h2d``, ``d2h``, ``hbm`` and ``weight_decode`` (of decoded bytes) in MBps (10^6 bytes per second),
    ``matmul`` in TFLOPs.
    """
    parts: dict[Bound, float | None] = {}
    for bound, amount in zip(_BOUNDS, work, strict=True):
        if amount:
            rate = ceilings.get(ceiling_of(bound))
            parts[bound] = 1e3 * amount / (rate * (1e12 if bound == "compute" else 1e6)) if rate else None
    return parts


def prefill_work(config: ModelShape, rows: Mapping[float, int], passes: int, itemsize: float) -> Work:
    """Operations, and the fewest bytes of device memory: each weight once per pass. ``rows``: how many, by tokens;
    ``itemsize``: bytes of a weight."""
    tokens = sum(count * n for n, count in rows.items())
    pairs = sum(count * n * (n + 1) / 2 for n, count in rows.items())
    return _work(config, passes * itemsize, tokens, sum(rows.values()), pairs)


def decode_work(
    config: ModelShape, rows: Mapping[float, int], passes: int, itemsize: float, kv_token_bytes: float
) -> Work:
    """As for the prefill; a decode pass also reads all KV so far, ``kv_token_bytes`` per token of all layers."""
    tokens = sum(rows.values()) * passes
    pairs = sum(count * (n * passes + passes * (passes + 1) / 2) for n, count in rows.items())
    work = _work(config, passes * itemsize, tokens, tokens, pairs)
    return work._replace(hbm_bytes=work.hbm_bytes + kv_token_bytes * pairs)


def _work(config: ModelShape, weight_bytes: float, tokens: float, logits: int, pairs: float) -> Work:
    """``weight_bytes`` are moved for each weight; ``pairs`` are of a token and a position that it attends to."""
    # A matrix takes 2 operations per weight and token, attention 4 per query head's dimension and earlier position.
    specs = [spec for kind in KINDS for spec in config.specs(kind)]
    matrices = config.n_layers * sum(math.prod(spec.shape) for spec in specs if len(spec.shape) == 2)
    head, attention = config.dim * config.vocab_size, 4 * config.n_layers * config.n_heads * config.head_dim
    flops = 2 * matrices * tokens + attention * pairs + 2 * head * logits
    return Work(hbm_bytes=(matrices + head) * weight_bytes, flops=flops)


def pass_work(plan: Plan) -> dict[str, Work]:
    """A mean pass of each phase, ``prefill`` and ``decode``."""
    config, shape, moved = plan.inputs.config, plan.shape, plan.bytes_per_pass
    rows, itemsize = {shape.prefill_tokens / shape.batch: shape.batch}, plan.bytes_a_weight
    passes = {phase: max(1, count) for phase, count in _passes(plan).items()}
    of_phase = {
        "prefill": prefill_work(config, rows, passes["prefill"], itemsize),
        "decode": decode_work(config, rows, passes["decode"], itemsize, plan.inputs.kv_token_bytes),
    }
    return {
        phase: Work(
            ssd_bytes=moved["ssd_read"],
            h2d_bytes=moved["weight_h2d"] + (moved["kv_h2d"] if phase == "decode" else 0),
            hbm_bytes=work.hbm_bytes / passes[phase],
            flops=work.flops / passes[phase],
            decoded_bytes=plan.decoded_bytes[phase],
        )
        for phase, work in of_phase.items()
    }


def _passes(plan: Plan) -> dict[str, int]:
    return {"prefill": plan.waves, "decode": max(0, plan.shape.new_tokens - 1)}


def predicted_floor(plan: Plan, ceilings: Mapping[str, float]) -> dict[str, Floor]:
    """The floor under a steady pass, by phase, of the ceilings that are known; without a phase where none is."""
    floors = {}
    for phase, work in pass_work(plan).items():
        parts = {bound: ms for bound, ms in parts_ms(work, ceilings).items() if ms is not None}
        if parts:
            bound = max(parts, key=lambda part: parts[part])
            floors[phase] = Floor(parts[bound], bound, parts, _passes(plan)[phase])
    return floors


def predicted_pass_ms(plan: Plan, ceilings: Mapping[str, Ceiling]) -> dict[str, float | None]:
    """Milliseconds of a steady pass of each phase, ``prefill`` and ``decode``: how long it will take, not must.

    From the medians of the probe, where the floor takes the best samples. The tiers work side by side, so the slowest
    one decides; while the SSD is read, the link has only its rate beside it. None where no weights are streamed, or
    where arithmetic or device memory takes longest: kernels and launches decide there, and no rate says how long.
    """
    return {phase: _pass_ms(work, ceilings) for phase, work in pass_work(plan).items()}


def _pass_ms(work: Work, ceilings: Mapping[str, Ceiling]) -> float | None:
    if not work.h2d_bytes or "h2d" not in ceilings or (work.ssd_bytes and "ssd" not in ceilings):
        return None
    parts = parts_ms(work, {name: ceiling.median for name, ceiling in ceilings.items()})
    ssd_ms = parts.get("ssd") or 0.0
    streaming_ms = max(ssd_ms, 1e3 * _link_s(work.h2d_bytes, ssd_ms / 1e3, ceilings))
    on_gpu_ms = max(parts.get("hbm") or 0.0, parts.get("compute") or 0.0) + (parts.get("weight_decode") or 0.0)
    return None if on_gpu_ms > streaming_ms else streaming_ms


def _link_s(nbytes: float, ssd_s: float, ceilings: Mapping[str, Ceiling]) -> float:
    """Seconds of the link: at its rate beside the SSD while that is read, at its own afterwards."""
    alone = ceilings["h2d"].median * 1e6
    # A rate beside the SSD above the link's own is the probe's noise: sharing makes nothing faster.
    beside = min(alone, ceilings["h2d_with_ssd"].median * 1e6) if "h2d_with_ssd" in ceilings else alone
    moved = beside * ssd_s
    return nbytes / beside if moved >= nbytes else ssd_s + (nbytes - moved) / alone


class PassTimes(NamedTuple):
    """A decode pass of two plans, in ms; ``at_least`` if both are floors and no predictions."""

    before_ms: float
    after_ms: float
    at_least: bool

    @property
    def change_ms(self) -> float:
        return self.after_ms - self.before_ms


def pass_times(before: Plan, after: Plan, ceilings: Mapping[str, Ceiling]) -> PassTimes | None:
    """Both by the same rule: predicted where both can be, else both floors; None where neither is known."""
    old, new = (predicted_pass_ms(plan, ceilings)["decode"] for plan in (before, after))
    if old is not None and new is not None:
        return PassTimes(old, new, at_least=False)
    # A floor is not known where the plan moves bytes whose rate is not: without them it would be flattered.
    for moved, rate in (("ssd_read", "ssd"), ("weight_h2d", "h2d")):
        if rate not in ceilings and (before.bytes_per_pass[moved] or after.bytes_per_pass[moved]):
            return None
    best = {name: ceiling.value for name, ceiling in ceilings.items()}
    floors = [predicted_floor(plan, best).get("decode") for plan in (before, after)]
    if floors[0] is None or floors[1] is None:
        return None
    return PassTimes(floors[0].ms, floors[1].ms, at_least=True)
