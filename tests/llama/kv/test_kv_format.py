"""Records of the KV cache: exact in the model dtype, within half a scale in int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.kv.format import KVFormat, kv_format
from wsm.errors import UnusableInput

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""How far the dtype's own rounding may move a value, in parts of it."""


def empty_window(form: KVFormat, rows: int, n_kv: int, tokens: int = 256) -> Tensor:
    return torch.zeros(rows, n_kv, tokens, 2, form.record_bytes, dtype=torch.uint8)


def random_kv(n: int, n_kv: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, n_kv, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Within half a scale of each head, and the rounding of the dtype."""
    scales = wanted.float().abs().amax(dim=-1, keepdim=True) / 127
    allowed = scales * (0.5 + 1e-4) + wanted.float().abs().add(scales) * ROUNDING[wanted.dtype] + 1e-37
    if wanted.dtype == torch.float16:
        allowed = allowed + 2**-25  # half of its smallest number
    assert bool(((found.float() - wanted.float()).abs() <= allowed).all())


def assert_holds(form: KVFormat, keys: Tensor, values: Tensor, new: Tensor, exact: bool) -> None:
    """``keys`` and ``values`` ``[n, n_kv, head_dim]`` are those of ``new`` ``[n, 2, n_kv, head_dim]``."""
    for found, wanted in ((keys, new[:, 0]), (values, new[:, 1])):
        assert found.dtype == wanted.dtype
        if exact:
            assert torch.equal(found, wanted)
        else:
            assert_near(found, wanted)


@pytest.mark.parametrize("name", ["auto", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_tokens_are_read_where_they_were_written(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """A span into one row, then a token each into some rows; all other places stay zero."""
    rows, n_kv, head_dim = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), 8 * data.draw(st.integers(1, 4))
    form = kv_format(name, dtype, head_dim)
    window = empty_window(form, rows, n_kv)
    begin, length = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 56))
    span = random_kv(length, n_kv, head_dim, dtype, seed=1)
    form.write_span_(window[0], begin, span)
    keys, values = form.read(window[0], begin + length)
    assert keys.shape == (n_kv, begin + length, head_dim)
    assert_holds(form, keys[:, begin:].transpose(0, 1), values[:, begin:].transpose(0, 1), span, name == "auto")
    assert not keys[:, :begin].any()

    taken = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, unique=True))
    places = data.draw(st.lists(st.integers(0, 255), min_size=len(taken), max_size=len(taken)))
    at, positions = torch.tensor(taken), torch.tensor(places)
    before = window.clone()
    new = random_kv(len(taken), n_kv, head_dim, dtype, seed=2)
    form.write_(window, at, positions, new)
    keys, values = form.read(window, 256)
    assert keys.shape == values.shape == (rows, n_kv, 256, head_dim)
    assert_holds(form, keys[at, :, positions], values[at, :, positions], new, name == "auto")
    window[at, :, positions] = before[at, :, positions]
    assert torch.equal(window, before), "a token that was not written has changed"


@settings(max_examples=100, deadline=None)
@given(
    head=st.lists(
        st.floats(-65504, 65504, width=32) | st.sampled_from([0.0, -0.0, 1e-30, -1e-41, 3e38]), min_size=8, max_size=8
    )
)
def test_int8_is_off_by_half_a_scale_at_most(head: list[float]) -> None:
    form = kv_format("int8", torch.float32, 8)
    window = empty_window(form, 1, 1)
    new = torch.tensor(head).expand(1, 2, 1, 8)
    form.write_(window, torch.tensor([0]), torch.tensor([7]), new)
    keys, values = form.read(window, 8)
    assert_near(keys[0, 0, 7], new[0, 0, 0])
    assert torch.equal(keys, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_keeps_the_largest_value_of_a_head_and_its_sign(dtype: torch.dtype) -> None:
    form = kv_format("int8", dtype, 64)
    window = empty_window(form, 1, 2)
    new = random_kv(40, 2, 64, dtype)
    form.write_span_(window[0], 0, new)
    keys, _ = form.read(window[0], 40)
    wanted = new[:, 0].transpose(0, 1)
    most = wanted.float().abs().argmax(dim=-1, keepdim=True)
    found, largest = keys.gather(-1, most).float(), wanted.gather(-1, most).float()
    assert bool(((found - largest).abs() <= largest.abs() * ROUNDING[dtype]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_of_zeros_is_zeros_and_fresh_memory_is_no_nan(dtype: torch.dtype) -> None:
    form = kv_format("int8", dtype, 16)
    window = empty_window(form, 2, 2)
    for found in form.read(window, 256):
        assert torch.equal(found, torch.zeros(2, 2, 256, 16, dtype=dtype))
    new = random_kv(2, 2, 16, dtype)
    new[0, 0, 1] = 0
    form.write_(window, torch.tensor([0, 1]), torch.tensor([3, 3]), new)
    keys, values = form.read(window, 4)
    assert not keys[0, 1].any()
    assert keys[0, 0, 3].any()
    assert bool(torch.isfinite(keys).all() and torch.isfinite(values).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_does_not_hide_a_value_that_is_no_number(bad: float) -> None:
    form = kv_format("int8", torch.float32, 8)
    window = empty_window(form, 1, 1)
    new = torch.ones(1, 2, 1, 8)
    new[0, 0, 0, 5] = bad
    form.write_span_(window[0], 0, new)
    keys, values = form.read(window[0], 1)
    assert not torch.isfinite(keys).all()
    assert torch.isfinite(values).all()


def test_plain_reads_are_views_of_the_window() -> None:
    form = kv_format("auto", torch.bfloat16, 32)
    window = empty_window(form, 3, 2)
    for part in (window, window[1], window[1:]):
        for found in form.read(part, 17):
            assert found.untyped_storage().data_ptr() == window.untyped_storage().data_ptr()
    keys, values = form.read(window, 17)
    keys.fill_(1)
    values.fill_(2)
    assert [int(form.read(window, 18)[which].float().sum()) for which in (0, 1)] == [3 * 2 * 17 * 32, 3 * 2 * 17 * 64]


@pytest.mark.parametrize("name", ["auto", "int8"])
def test_new_tokens_need_not_be_contiguous_nor_the_window_whole(name: str) -> None:
    """As in the model: keys and values are a stretch of the fused projection, the rows some of a unit's."""
    form = kv_format(name, torch.bfloat16, 16)
    fused = torch.randn(5, 4 + 2 * 2, 16).to(torch.bfloat16)
    new = fused[:, 4:].unflatten(1, (2, 2))
    assert not new.is_contiguous()
    window, straight = empty_window(form, 8, 2, 512), empty_window(form, 8, 2, 512)
    rows, positions = torch.arange(5), torch.tensor([0, 300, 511, 2, 256])
    form.write_(window[2:7], rows, positions, new)
    form.write_(straight, rows + 2, positions, new.contiguous())
    assert torch.equal(window, straight)
    form.write_span_(window[0], 250, new)
    form.write_span_(straight[0], 250, new.contiguous())
    assert torch.equal(window, straight)
    assert window[0, :, 250:255].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_of_an_int8_record_are_values_scale_zeros(dtype: torch.dtype) -> None:
    form = kv_format("int8", dtype, 8)
    assert form.record_bytes == 16
    window = torch.full((1, 1, 256, 2, 16), 0xEE, dtype=torch.uint8)
    values = torch.tensor([127, -127, 0, 1, 2, 3, -64, 5], dtype=dtype) * 0.5
    form.write_(window, torch.tensor([0]), torch.tensor([9]), values.expand(1, 2, 1, 8))
    wanted = [127, 129, 0, 1, 2, 3, 192, 5, 0x00, 0x00, 0x00, 0x3F, 0, 0, 0, 0]
    assert window[0, 0, 9].tolist() == [wanted, wanted]
    assert window[0, 0, 10].tolist() == [[0xEE] * 16] * 2


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_block_is_a_multiple_of_4096_bytes_in_every_format(head_dim: int) -> None:
    assert [kv_format(name, torch.bfloat16, head_dim).record_bytes for name in ("auto", "int8")] == [
        2 * head_dim,
        head_dim + 8,
    ]
    assert all(
        256 * 2 * kv_format(name, torch.bfloat16, head_dim).record_bytes % 4096 == 0 for name in ("auto", "int8")
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_int8_is_within_1_3_percent(dtype: torch.dtype) -> None:
    """Of the output's norm; normal data, 512 positions, heads of 128 values: measured 0.84 to 1.04 % in every dtype."""
    form = kv_format("int8", dtype, 128)
    window = empty_window(form, 1, 2, 512)
    new = random_kv(512, 2, 128, dtype)
    form.write_span_(window[0], 0, new)
    keys, values = form.read(window, 512)
    query = torch.randn(1, 2, 4, 128, generator=torch.Generator().manual_seed(1))
    exact = new.float().permute(1, 2, 0, 3).unsqueeze(1)
    found = F.scaled_dot_product_attention(query, keys.float(), values.float())
    wanted = F.scaled_dot_product_attention(query, exact[0], exact[1])
    error = float((found - wanted).norm() / wanted.norm())
    assert 0.001 < error < 0.013


def test_what_cannot_be_used_is_refused_with_the_flag_s_name() -> None:
    with pytest.raises(UnusableInput, match=r"--kv-dtype must be auto or int8, not 'fp8'"):
        kv_format("fp8", torch.float32, 64)
    with pytest.raises(UnusableInput, match=r"--kv-dtype int8 needs heads of a multiple of 8 values.* 20"):
        kv_format("int8", torch.float32, 20)
    assert kv_format("auto", torch.float32, 20).record_bytes == 80


@pytest.mark.parametrize("name", ["auto", "int8"])
def test_nothing_waits_for_the_device(name: str) -> None:
    """Tensors without data raise whenever the host asks for a value."""
    form = kv_format(name, torch.bfloat16, 16)
    with torch.device("meta"):
        window = torch.empty(3, 2, 512, 2, form.record_bytes, dtype=torch.uint8)
        new = torch.empty(3, 2, 2, 16, dtype=torch.bfloat16)
        rows, positions = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    form.write_(window, rows, positions, new)
    form.write_span_(window[0], 255, new)
    keys, values = form.read(window, 300)
    assert keys.shape == values.shape == (3, 2, 300, 16)
    with pytest.raises(RuntimeError, match="meta"):
        keys[0, 0, 0, 0].item()
