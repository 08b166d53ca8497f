"""The fused kernels where there is no GPU: python without_a_gpu.py interpret | 80 | 86 | 89 | 90

``interpret`` (with TRITON_INTERPRET=1) compares their launches with torch on the CPU, in float16, since the interpreter
rounds bfloat16 otherwise than a GPU. A number compiles them for that compute capability.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from llama.fused import kernels, launch, ops
from tests.without_gpu import compiled
from wsm.plan.memory import decode_split_bytes

LEAST_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, by compute capability."""
SEED = torch.Generator().manual_seed(3)


def compile_for(capability: int) -> None:
    """Each kernel with constants that have little in common."""

    def made(name: str, warps: int, to: str, **constants: Any) -> None:
        floats, whole = ("freqs", "parts", "facts"), ("places", "positions")
        values = ("heads", "window", "gate", "up", "x", "weight", "second", "residual", "out")
        values += ("part", "q", "keys", "values", "mask")
        types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(whole, "*i64") | dict.fromkeys(values, to)
        types |= {"scale": "fp32", "eps": "fp32", "arrivals": "*i32"}
        made = compiled(getattr(kernels, name), capability, types, constants, num_warps=warps)
        assert made.metadata.shared <= LEAST_SHARED[capability], (name, made.metadata.shared)

    import triton

    for to, written in (("*bf16", True), ("*fp16", False), ("*fp32", True)):
        made("rotary_kernel", 4, to, DIM=128 if written else 96, PAIRS=64, HEADS=launch.HEADS_AT_ONCE, WRITE=written)
        made("gate_kernel", 4, to, TILE=launch.GATE_TILE, LIBRARY=True)
        made("norm_kernel", 16, to, COLS=16384 if written else 64, ADDED=written)
    tuning = launch.ROW_PRODUCT
    tile = {"ROWS": tuning.rows, "STEP": tuning.step, "STAGES": tuning.stages, "LIBRARY": True}
    for to, gated, added, even in (
        ("*bf16", True, False, True),
        ("*fp16", False, True, False),
        ("*bf16", False, False, True),
    ):
        made("row_product_kernel", tuning.warps, to, GATED=gated, ADDED=added, EVEN=even, **tile)
    for rep, dim, width in ((4, 128, 64), (3, 96, 256), (16, 64, 64), (20, 256, 64)):
        cols = int(triton.next_power_of_2(dim))
        shared = {"SHARED": 32 if rep > 16 else 16, "REP": rep, "DIM": dim, "COLS": cols}
        made("attention_kernel", 4, "*bf16", BLOCK=launch.DECODE_KEYS, WIDTH=width, SPLIT=width == 64, **shared)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=SEED).half()


def interpret() -> None:
    norm()
    rotate()
    gate()
    multiply()
    attend()
    operands()
    attend_within_its_plan()


def norm() -> None:
    """As torch's; the rows of ``x`` may lie apart, but the model's have to be aligned alike."""
    takes = {apart: launch.can_norm(random(3, 64 + apart)[:, :64]) for apart in (0, 3, 8)}
    assert takes == {0: True, 3: False, 8: True}
    for n, dim in ((1, 64), (3, 576), (2, 7)):
        x, weight = random(n, dim + 3)[:, :dim], random(dim)
        found, expected = launch.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5)
        assert ((found - expected).abs() <= 2e-3 * expected.abs() + 1e-6).all()
        part, summed = random(n, dim), x.clone()
        assert torch.equal(launch.rms_norm(summed, weight, 1e-5, part), launch.rms_norm(x + part, weight, 1e-5))
        assert torch.equal(summed, x + part)


def rotate() -> None:
    """Turned and written as torch does; values and everything beside them stay as they were."""
    for n, n_heads, n_kv_heads, dim in ((3, 8, 2, 64), (1, 3, 3, 6), (2, 9, 3, 96), (2, 5, 1, 80)):
        heads = random(n, n_heads + 2 * n_kv_heads, dim)
        freqs_cis = torch.polar(torch.ones(n, 1, dim // 2), torch.rand(n, 1, dim // 2, generator=SEED) * 9)
        expected, rotated = heads.clone(), n_heads + n_kv_heads
        ops.rotate_(expected, rotated, freqs_cis)
        turned = heads.clone()
        launch.rotate_(turned, rotated, freqs_cis)
        assert torch.equal(turned, expected)
        window, places, positions = random(n + 2, n_kv_heads, 5, 2, dim), torch.arange(n) + 1, torch.arange(n) % 5
        filled = window.clone()
        filled[places, :, positions] = expected[:, n_heads:].unflatten(1, (2, n_kv_heads)).transpose(1, 2)
        launch.rotate_and_write_(heads, n_heads, freqs_cis, window, places, positions)
        assert torch.equal(heads, expected)
        assert torch.equal(window, filled)


def gate() -> None:
    one, up = random(3, 1000), random(3, 1000)
    expected = ops.gate_(one.clone(), up)
    assert ((launch.gate_(one, up) - expected).abs() <= 2e-3 * expected.abs() + 1e-6).all()


def multiply() -> None:
    """One row with matrices of whole and of broken tiles: as torch's, on top of a residual, and gated."""
    for rows, cols in ((12, 1024), (7, 576), (5, 1)):
        x, first, second, h = random(1, cols), random(rows, cols), random(rows, cols), random(1, rows)
        product = launch.linear(x, first)
        expected = x.double() @ first.double().t()
        assert torch.equal(product, expected.float().half()) or (product - expected).abs().max() < 1e-3 * cols**0.5
        added = h.clone()
        launch.add_linear_(added, x, first)
        assert (added - (h.double() + expected)).abs().max() < 0.01 * cols**0.5
        assert torch.equal(launch.gated_linear(x, first, second), launch.gate_(product, launch.linear(x, second)))
    assert launch.can_multiply(x, first, second)
    assert not launch.can_multiply(random(2, cols), first)
    assert not launch.can_multiply(x.float(), first.float())
    assert not launch.can_multiply(random(1, 64), random(8, 72)[:, :64])
    assert not launch.can_multiply(random(1, 128)[:, ::2], random(8, 64))


def attend() -> None:
    """As a plain softmax; a row's bits depend neither on other rows nor on how many hidden keys follow."""
    for n, n_heads, n_kv_heads, dim, tokens in (
        (2, 8, 2, 64, 100),
        (3, 4, 4, 128, 64),
        (2, 20, 1, 80, 70),
        (2, 6, 2, 96, 330),
    ):
        q = random(n, n_heads + 5, dim)[:, :n_heads]
        window = random(n, n_kv_heads, tokens + 70, 2, dim)
        lengths = torch.tensor([tokens, 7, 1])[:n, None]
        shown = torch.arange(tokens + 70) < lengths
        shown[0, :65] &= tokens != 330  # the first split of a row may have nothing to be seen
        mask = torch.zeros(shown.shape).half().masked_fill_(~shown, -torch.inf)[:, None, None]
        keys, values = window[:, :, :tokens].unbind(3)
        found = launch.attend_rows(q, keys, values, mask[..., :tokens])
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.unflatten(1, (n_kv_heads, -1)).float(), keys.float(), values.float(), attn_mask=mask[..., :tokens].float()
        )
        assert (found.float() - expected.reshape(n, -1)).abs().max() < 4e-3, (n_heads, tokens)
        wider = launch.attend_rows(q, *window.unbind(3), mask)
        assert torch.equal(wider, found)
        alone = launch.attend_rows(q[1:2], keys[1:2], values[1:2], mask[1:2, ..., :tokens])
        assert torch.equal(alone[0], found[1])
    with mock.patch.object(launch, "DECODE_SPLITS", 2):  # some blocks a split
        again = launch.attend_rows(q, keys, values, mask[..., :tokens])
    assert (again.float() - expected.reshape(n, -1)).abs().max() < 4e-3


def operands() -> None:
    """Keys whose heads are not in one piece are left to torch."""
    q, keys = random(2, 4, 64), random(2, 2, 30, 64)
    assert launch.can_attend(q, keys, keys)
    assert not launch.can_attend(q, *[random(2, 2, 64, 30).transpose(2, 3)] * 2)
    assert not launch.can_attend(q.transpose(1, 2).contiguous().transpose(1, 2), keys, keys)


def attend_within_its_plan() -> None:
    """What the splits leave is what memory is planned for, to the byte where each split is of 64 keys."""
    taken, new_empty = list[int](), Tensor.new_empty

    def noted(like: Tensor, *shape: Any, **more: Any) -> Tensor:
        found = new_empty(like, *shape, **more)
        taken.append(found.nbytes)
        return found

    for n, n_heads, n_kv_heads, dim, tokens in ((2, 8, 2, 64, 128), (1, 20, 1, 24, 100), (1, 2, 2, 16, 64)):
        q, (keys, values) = random(n, n_heads, dim), random(2, n, n_kv_heads, tokens, dim)
        taken.clear()
        with mock.patch.object(Tensor, "new_empty", noted):
            out = launch.attend_rows(q, keys, values, torch.zeros(n, 1, 1, tokens).half())
        assert sum(taken) == out.nbytes + decode_split_bytes(n, n_heads, n_kv_heads, dim, tokens)


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
