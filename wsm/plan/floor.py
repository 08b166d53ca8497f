"""The floor under passes, planned or measured, and what bounds them: the one place where its formula stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from wsm.layout.groups import KINDS
from wsm.layout.model import ModelShape
from wsm.plan.plan import Plan

Bound = Literal["ssd", "h2d", "d2h", "hbm", "compute"]


class Work(NamedTuple):
    """What has to be moved from and to each tier, in bytes, and computed, in floating-point operations."""

    ssd_bytes: float = 0
    h2d_bytes: float = 0
    d2h_bytes: float = 0
    hbm_bytes: float = 0
    flops: float = 0


class Floor(NamedTuple):
    """The least time of one pass, what bounds it, and each resource's own time, in ms; ``passes`` in the phase."""

    ms: float
    bound_by: Bound
    parts_ms: Mapping[Bound, float]
    passes: int


_CEILINGS: Mapping[Bound, tuple[str, float]] = {
    "ssd": ("ssd", 1e6),
    "h2d": ("h2d", 1e6),
    "d2h": ("d2h", 1e6),
    "hbm": ("hbm", 1e6),
    "compute": ("matmul", 1e12),
}
"""By resource, in the order of :class:`Work`: the ceiling's name, and its unit a second."""


def ceiling_of(bound: Bound) -> str:
    """The name of the ceiling that is behind a bound."""
    return _CEILINGS[bound][0]


def parts_ms(work: Work, ceilings: Mapping[str, float]) -> dict[Bound, float | None]:
    """Milliseconds that each resource needs for what it is asked for at all; None where its ceiling is not known.

    Their maximum is the floor (DESIGN section 2): T >= max(B_ssd / bw_ssd, B_h2d / bw_h2d, B_d2h / bw_d2h,
    B_hbm / bw_hbm, FLOPs / peak). The link's ceiling is its best rate, alone: a floor may not be beaten.

    Args:
        ceilings: ``ssd``, ``h2d``, ``d2h`` and ``hbm`` in MBps (10^6 bytes a second), ``matmul`` in TFLOPs.
    """
    return {
        bound: 1e3 * amount / (ceilings[name] * unit) if ceilings.get(name) else None
        for (bound, (name, unit)), amount in zip(_CEILINGS.items(), work, strict=True)
        if amount
    }


# -- the model's part of it


def prefill_work(config: ModelShape, rows: Mapping[float, int], passes: int, itemsize: int) -> Work:
    """Operations, and the fewest bytes of device memory: each weight once a pass.

    A matrix takes 2 operations a weight and token, attention 4 a query head's dimension and earlier position.

    Args:
        rows: how many there are, by the tokens of their prompt.
    """
    matrices, head = config.n_layers * _layer_weights(config), config.dim * config.vocab_size
    pairs = sum(count * n * (n + 1) / 2 for n, count in rows.items())
    tokens = sum(count * n for n, count in rows.items())
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * pairs
    flops = 2 * matrices * tokens + attention + 2 * head * sum(rows.values())
    return Work(hbm_bytes=(matrices + head) * itemsize * passes, flops=flops)


def decode_work(
    config: ModelShape, rows: Mapping[float, int], passes: int, itemsize: int, kv_token_bytes: float
) -> Work:
    """As for the prefill; a decode pass also reads all KV so far, ``kv_token_bytes`` a token of all layers."""
    matrices, head = config.n_layers * _layer_weights(config), config.dim * config.vocab_size
    kv_tokens = sum(count * (n * passes + passes * (passes + 1) / 2) for n, count in rows.items())
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * kv_tokens
    return Work(
        hbm_bytes=(matrices + head) * itemsize * passes + kv_token_bytes * kv_tokens,
        flops=2 * (matrices + head) * sum(rows.values()) * passes + attention,
    )


def _layer_weights(config: ModelShape) -> int:
    specs = [spec for kind in KINDS for spec in config.specs(kind)]
    return sum(math.prod(spec.shape) for spec in specs if len(spec.shape) == 2)


# -- of a plan


def pass_work(plan: Plan) -> dict[str, Work]:
    """A mean pass of each phase, ``prefill`` and ``decode``."""
    config, shape, moved = plan.inputs.config, plan.shape, plan.bytes_per_pass
    rows, itemsize = {shape.prefill_tokens / shape.batch: shape.batch}, plan.inputs.dtype.itemsize
    passes = _passes(plan)
    of_phase = {
        "prefill": prefill_work(config, rows, passes["prefill"], itemsize),
        "decode": decode_work(config, rows, max(1, passes["decode"]), itemsize, plan.inputs.kv_token_bytes),
    }
    return {
        phase: work._replace(
            ssd_bytes=moved["ssd_read"],
            h2d_bytes=moved["weight_h2d"] + (moved["kv_h2d"] if phase == "decode" else 0),
            hbm_bytes=work.hbm_bytes / max(1, passes[phase]),
            flops=work.flops / max(1, passes[phase]),
        )
        for phase, work in of_phase.items()
    }


def _passes(plan: Plan) -> dict[str, int]:
    return {"prefill": plan.waves, "decode": max(0, plan.shape.new_tokens - 1)}


def predicted_floor(plan: Plan, ceilings: Mapping[str, float]) -> dict[str, Floor]:
    """The floor under a steady pass of each phase, ``prefill`` and ``decode``.

    Args:
        ceilings: as for :func:`parts_ms`. One that is missing is left out of the maximum; a phase for which none is
            known is left out of the answer.
    """
    floors = {}
    for phase, work in pass_work(plan).items():
        parts = {bound: ms for bound, ms in parts_ms(work, ceilings).items() if ms is not None}
        if parts:
            bound = max(parts, key=lambda part: parts[part])
            floors[phase] = Floor(parts[bound], bound, parts, _passes(plan)[phase])
    return floors
