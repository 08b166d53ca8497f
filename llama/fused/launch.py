"""Launches of the kernels. CUDA alone; tests/gpu/profile_layer.py measures them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from llama.fused import kernels
from wsm.formats.product_kernels import COUNTERS, arrivals_on
from wsm.plan.memory import DECODE_KEYS, DECODE_SPLITS

GATE_TILE, HEADS_AT_ONCE = 2048, 8


class RowTuning(NamedTuple):
    """Of a product with one row: rows of the matrix and inputs that a program takes at once, its warps and stages."""

    rows: int
    step: int
    warps: int
    stages: int


ROW_PRODUCT = RowTuning(rows=4, step=512, warps=2, stages=4)
LONGEST_NORM = 1 << 16
"""Values of a row: a program holds all of them."""
_HALVES = (torch.bfloat16, torch.float16)
_LIBRARY = isinstance(kernels.gate_kernel, triton.JITFunction)  # not where Triton interprets


def rotate_(heads: Tensor, rotated: int, freqs_cis: Tensor) -> None:
    """See :func:`llama.fused.ops.rotate_`."""
    _rotary(heads, rotated, rotated, 0, freqs_cis, None)


def rotate_and_write_(
    heads: Tensor, n_heads: int, freqs_cis: Tensor, window: Tensor, places: Tensor, positions: Tensor
) -> None:
    """Rotate queries and keys of ``heads [n, n_heads + 2 * n_kv_heads, head_dim]`` in place, and put keys and values
    into ``window [rows, n_kv_heads, tokens, 2, head_dim]``: token i into row ``places[i]`` at ``positions[i]``."""
    n_kv_heads = window.shape[1]
    _rotary(heads, n_heads + n_kv_heads, n_heads, n_kv_heads, freqs_cis, (window, places, positions))


def _rotary(
    heads: Tensor,
    rotated: int,
    queries: int,
    kv_heads: int,
    freqs_cis: Tensor,
    into: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    freqs, dim = torch.view_as_real(freqs_cis), heads.shape[2]
    window, places, positions = (heads, freqs, freqs) if into is None else into
    strides = (0, 0, 0) if into is None else window.stride()[:3]
    every = rotated if into is None else queries + 2 * kv_heads
    kernels.rotary_kernel[(heads.shape[0], triton.cdiv(every, HEADS_AT_ONCE))](
        heads, freqs, window, places, positions,
        rotated, queries, kv_heads, heads.stride(0), *strides,
        DIM=dim, PAIRS=triton.next_power_of_2(dim // 2), HEADS=HEADS_AT_ONCE, WRITE=into is not None, num_warps=4,
    )  # fmt: skip


def gate_(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`llama.fused.ops.gate_`."""
    kernels.gate_kernel[(triton.cdiv(gate.numel(), GATE_TILE),)](
        gate, up, gate.numel(), TILE=GATE_TILE, LIBRARY=_LIBRARY, num_warps=4
    )
    return gate


def can_norm(x: Tensor) -> bool:
    """Whether :func:`rms_norm` takes them: all rows are aligned alike, on which the order of a sum could depend."""
    alike = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % 8 == x.shape[1] % 8 == 0
    return alike and x.shape[1] <= LONGEST_NORM


def rms_norm(x: Tensor, weight: Tensor, eps: float, part: Tensor | None = None) -> Tensor:
    """See :func:`llama.fused.ops.rms_norm`; of ``x + part`` where there is a part, as ``add_rms_norm`` there."""
    (n, dim), out = x.shape, x.new_empty(x.shape)
    cols = int(triton.next_power_of_2(dim))
    warps = min(16, max(1, cols // 512))
    added = x if part is None else part
    kernels.norm_kernel[(n,)](
        x, added, weight, out, dim, x.stride(0), eps, COLS=cols, ADDED=part is not None, num_warps=warps
    )
    return out


def can_multiply(x: Tensor, *weights: Tensor) -> bool:
    """Whether products are of one row of 16-bit values, with matrices without gaps: with more rows cuBLAS is faster."""
    # The order of a sum depends on whether a matrix starts at a multiple of 16 bytes: all do, in every mode.
    one = x.shape[0] == 1 and x.dtype in _HALVES and x.stride(1) == 1
    return one and all(weight.dtype == x.dtype and weight.is_contiguous() for weight in weights)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T``, ``[1, rows]``."""
    return _row_product(x, weight, x.new_empty(1, weight.shape[0]))


def add_linear_(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add ``x weight^T`` to ``h [1, rows]``, rounded once."""
    _row_product(x, weight, h, residual=h)


def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`llama.fused.ops.gated_linear`."""
    return _row_product(x, gate, x.new_empty(1, gate.shape[0]), second=up)


def _row_product(
    x: Tensor, weight: Tensor, out: Tensor, *, second: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    (rows, cols), tuning = weight.shape, ROW_PRODUCT
    kernels.row_product_kernel[(triton.cdiv(rows, tuning.rows),)](
        x, weight, weight if second is None else second, x if residual is None else residual, out, rows, cols,
        GATED=second is not None, ADDED=residual is not None, EVEN=rows % tuning.rows == 0 and cols % tuning.step == 0,
        LIBRARY=_LIBRARY, ROWS=tuning.rows, STEP=tuning.step, STAGES=tuning.stages, num_warps=tuning.warps,
    )  # fmt: skip
    return out


def can_attend(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attend_rows` takes them: 16-bit values, keys and values of one layout, a head in one piece."""
    in_order = keys.stride() == values.stride() and keys.stride(3) == 1 and q.stride()[1:] == (q.shape[2], 1)
    return q.dtype in _HALVES and in_order and q.shape[0] * keys.shape[1] <= COUNTERS


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """See :func:`llama.fused.ops.attend_rows`. Splits are as wide as the tokens say, however many the rows are."""
    (n, n_heads, dim), (_, kv_heads, tokens, _) = q.shape, keys.shape
    width = max(DECODE_KEYS, int(triton.next_power_of_2(triton.cdiv(tokens, DECODE_SPLITS))))
    splits, shared = triton.cdiv(tokens, width), max(16, int(triton.next_power_of_2(n_heads // kv_heads)))
    cols = max(16, int(triton.next_power_of_2(dim)))
    out = q.new_empty(n, n_heads * dim)
    left = (n * kv_heads * splits * shared * (cols + 2)) if splits > 1 else 0
    parts, facts = q.new_empty(left, dtype=torch.float32).split((left // (cols + 2) * cols, left // (cols + 2) * 2))
    kernels.attention_kernel[(n * kv_heads, splits)](
        q, keys, values, mask, out, parts, facts, arrivals_on(q.device),
        1 / math.sqrt(dim), tokens, kv_heads, q.stride(0), *keys.stride()[:3], mask.stride(0), splits,
        SHARED=shared, REP=n_heads // kv_heads, DIM=dim, COLS=cols, BLOCK=DECODE_KEYS, WIDTH=width, SPLIT=splits > 1,
        num_warps=4,
    )  # fmt: skip
    return out
