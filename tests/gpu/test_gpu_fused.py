"""The fused kernels on a CUDA device: what torch computes, and the same bits whatever stands beside a row."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.fused import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
SHAPES = [(6144, 4096), (4096, 14336), (576, 1536), (1000, 576)]
DTYPES = [torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def close(found: Tensor, expected: Tensor, size: Tensor | float) -> bool:
    """Within roundings of the dtype of ``found``, for sums of the ``size``."""
    return bool(((found.double() - expected).abs() <= 0.01 * size + 1e-3).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_product_does_not_depend_on_the_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = random(*shape, dtype=dtype), random(32, shape[1], dtype=dtype)
    expected = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    for most in (16, 32):
        together = ops.linear(x[:most], weight)
        assert close(together, expected[:most], size[:most])
        assert (together.double() - expected[:most]).norm() <= 0.005 * expected[:most].norm()
        for first, rows in ((0, most // 2 + 1), (3, most - 4), (most // 2 - 1, most // 2 + 1)):
            assert torch.equal(ops.linear(x[first : first + rows], weight), together[first : first + rows])
    assert torch.equal(ops.linear(x[5:6], weight)[0], ops.linear(x[:16], weight)[5])


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_gates_residuals_and_heads_are_the_product_and_then_the_rest(shape: tuple[int, int], rows: int) -> None:
    w1, w3, x = (random(n, shape[1], dtype=torch.bfloat16) / 16 for n in (shape[0], shape[0], rows))
    one, two = ops.linear(x, w1), ops.linear(x, w3)
    assert torch.equal(ops.gated_linear(x, w1, w3), ops.gate_(one.clone(), two))
    h = random(rows, shape[0], dtype=torch.bfloat16)
    added = h.clone()
    ops.add_linear_(added, x, w1)
    assert close(added, h.double() + x.double() @ w1.double().T, 1.0 + h.double().abs())
    logits = torch.empty(rows, shape[0], device="cuda")
    ops.head_(logits, x, w1)
    assert torch.equal(logits, one.float())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_gating_and_rotating_are_those_of_torch(dtype: torch.dtype) -> None:
    gate, up = random(33, 14336, dtype=dtype), random(33, 14336, dtype=dtype)
    assert close(ops.gate_(gate.clone(), up), F.silu(gate.double()) * up.double(), up.double().abs())
    heads = random(33, 12, 128, dtype=dtype)
    freqs_cis = torch.polar(torch.ones(33, 1, 64), torch.rand(33, 1, 64) * 9).cuda()
    turned, expected = heads.clone(), heads.clone()
    ops.rotate_(turned, 10, freqs_cis)
    with mock.patch.object(ops, "_launchers", return_value=None):
        ops.rotate_(expected, 10, freqs_cis)
    assert close(turned, expected.double(), 1.0 + expected.double().abs())
    assert torch.equal(turned[:, 10:], heads[:, 10:])
    assert not torch.equal(turned[:, 9], heads[:, 9])


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "dim"), [(32, 8, 128), (64, 8, 128), (9, 3, 64), (4, 4, 96)])
@pytest.mark.parametrize("tokens", [256, 2048, 9000])
def test_attention_of_a_row_depends_neither_on_others_nor_on_hidden_keys(
    n_heads: int, n_kv_heads: int, dim: int, tokens: int
) -> None:
    n = 3
    q, window = random(n, n_heads, dim, dtype=torch.bfloat16), random(n, n_kv_heads, tokens, 2, dim, dtype=DTYPES[0])
    lengths = torch.tensor([tokens, tokens // 2 + 1, 1], device="cuda")[:, None]
    shown = torch.arange(tokens, device="cuda") < lengths
    shown[0, :65] = False
    mask = torch.zeros(shown.shape, device="cuda").bfloat16().masked_fill_(~shown, -torch.inf)[:, None, None]
    keys, values = window.unbind(3)
    found = ops.attend_rows(q, keys, values, mask)
    expected = F.scaled_dot_product_attention(
        q.unflatten(1, (n_kv_heads, -1)).double(), keys.double(), values.double(), attn_mask=mask.double()
    ).reshape(n, -1)
    assert close(found, expected, 1.0 + expected.abs())
    for row in range(n):
        one = slice(row, row + 1)
        assert torch.equal(ops.attend_rows(q[one], keys[one], values[one], mask[one]), found[one])
    hidden = window.clone()
    hidden[2, :, 1:] = 7.0
    keys, values = hidden.unbind(3)
    assert torch.equal(ops.attend_rows(q, keys, values, mask)[2], found[2])


def test_fused_kernels_replay_their_bits_from_a_graph() -> None:
    w, x, h = (random(n, 4096, dtype=torch.bfloat16) / 16 for n in (4096, 4, 4))
    q, window = random(4, 32, 128, dtype=torch.bfloat16), random(4, 8, 1024, 2, 128, dtype=torch.bfloat16)
    mask = torch.zeros(4, 1, 1, 1024, device="cuda").bfloat16()

    def work() -> Tensor:
        out = h.clone()
        ops.add_linear_(out, ops.gated_linear(x, w, w), w)
        ops.add_linear_(out, ops.attend_rows(q, *window.unbind(3), mask), w)
        return out

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
