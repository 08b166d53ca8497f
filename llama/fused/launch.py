"""Launches of the kernels, with the constants that measurements gave (tests/gpu/profile_layer.py). CUDA alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from llama.fused import kernels
from wsm.formats.arrivals import COUNTERS, arrivals

MOST_ROWS = 32
"""Of ``x`` in a product of ours: with more, cuBLAS is as fast."""
GATE_TILE, HEADS_AT_ONCE = 2048, 8
KEYS, MOST_SPLITS = 64, 64
"""Of decode attention: keys that are read at once, and splits that one program joins."""
_HALVES = (torch.bfloat16, torch.float16)


class ProductTuning(NamedTuple):
    """Rows of the matrix and inputs of them that a program takes at once, its warps and stages, and the programs to aim
    at: the inputs are split until there are as many, while each split has at least ``steps`` times ``step`` inputs. The
    number of rows of ``x`` is not in it: a row's bits do not depend on the others."""

    rows: int
    step: int
    warps: int
    stages: int
    programs: int
    steps: int


PRODUCT = ProductTuning(rows=64, step=64, warps=4, stages=4, programs=264, steps=4)


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
    kernels.gate_kernel[(triton.cdiv(gate.numel(), GATE_TILE),)](gate, up, gate.numel(), TILE=GATE_TILE, num_warps=4)
    return gate


def can_attend(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attend_rows` takes them: 16-bit values, keys and values of one layout."""
    in_order = keys.stride() == values.stride() and q.stride()[1:] == (q.shape[2], 1)
    return q.dtype in _HALVES and in_order and q.shape[0] * keys.shape[1] <= COUNTERS


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """See :func:`llama.fused.ops.attend_rows`. Splits are as wide as the tokens say, however many the rows are."""
    (n, n_heads, dim), (_, kv_heads, tokens, _) = q.shape, keys.shape
    width = max(KEYS, int(triton.next_power_of_2(triton.cdiv(tokens, MOST_SPLITS))))
    splits, shared = triton.cdiv(tokens, width), max(16, int(triton.next_power_of_2(n_heads // kv_heads)))
    cols = max(16, int(triton.next_power_of_2(dim)))
    out = q.new_empty(n, n_heads * dim)
    left = (n * kv_heads * splits * shared * (cols + 2)) if splits > 1 else 0
    parts, facts = q.new_empty(left, dtype=torch.float32).split((left // (cols + 2) * cols, left // (cols + 2) * 2))
    kernels.attention_kernel[(n * kv_heads, splits)](
        q, keys, values, mask, out, parts, facts, arrivals(q.device),
        1 / math.sqrt(dim), tokens, kv_heads, q.stride(0), *keys.stride()[:3], mask.stride(0), splits,
        SHARED=shared, REP=n_heads // kv_heads, DIM=dim, COLS=cols, BLOCK=KEYS, WIDTH=width, SPLIT=splits > 1,
        num_warps=4,
    )  # fmt: skip
    return out


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear` takes them: few rows of 16-bit values, and whole pieces of a matrix without gaps."""
    return (
        x.shape[0] <= MOST_ROWS
        and x.dtype in _HALVES
        and x.stride(1) == 1
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and weight.shape[1] % 64 == 0
    )


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``x weight^T``, rounded to the dtype of ``x``, into ``out [n, rows]`` if given, of that dtype or float32."""
    out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    _product(x, weight, out)
    return out


def add_linear_(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add ``x weight^T`` to ``h [n, rows]``, rounded once."""
    _product(x, weight, h, residual=h)


def gated_linear(x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
    """``silu(x w1^T) * (x w3^T)``, each step rounded."""
    out = x.new_empty(x.shape[0], w1.shape[0])
    _product(x, w1, out, second=w3)
    return out


def splits_of(rows: int, cols: int) -> int:
    """Parts that the inputs of a matrix are summed in."""
    programs, steps, splits = triton.cdiv(rows, PRODUCT.rows), triton.cdiv(cols, PRODUCT.step), 1
    while programs * splits < PRODUCT.programs and steps >= 2 * splits * PRODUCT.steps:
        splits *= 2
    return splits


def _product(
    x: Tensor, weight: Tensor, out: Tensor, *, second: Tensor | None = None, residual: Tensor | None = None
) -> None:
    (n, cols), rows, tuning = x.shape, weight.shape[0], PRODUCT
    programs, splits = triton.cdiv(rows, tuning.rows), splits_of(rows, cols)
    products = 1 if second is None else 2
    parts = x.new_empty((splits * products if splits > 1 else 0, n, rows), dtype=torch.float32)
    added = x if residual is None else residual
    kernels.product_kernel[(programs, splits)](
        x, weight, weight if second is None else second, added, out, parts, arrivals(x.device),
        n, rows, cols, x.stride(0), added.stride(0), out.stride(0),
        triton.cdiv(triton.cdiv(cols, tuning.step), splits), splits,
        GATED=second is not None, ADDED=residual is not None, SPLIT=splits > 1,
        EVEN=rows % tuning.rows == 0 and cols % tuning.step == 0, N=16 if n <= 16 else MOST_ROWS,
        ROWS=tuning.rows, STEP=tuning.step, STAGES=tuning.stages, num_warps=tuning.warps,
    )  # fmt: skip
