"""GGUF's block types: the values of the ``gguf`` package bit for bit, and blocks that are refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.wsm.formats.matrices import block_shapes, matrix, random_blocks, scales_of
from wsm.errors import StoreError, UnusableInput
from wsm.formats import format as formats
from wsm.formats.gguf_blocks import TYPES, BlockType
from wsm.formats.registry import BLOCK_TYPES


def blocks_of(form: BlockType, shape: tuple[int, int], seed: int, *, quantised: bool) -> Tensor:
    """``quantised`` by the package where it can; else any bytes at all, with scales that are finite."""
    if quantised:
        with contextlib.suppress(NotImplementedError):
            weight = matrix(shape, torch.float32, seed).numpy()
            return torch.from_numpy(quantize(weight, GGMLQuantizationType[form.name.upper()]))
    return random_blocks(form, shape, seed)


def by_the_package(form: BlockType, blocks: Tensor) -> Tensor:
    return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[form.name.upper()]))


def decoded(form: BlockType, blocks: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    out = torch.full(shape, 7.0, dtype=dtype)
    form.check(shape, {"blocks": blocks})
    form.decode_({"blocks": blocks}, out)
    return out


def test_the_types_are_those_of_the_registry_and_their_sizes_the_packages() -> None:
    assert tuple(TYPES) == BLOCK_TYPES
    for name, form in TYPES.items():
        assert (form.weights, form.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1 << 30), quantised=st.booleans())
def test_float32_is_bit_equal_to_the_package_and_16_bits_are_rounded_once(
    name: str, data: st.DataObject, seed: int, quantised: bool
) -> None:
    form = TYPES[name]
    shape = data.draw(st.sampled_from(block_shapes(form)))
    blocks = blocks_of(form, shape, seed, quantised=quantised)
    expected = by_the_package(form, blocks)
    assert torch.equal(decoded(form, blocks, shape, torch.float32).view(torch.int32), expected.view(torch.int32))
    for dtype in (torch.bfloat16, torch.float16):
        found = decoded(form, blocks, shape, dtype)
        assert torch.equal(found.view(torch.int16), expected.to(dtype).view(torch.int16))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_pieces_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = TYPES[name]
    blocks = random_blocks(form, (70, 768), 5)
    whole = decoded(form, blocks, (70, 768), torch.float32)
    for piece in (1, 700, 5 * 256):
        monkeypatch.setattr(formats, "CPU_PIECE", piece)
        assert torch.equal(decoded(form, blocks, (70, 768), torch.float32).view(torch.int32), whole.view(torch.int32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7C01, 0xFFFF])
def test_a_scale_that_is_no_number_is_refused(name: str, half: int) -> None:
    form = TYPES[name]
    for at in scales_of(form):
        blocks = random_blocks(form, (7, 512), 1)
        blocks[6, blocks.shape[1] - form.nbytes + at] = half & 0xFF
        blocks[6, blocks.shape[1] - form.nbytes + at + 1] = half >> 8
        with pytest.raises(StoreError, match=f"{name}: a scale in the plane blocks is NaN or infinity"):
            form.check((7, 512), {"blocks": blocks})


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_planes_that_no_matrix_has_are_refused(name: str) -> None:
    form = TYPES[name]
    blocks = random_blocks(form, (7, 512), 1)
    for planes in ({}, {"blocks": blocks[:-1]}, {"blocks": blocks[:, :-1]}, {"blocks": blocks.to(torch.int16)},
                   {"values": blocks}, {"blocks": blocks, "scales": blocks}):  # fmt: skip
        with pytest.raises(StoreError, match=name):
            form.check((7, 512), planes)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_that_blocks_do_not_fill_are_refused(name: str) -> None:
    form = TYPES[name]
    cols = 3 * form.weights + 16
    with pytest.raises(
        UnusableInput, match=f"{name}, whose blocks of {form.weights} weights do not fill a row of {cols}"
    ):
        form.planes((4, cols))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_nothing_is_encoded_into_blocks(name: str) -> None:
    with pytest.raises(UnusableInput, match=f"blocks of {name} come from a GGUF file"):
        TYPES[name].encode(matrix((4, 256), torch.bfloat16))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_seeded_blocks_hold_weights_around_0_of_the_spread_that_was_asked_for(name: str) -> None:
    form = TYPES[name]
    blocks = form.seeded(1025, 0.011, seed=3)
    assert torch.equal(blocks, form.seeded(1025, 0.011, seed=3))
    assert not torch.equal(blocks, form.seeded(1025, 0.011, seed=4))
    values = decoded(form, blocks.view(1, -1), (1, 1025 * form.weights), torch.float32)
    assert float(values.std()) == pytest.approx(0.011, rel=0.03)
    assert abs(float(values.mean())) < 0.05 * 0.011
    assert len(blocks.unique(dim=0)) == 1025


@pytest.mark.parametrize(
    ("name", "bytes_a_weight"),
    [("q4_0", 0.5625), ("q4_1", 0.625), ("q5_0", 0.6875), ("q5_1", 0.75), ("q8_0", 1.0625), ("q4_K", 0.5625),
     ("q5_K", 0.6875), ("q6_K", 0.8203125)],
)  # fmt: skip
def test_a_matrix_takes_what_the_table_says(name: str, bytes_a_weight: float) -> None:
    assert TYPES[name].most_bytes((8192, 28672), torch.bfloat16) == 8192 * 28672 * bytes_a_weight
