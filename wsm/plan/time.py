"""How long a pass takes, at least (the floor) and by prediction; ``bench`` asks it of what was measured, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from wsm.layout.groups import KINDS
from wsm.layout.model import ModelShape
from wsm.plan.kv import KV_WAIT_MS, kv_device_bytes
from wsm.plan.plan import Plan

Bound = Literal["ssd", "h2d", "d2h", "hbm", "compute", "weight_decode", "kv_read", "kv_write"]


STEADY_PCT = 25.0
"""A ceiling whose samples spread wider was disturbed: it gives an interval and no figure, and is not kept."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best rate seen of one resource: ``value`` in ``unit`` (MBps = 10^6 B/s, or TFLOPs), and the median.

    ``spread_pct`` is (highest - lowest sample) / median.
    """

    value: float
    median: float
    unit: str
    spread_pct: float
    how: str

    @property
    def steady(self) -> bool:
        return self.spread_pct <= STEADY_PCT

    @property
    def lowest(self) -> float:
        """The slowest sample, but for what rounding has left of it."""
        return max(self.value - self.spread_pct / 100 * self.median, 1e-3 * self.median)


class Work(NamedTuple):
    """What has to be moved from and to each tier, in bytes, computed, in floating-point operations, and decoded.

    ``kv_read`` and ``kv_write`` are from and to ``--kv-device``; ``kv_layers`` have KV below the device, and are no
    resource: see :data:`wsm.plan.kv.KV_WAIT_MS`.
    """

    ssd_bytes: float = 0
    h2d_bytes: float = 0
    d2h_bytes: float = 0
    hbm_bytes: float = 0
    flops: float = 0
    decoded_bytes: float = 0
    kv_read_bytes: float = 0
    kv_write_bytes: float = 0
    kv_layers: int = 0


class Floor(NamedTuple):
    """The least time of one pass, what bounds it, and each resource's own time, in ms; ``passes`` in the phase."""

    ms: float
    bound_by: Bound
    parts_ms: Mapping[Bound, float]
    passes: int


_BOUNDS: tuple[Bound, ...] = get_args(Bound)
"""The resources, in the order of :class:`Work`."""
KV_DEVICE: tuple[Bound, ...] = ("kv_read", "kv_write")
"""Both ways of ``--kv-device``, each with a ceiling of its name."""
BESIDE: Mapping[str, Bound] = {"h2d_with_ssd": "ssd", "h2d_with_kv": "kv_read"}
"""Ceilings of the link while a drive is read, and which."""
BURST_S = 0.5
"""How long a card may compute above its lasting clocks, at most: a floor may not be beaten."""


def ceiling_of(bound: Bound) -> str:
    """The name of the ceiling that is behind a bound."""
    return "matmul" if bound == "compute" else bound


def parts_ms(work: Work, ceilings: Mapping[str, float]) -> dict[Bound, float | None]:
    """Milliseconds that each resource needs for what it is asked for at all; None where its ceiling is not known.

    Their maximum is the floor (docs/ARCHITECTURE.md): T >= max(B_ssd / bw_ssd, B_h2d / bw_h2d, B_d2h / bw_d2h,
    B_hbm / bw_hbm, FLOPs / peak), and the same of each way of ``--kv-device``. The link's ceiling is its best rate,
    alone: a floor may not be beaten. ``ceilings`` are ``ssd``, ``h2d``, ``d2h``, ``hbm``, ``kv_read``, ``kv_write`` and
    ``weight_decode`` (of decoded bytes) in MBps (10^6 bytes per second), ``matmul`` and ``matmul_burst`` in
    TFLOPs: what lasts, and what a card does in its first ``BURST_S``.
    """
    parts: dict[Bound, float | None] = {}
    for bound, amount in zip(_BOUNDS, work[: len(_BOUNDS)], strict=True):
        if amount:
            rate = ceilings.get(ceiling_of(bound))
            if bound == "compute":
                parts[bound] = 1e3 * _compute_s(amount / 1e12, rate, ceilings.get("matmul_burst")) if rate else None
            else:
                parts[bound] = amount / rate / 1e3 if rate else None
    return parts


def _compute_s(teraflops: float, lasting: float, burst: float | None) -> float:
    if burst is None or burst <= lasting:
        return teraflops / lasting
    first = min(teraflops, BURST_S * burst)
    return first / burst + (teraflops - first) / lasting


def prefill_work(config: ModelShape, rows: Mapping[float, int], passes: int, itemsize: float) -> Work:
    """Operations, and the fewest bytes of device memory: each weight once per pass. ``rows``: how many, by tokens;
    ``itemsize``: bytes of a weight."""
    tokens = sum(count * n for n, count in rows.items())
    pairs = sum(count * n * (n + 1) / 2 for n, count in rows.items())
    return _work(config, passes * itemsize, tokens, sum(rows.values()), pairs)


def decode_work(
    config: ModelShape, rows: Mapping[float, int], passes: int, itemsize: float, kv_token_bytes: float, nodes: int = 1
) -> Work:
    """As for the prefill; a decode pass also reads all KV so far, ``kv_token_bytes`` per token of all layers.

    It computes so many ``nodes`` of a row. Of the tokens that it may add one is counted: the others' KV is little.
    """
    tokens = sum(rows.values()) * passes
    pairs = sum(count * (n * passes + passes * (passes + 1) / 2) for n, count in rows.items())
    work = _work(config, passes * itemsize, nodes * tokens, nodes * tokens, nodes * pairs)
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
    nodes = plan.inputs.verify_rows
    passes = {phase: max(1, count) for phase, count in passes_of(plan).items()}
    of_phase = {
        "prefill": prefill_work(config, rows, passes["prefill"], itemsize),
        "decode": decode_work(config, rows, passes["decode"], itemsize, plan.inputs.kv_token_bytes, nodes),
    }
    on_device, prompt = plan.kv.layout.rows_in(plan.kv.disk), shape.prefill_tokens // shape.batch
    kv_written = {
        "prefill": kv_device_bytes(plan.kv, prompt) / passes["prefill"],
        # A row's block goes down once it is full: in the mean a token a pass.
        "decode": on_device * plan.kv.layout.n_kv_heads * plan.kv.layout.token_bytes,
    }
    return {
        phase: Work(
            ssd_bytes=moved["ssd_read"],
            h2d_bytes=moved["weight_h2d"] + (moved["kv_h2d"] if phase == "decode" else 0),
            hbm_bytes=work.hbm_bytes / passes[phase],
            flops=work.flops / passes[phase],
            decoded_bytes=plan.decoded_bytes[phase],
            kv_read_bytes=moved["kv_read"] if phase == "decode" else 0,
            kv_write_bytes=kv_written[phase],
            kv_layers=plan.kv.layers_below if phase == "decode" else 0,
        )
        for phase, work in of_phase.items()
    }


def passes_of(plan: Plan) -> dict[str, int]:
    """Of each phase."""
    return {"prefill": plan.waves, "decode": max(0, plan.shape.new_tokens - 1)}


def predicted_floor(plan: Plan, ceilings: Mapping[str, float]) -> dict[str, Floor]:
    """The floor under a steady pass, by phase, of the ceilings that are known; without a phase where none is."""
    floors = {}
    for phase, work in pass_work(plan).items():
        parts = {bound: ms for bound, ms in parts_ms(work, ceilings).items() if ms is not None}
        if parts:
            bound = max(parts, key=lambda part: parts[part])
            floors[phase] = Floor(parts[bound], bound, parts, passes_of(plan)[phase])
    return floors


class Estimate(NamedTuple):
    """How long a pass takes by the medians of the rates behind it, and by their best and slowest samples, in ms."""

    ms: float
    low_ms: float
    high_ms: float

    @property
    def spread_pct(self) -> float:
        """That of the rates behind it, in percent: of one rate alone its own."""
        return 100 * (self.ms / self.low_ms - self.ms / self.high_ms) if self.low_ms else 0.0

    @property
    def steady(self) -> bool:
        """Whether it is a figure; else the interval alone is told."""
        return self.spread_pct <= STEADY_PCT

    def shown(self, per: float = 1) -> str:
        """In words, of one of ``per`` rows."""
        if self.steady:
            return f"{self.ms / per:.2f} ms"
        return f"{self.low_ms / per:.2f} to {self.high_ms / per:.2f} ms"

    def rate_shown(self, amount: float) -> str:
        """In words, how many a second where a pass makes ``amount``."""
        ends = (self.ms,) if self.steady else (self.high_ms, self.low_ms)
        return " to ".join(f"{1e3 * amount / ms:.4g}" for ms in ends)


ONE_SLOT = 1.07
"""With one slot a kind a group is copied once the last one is computed: 1.06 and 1.08 were measured (docs/LOG.md)."""


def predicted_pass_ms(plan: Plan, ceilings: Mapping[str, Ceiling]) -> dict[str, Estimate | None]:
    """A steady pass of each phase, ``prefill`` and ``decode``: how long it will take, not must."""
    return {phase: predict(work, ceilings, plan.placement.gpu_slots) for phase, work in pass_work(plan).items()}


def predict(work: Work, ceilings: Mapping[str, Ceiling], gpu_slots: int) -> Estimate | None:
    """A streamed pass that moves and computes so much, whatever its weights' format.

    From the medians of the probe, where the floor takes the best samples. The tiers work side by side, so the slowest
    one decides; while a drive is read, and not while KV is written, the link has only its rate beside it. None where no
    weights are streamed, or where arithmetic or device memory takes longest: kernels and launches decide there, and no
    rate says how long.
    """
    needed = {
        "h2d": work.h2d_bytes,
        "ssd": work.ssd_bytes,
        "kv_read": work.kv_read_bytes,
        "kv_write": work.kv_write_bytes,
    }
    if not work.h2d_bytes or any(nbytes and rate not in ceilings for rate, nbytes in needed.items()):
        return None
    ceilings = lasting(ceilings)
    medians = {name: ceiling.median for name, ceiling in ceilings.items()}
    if _on_gpu_ms(work, medians) > _streaming_ms(work, medians):
        return None
    best = {name: ceiling.value for name, ceiling in ceilings.items()}
    slowest = {name: ceiling.lowest for name, ceiling in ceilings.items()}
    factor = ONE_SLOT if gpu_slots == 1 else 1.0
    return Estimate(*(factor * least_ms(work, rates) for rates in (medians, best, slowest)))


def lasting(ceilings: Mapping[str, Ceiling]) -> dict[str, Ceiling]:
    """Without what a card does in its first half second alone: a steady pass comes after many others."""
    return {name: ceiling for name, ceiling in ceilings.items() if name != "matmul_burst"}


def least_ms(work: Work, rates: Mapping[str, float]) -> float:
    """The longest of what each resource takes at these rates; one whose rate is not known takes nothing."""
    return max(_streaming_ms(work, rates), _on_gpu_ms(work, rates))


def _on_gpu_ms(work: Work, rates: Mapping[str, float]) -> float:
    """Decoding comes on top of what products take: it is before them, on the same stream."""
    parts = parts_ms(work, rates)
    return max(parts.get("hbm") or 0.0, parts.get("compute") or 0.0) + (parts.get("weight_decode") or 0.0)


def _streaming_ms(work: Work, rates: Mapping[str, float]) -> float:
    parts = parts_ms(work, rates)
    ssd_ms, kv_ms = parts.get("ssd") or 0.0, max(parts.get(way) or 0.0 for way in KV_DEVICE)
    beside = {name: (parts.get(drive) or 0.0) / 1e3 for name, drive in BESIDE.items()}
    link_ms = 1e3 * _link_s(work.h2d_bytes, beside, rates) if "h2d" in rates else 0.0
    return max(ssd_ms, kv_ms, link_ms + KV_WAIT_MS * work.kv_layers)


def _link_s(nbytes: float, beside: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """Seconds of the link: at its rate ``beside`` a drive for the seconds that it is read, at its own afterwards.

    Beside two drives it keeps the share that one leaves it of what the other does: that is not measured.
    """
    # A rate beside a drive above the link's own is the probe's noise: sharing makes nothing faster.
    left = sorted((seconds, min(1.0, rates.get(name, rates["h2d"]) / rates["h2d"])) for name, seconds in beside.items())
    now = 0.0
    for place, (until, _) in enumerate(left):
        rate = 1e6 * rates["h2d"] * math.prod(share for _, share in left[place:])
        if rate * (until - now) >= nbytes:
            return now + nbytes / rate
        nbytes, now = nbytes - rate * (until - now), until
    return now + nbytes / rates["h2d"] / 1e6


class PassTimes(NamedTuple):
    """A decode pass of two plans; ``at_least`` if both are floors and no predictions."""

    before: Estimate
    after: Estimate
    at_least: bool

    @property
    def change_ms(self) -> float:
        return self.after.ms - self.before.ms


def pass_times(before: Plan, after: Plan, ceilings: Mapping[str, Ceiling]) -> PassTimes | None:
    """Both by the same rule: predicted where both can be, else both floors; None where neither is known."""
    old, new = (predicted_pass_ms(plan, ceilings)["decode"] for plan in (before, after))
    if old is not None and new is not None:
        return PassTimes(old, new, at_least=False)
    # A floor is not known where the plan moves bytes whose rate is not: without them it would be flattered.
    for moved, rate in (("ssd_read", "ssd"), ("weight_h2d", "h2d"), ("kv_read", "kv_read")):
        if rate not in ceilings and (before.bytes_per_pass[moved] or after.bytes_per_pass[moved]):
            return None
    old, new = (floor_estimate(plan, ceilings)["decode"] for plan in (before, after))
    return None if old is None or new is None else PassTimes(old, new, at_least=True)


def floor_estimate(plan: Plan, ceilings: Mapping[str, Ceiling]) -> dict[str, Estimate | None]:
    """The floor of each phase by the best samples, and how far it would rise by the slowest; None where not known."""
    found: dict[str, Estimate | None] = dict.fromkeys(("prefill", "decode"))
    best, slowest = (
        predicted_floor(plan, {name: getattr(ceiling, rate) for name, ceiling in ceilings.items()})
        for rate in ("value", "lowest")
    )
    for phase, floor in best.items():
        found[phase] = Estimate(floor.ms, floor.ms, slowest[phase].ms)
    return found
