"""The floor under a plan's passes, and what bounds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from llama.checkpoint.names import group_specs
from llama.config import ModelConfig
from wsm.plan import Plan

Bound = Literal["ssd", "h2d", "hbm", "compute"]
_CEILING_OF: Mapping[Bound, str] = {"ssd": "ssd", "h2d": "h2d", "hbm": "hbm", "compute": "matmul"}


class PassWork(NamedTuple):
    """What one pass has to do: bytes from each tier, and floating-point operations."""

    ssd_bytes: float
    h2d_bytes: float
    hbm_bytes: float
    flops: float


class Floor(NamedTuple):
    """The least time of one pass, what bounds it, and each resource's own time, in ms; ``passes`` in the phase."""

    ms: float
    bound_by: Bound
    parts_ms: Mapping[Bound, float]
    passes: int


def pass_work(plan: Plan) -> dict[str, PassWork]:
    """A mean pass of each phase, ``prefill`` and ``decode``.

    Weights are read once a pass from device memory, and in decode all KV so far; a matrix takes 2 operations a weight
    and token, attention 4 a query head's dimension and earlier position.
    """
    config, shape, moved = plan.inputs.config, plan.shape, plan.bytes_per_pass
    matrices, head = config.n_layers * _layer_weights(config), config.dim * config.vocab_size
    attention = 4 * config.n_layers * config.n_heads * config.head_dim
    row = shape.prefill_tokens / shape.batch
    prefill = 2 * matrices * shape.prefill_tokens + 2 * head * shape.batch
    prefill_attention = attention * shape.batch * row * (row + 1) / 2
    kv_tokens = shape.prefill_tokens + shape.batch * shape.new_tokens / 2
    decode = 2 * (matrices + head) * shape.batch + attention * kv_tokens
    streamed = (moved["ssd_read"], moved["weight_h2d"])
    kv_bytes = kv_tokens * plan.inputs.kv_token_bytes
    return {
        "prefill": PassWork(*streamed, moved["hbm_read"], (prefill + prefill_attention) / plan.waves),
        "decode": PassWork(streamed[0], streamed[1] + moved["kv_h2d"], moved["hbm_read"] + kv_bytes, decode),
    }


def _layer_weights(config: ModelConfig) -> int:
    matrices = [*group_specs(config, "attn"), *group_specs(config, "ffn")]
    return sum(spec.shape[0] * spec.shape[1] for spec in matrices if len(spec.shape) == 2)


def predicted_floor(plan: Plan, ceilings: Mapping[str, float]) -> dict[str, Floor]:
    """The floor under a steady pass of each phase, ``prefill`` and ``decode`` (DESIGN section 2):

        T_pass >= max(B_ssd / bw_ssd, B_h2d / bw_h2d, B_hbm / bw_hbm, FLOPs / peak)

    Args:
        ceilings: ``ssd``, ``h2d`` and ``hbm`` in MBps (10^6 bytes a second), ``matmul`` in TFLOPs. One that is missing
            is left out of the maximum; a phase for which none is known is left out of the answer.
    """
    passes = {"prefill": plan.waves, "decode": max(0, plan.shape.new_tokens - 1)}
    floors = {}
    for phase, work in pass_work(plan).items():
        parts = _parts_ms(work, ceilings)
        if parts:
            bound = max(parts, key=lambda part: parts[part])
            floors[phase] = Floor(parts[bound], bound, parts, passes[phase])
    return floors


def _parts_ms(work: PassWork, ceilings: Mapping[str, float]) -> dict[Bound, float]:
    amounts: dict[Bound, float] = {
        "ssd": work.ssd_bytes / 1e6,
        "h2d": work.h2d_bytes / 1e6,
        "hbm": work.hbm_bytes / 1e6,
        "compute": work.flops / 1e12,
    }
    return {
        part: 1e3 * amount / ceilings[_CEILING_OF[part]]
        for part, amount in amounts.items()
        if ceilings.get(_CEILING_OF[part])
    }
