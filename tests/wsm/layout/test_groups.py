"""Group images: every tensor lies aligned, apart from the others, inside an image of whole blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama.config import PRESETS, ModelConfig
from tests.stores import CONFIG, aligned
from wsm.formats.format import Plane
from wsm.layout.groups import (
    BLOCK,
    KINDS,
    TENSOR_ALIGNMENT,
    GroupId,
    GroupLayout,
    InFormat,
    Kind,
    alike_as_one,
    counted,
    gaps,
    image_layout,
    round_up,
    views,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads, shared = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return ModelConfig(
        "any",
        dim=draw(st.integers(1, 700)),
        n_layers=draw(st.integers(1, 4)),
        n_heads=kv_heads * shared,
        n_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 40)),
        ffn_dim=draw(st.integers(1, 900)),
        vocab_size=draw(st.integers(1, 900)),
        tied_embeddings=draw(st.booleans()),
    )


def assert_sound(layout: GroupLayout) -> None:
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset % TENSOR_ALIGNMENT == 0
        assert tensor.offset >= end
        assert tensor.offset - end < TENSOR_ALIGNMENT
        assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        end = tensor.offset + tensor.nbytes
    assert layout.nbytes % BLOCK == 0
    assert 0 <= layout.nbytes - end < BLOCK + TENSOR_ALIGNMENT


@given(config=configs(), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES))
def test_tensors_lie_aligned_and_apart_in_the_order_of_the_model(
    config: ModelConfig, kind: Kind, dtype: torch.dtype
) -> None:
    for layout, specs in (
        (image_layout(config.specs(kind), dtype), config.specs(kind)),
        (image_layout(config.specs(None), dtype), config.specs(None)),
    ):
        assert_sound(layout)
        assert [(tensor.name, tensor.shape) for tensor in layout.tensors] == list(specs)
        assert {tensor.dtype for tensor in layout.tensors} == {dtype}


@given(config=configs(), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES), planes=st.booleans())
def test_tensors_and_gaps_are_every_byte_of_an_image_once(
    config: ModelConfig, kind: Kind, dtype: torch.dtype, planes: bool
) -> None:
    specs = config.specs(kind)
    how = InFormat("any", (Plane("a", torch.uint8, (3, 7)), Plane("b", torch.float16, (5,))))
    layout = image_layout(specs, dtype, {specs[-1].name: how} if planes else {})
    parts = [part for tensor in layout.tensors for part in tensor.planes or (tensor,)]
    covered = [(part.offset, part.offset + part.nbytes) for part in parts]
    covered = sorted([*covered, *((gap.start, gap.stop) for gap in gaps(layout))])
    assert [begin for begin, _ in covered] == [0, *(end for _, end in covered[:-1])]
    assert covered[-1][1] == layout.nbytes


@given(nbytes=st.integers(0, 10**15), unit=st.sampled_from([512, 4096, 65536]))
def test_rounding_up_is_the_least_multiple_that_holds(nbytes: int, unit: int) -> None:
    rounded = round_up(nbytes, unit)
    assert rounded % unit == 0
    assert 0 <= rounded - nbytes < unit


def test_the_groups_of_llama_3_1_70b_waste_no_byte() -> None:
    config = PRESETS["Llama-3.1-70B"]
    attn, ffn = (8192 + 8192 * 8192 * 2 + 1024 * 8192 * 2) * 2, (8192 + 28672 * 8192 * 3) * 2
    assert image_layout(config.specs("attn"), torch.bfloat16).nbytes == attn
    assert image_layout(config.specs("ffn"), torch.bfloat16).nbytes == ffn


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_share_the_image_s_memory(dtype: torch.dtype) -> None:
    layout = image_layout(CONFIG.specs("attn"), dtype)
    image = aligned(layout.nbytes).zero_()
    tensors = views(image, layout)
    for number, tensor in enumerate(tensors.values(), start=1):
        tensor.fill_(number)
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        assert bool((tensor == number).all()), name
    used = sum(tensor.nbytes for tensor in tensors.values())
    assert used <= layout.nbytes
    gaps = torch.ones(layout.nbytes, dtype=torch.bool)
    for place in layout.tensors:
        gaps[place.offset : place.offset + place.nbytes] = False
    assert not image[gaps].any()


def test_equal_images_become_one_and_are_counted() -> None:
    specs = {kind: CONFIG.specs(kind) for kind in KINDS}
    layouts = {GroupId(layer, kind): image_layout(specs[kind], torch.bfloat16) for layer in range(3) for kind in KINDS}
    other = layouts[GroupId(2, "ffn")] = image_layout(specs["ffn"], torch.float32)
    images = {None: image_layout(CONFIG.specs(None), torch.bfloat16), **layouts}
    one = alike_as_one(images)
    assert one == images
    assert len({id(layout) for layout in one.values()}) == 4
    assert sorted(number for _, number in counted(one)) == [1, 2, 3]
    assert sum(number * layout.nbytes for layout, number in counted(images)) == sum(
        lay.nbytes for lay in layouts.values()
    )
    assert [number for layout, number in counted(one) if layout == other] == [1]
