"""The fused kernels on a CUDA device: what torch computes, and the same bits whatever stands beside a row."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.fused import ops
from llama.kv.format import kv_format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
DTYPES = [torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def close(found: Tensor, expected: Tensor, size: Tensor | float) -> bool:
    """Within roundings of the dtype of ``found``, for sums of the ``size``."""
    return bool(((found.double() - expected).abs() <= 0.01 * size + 1e-3).all())


def by_torch() -> AbstractContextManager[object]:
    return mock.patch.object(ops, "_launchers", return_value=None)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("dim", [576, 4096, 8192, 16384])
def test_a_norm_is_that_of_torch_and_does_not_depend_on_other_rows(dim: int, dtype: torch.dtype) -> None:
    x, weight = random(33, dim, dtype=dtype), random(dim, dtype=dtype)
    found, wide = ops.rms_norm(x, weight, 1e-5), x.double()
    expected = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert close(found, expected, expected.abs())
    for first, rows in ((0, 1), (5, 1), (3, 17)):
        assert torch.equal(ops.rms_norm(x[first : first + rows], weight, 1e-5), found[first : first + rows])
    part, summed = random(33, dim, dtype=dtype), x.clone()
    normed = ops.add_rms_norm(summed, part, weight, 1e-5)
    assert torch.equal(summed, x + part)
    assert torch.equal(normed, ops.rms_norm(x + part, weight, 1e-5))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_gating_gives_the_bits_of_torch(dtype: torch.dtype) -> None:
    gate, up = random(33, 14336, dtype=dtype) * 4, random(33, 14336, dtype=dtype)
    gate[0, :4] = torch.tensor([-300.0, -90.0, 90.0, 300.0])
    with by_torch():
        expected = ops.gate_(gate.clone(), up)
    found = gate.clone()
    assert ops.gate_(found, up) is found
    assert torch.equal(found, expected)
    apart = torch.cat((gate, up), dim=1)[:, : gate.shape[1]]
    assert torch.equal(ops.gate_(apart, up), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols"), [(14336, 4096), (4096, 14336), (128256, 4096), (1536, 576), (576, 1536), (4096, 7168), (7, 515)]
)
def test_a_product_with_one_row_is_rounded_once_and_gated_in_one_kernel_as_in_three(
    rows: int, cols: int, dtype: torch.dtype
) -> None:
    x, first, h = random(1, cols, dtype=dtype), random(rows, cols, dtype=dtype), random(1, rows, dtype=dtype)
    second = random(rows, cols, dtype=dtype)
    launch = ops.launchers_for(x)
    assert launch is not None
    assert launch.can_multiply(x, first)
    found, expected = ops.linear(x, first), (x.double() @ first.double().t())
    half_a_step = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5 * cols
    assert ((found.double() - expected).abs() <= half_a_step).all()
    added = h.clone()
    ops.add_linear_(added, x, first)
    assert close(added, h.double() + expected, 1.0 + expected.abs())
    assert torch.equal(ops.gated_linear(x, first, second), ops.gate_(found, ops.linear(x, second)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "dim"), [(8, 2, 128), (9, 3, 64), (4, 4, 96), (5, 1, 80), (3, 3, 256)]
)
def test_heads_are_rotated_and_written_as_by_torch(n_heads: int, n_kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    n, rotated, form = 3, n_heads + n_kv_heads, kv_format("auto", dtype, dim)
    heads = random(n, rotated + n_kv_heads, dim, dtype=dtype)
    freqs_cis = torch.polar(torch.ones(n, 1, dim // 2), torch.rand(n, 1, dim // 2) * 9).cuda()
    places, positions = torch.arange(n, device="cuda"), torch.tensor([7, 0, 255], device="cuda")

    def rotate_and_write() -> tuple[Tensor, Tensor]:
        turned, window = heads.clone(), torch.zeros(n, n_kv_heads, 256, 2, dim, dtype=dtype, device="cuda")
        form.rotate_and_write_(window, places, positions, turned, n_heads, freqs_cis)
        return turned, window

    turned, window = rotate_and_write()
    with by_torch():
        expected, written = rotate_and_write()
    alone = heads.clone()
    ops.rotate_(alone, rotated, freqs_cis)
    assert torch.equal(alone, turned)
    assert close(turned, expected.double(), 1.0 + expected.double().abs())
    assert torch.equal(turned[:, rotated:], heads[:, rotated:])
    assert not torch.equal(turned[:, rotated - 1], heads[:, rotated - 1])
    assert close(window, written.double(), 1.0 + written.double().abs())
    assert torch.equal(window[places, :, positions].transpose(1, 2).flatten(1, 2), turned[:, n_heads:])
    window[places, :, positions] = 0
    assert not window.any()


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "dim"), [(32, 8, 128), (64, 8, 128), (9, 3, 64), (4, 4, 96), (5, 1, 80), (20, 1, 256)]
)
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


def test_a_window_of_more_than_2_gib_values_is_written_and_attended_to_its_end() -> None:
    n, n_kv_heads, tokens, dim = 130, 8, 8192, 128
    window = torch.zeros(n, n_kv_heads, tokens, 2, dim, dtype=torch.bfloat16, device="cuda")
    assert window.numel() > 1 << 31
    heads, form = random(n, 16 + 2 * n_kv_heads, dim, dtype=torch.bfloat16), kv_format("auto", torch.bfloat16, dim)
    freqs_cis = torch.polar(torch.ones(n, 1, dim // 2), torch.rand(n, 1, dim // 2)).cuda()
    places, positions = torch.arange(n, device="cuda"), torch.full((n,), tokens - 1, device="cuda")
    form.rotate_and_write_(window.view(torch.uint8), places, positions, heads, 16, freqs_cis)
    assert torch.equal(window[:, :, -1].transpose(1, 2).flatten(1, 2), heads[:, 16:])
    assert not window[:, :, :-1].any()
    mask, (keys, values) = torch.zeros(n, 1, 1, tokens, device="cuda").bfloat16(), window.unbind(3)
    found = ops.attend_rows(heads[:, :16], keys, values, mask)
    last = slice(n - 1, n)
    assert found[last].any()
    assert torch.equal(ops.attend_rows(heads[last, :16], keys[last], values[last], mask[last]), found[last])


def test_fused_kernels_replay_their_bits_from_a_graph() -> None:
    x, up, weight = (random(n, 4096, dtype=torch.bfloat16) for n in (4, 4, 1))
    heads, window = random(4, 32, 128, dtype=torch.bfloat16), random(4, 8, 1024, 2, 128, dtype=torch.bfloat16)
    freqs_cis = torch.polar(torch.ones(4, 1, 64), torch.rand(4, 1, 64)).cuda()
    mask = torch.zeros(4, 1, 1, 1024, device="cuda").bfloat16()

    def work() -> Tensor:
        q = heads.clone()
        ops.rotate_(q, 32, freqs_cis)
        out = ops.attend_rows(q, *window.unbind(3), mask)
        return ops.gate_(ops.rms_norm(x + out, weight[0], 1e-5), up)

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
