"""On a CUDA device: every format's decoder gives the bits of the CPU's, and packed products do not mix rows."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.wsm.formats.matrices import FORMATS, SHAPES, block_shapes, matrix, planes_of, random_blocks
from wsm.formats import backend
from wsm.formats.exact import Exact
from wsm.formats.format import WeightFormat
from wsm.formats.gguf_blocks import TYPES, BlockType
from wsm.formats.registry import get

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
LARGE = (2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_gpu(planes: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: plane.cuda() for name, plane in planes.items()}


def decoded(form: WeightFormat, planes: dict[str, Tensor], like: Tensor) -> Tensor:
    out = torch.full_like(like, 7.0)
    form.decode_(planes, out)
    return out


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16).cpu()


def test_triton_works_here() -> None:
    assert backend.decoder(torch.device("cuda")).startswith("Triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_decoders_give_the_bits_of_the_reference(name: str, dtype: torch.dtype) -> None:
    if name == "exact" and dtype != torch.bfloat16:
        pytest.skip("exact holds bfloat16 alone")
    form = Exact(pays_below=9.0) if name == "exact" else get(name)
    for shape in (*SHAPES, LARGE):
        weight = matrix(shape, dtype)
        planes = form.encode(weight)
        assert planes is not None
        expected = bits(decoded(form, planes, weight))
        assert torch.equal(bits(decoded(form, on_gpu(planes), weight.cuda())), expected), shape
        with mock.patch.object(backend, "_loaded", return_value=(None, "torch")):
            assert torch.equal(bits(decoded(form, on_gpu(planes), weight.cuda())), expected), shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TYPES)
def test_decoders_of_ggufs_types_give_the_bits_of_the_reference(name: str, dtype: torch.dtype) -> None:
    form = TYPES[name]
    for shape in (*block_shapes(form), LARGE):
        planes, like = {"blocks": random_blocks(form, shape)}, torch.empty(shape, dtype=dtype)
        expected = bits(decoded(form, planes, like))
        assert torch.equal(bits(decoded(form, on_gpu(planes), like.cuda())), expected), shape
        with mock.patch.object(backend, "_loaded", return_value=(None, "torch")):
            assert torch.equal(bits(decoded(form, on_gpu(planes), like.cuda())), expected), shape


def test_exact_brings_back_every_bfloat16() -> None:
    patterns = torch.arange(1 << 16).repeat(3)[torch.randperm(3 << 16)].to(torch.int16).view(torch.bfloat16).view(3, -1)
    form = Exact(pays_below=9.0)
    planes = form.encode(patterns)
    assert planes is not None
    assert torch.equal(bits(decoded(form, on_gpu(planes), patterns.cuda())), bits(patterns))


@pytest.mark.parametrize("name", [*FORMATS, *TYPES])
def test_decoders_can_be_captured(name: str) -> None:
    form, weight = get(name), matrix(LARGE, torch.bfloat16)
    there, out = on_gpu(planes_of(form, weight)), torch.empty_like(weight, device="cuda")
    form.decode_(there, out)
    graph, expected = torch.cuda.CUDAGraph(), out.clone()
    with torch.cuda.graph(graph):
        form.decode_(there, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_encoding_exactly_gives_the_same_bytes_on_both_devices() -> None:
    weight = matrix(LARGE, torch.bfloat16)
    here, there = get("exact").encode(weight), get("exact").encode(weight.cuda())
    assert here is not None
    assert there is not None
    assert all(
        torch.equal(plane.view(torch.uint8), there[name].cpu().view(torch.uint8)) for name, plane in here.items()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*(name for name in FORMATS if name.startswith("int")), *TYPES])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (576, 576), (100, 100), (70, 768)])
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    form, weight = get(name), matrix(shape, dtype)
    if isinstance(form, BlockType) and shape[1] % form.weights:
        pytest.skip("its blocks do not fill such a row")
    planes = on_gpu(planes_of(form, weight))
    x = torch.randn(8, shape[1], device="cuda").to(dtype)
    together = form.linear(x, planes, shape)
    assert together is not None
    for place in range(8):
        alone = form.linear(x[place : place + 1], planes, shape)
        others = form.linear(x.roll(3, 0)[: 5 + place % 3], planes, shape)
        assert alone is not None
        assert torch.equal(alone[0], together[place])
        assert others is not None
        assert all(torch.equal(row, together[(at - 3) % 8]) for at, row in enumerate(others))
    values = decoded(form, planes, weight.cuda()).double()
    expected = x.double() @ values.T
    size = x.double().abs() @ values.abs().T
    assert ((together.double() - expected).abs() <= 0.01 * size).all()
    assert (together.double() - expected).norm() <= 0.005 * expected.norm()


@pytest.mark.parametrize("name", ["int4", "q4_1", "q6_K"])
def test_a_packed_product_goes_into_a_part_of_a_wider_tensor(name: str) -> None:
    form, weight = get(name), matrix((1024, 4096), torch.bfloat16)
    planes = planes_of(form, weight)
    x, wide = torch.randn(3, 4096, device="cuda").bfloat16(), torch.zeros(3, 1536, device="cuda").bfloat16()
    form.linear(x, on_gpu(planes), (1024, 4096), out=wide[:, 256:1280])
    alone = form.linear(x, on_gpu(planes), (1024, 4096))
    assert torch.equal(wide[:, 256:1280], alone)
    assert not wide[:, :256].any()
    assert not wide[:, 1280:].any()


@pytest.mark.parametrize("name", ["int4", "q4_1", "q6_K"])
def test_many_rows_and_float32_are_decoded_first(name: str) -> None:
    form = get(name)
    there = on_gpu(planes_of(form, matrix((64, 256), torch.bfloat16)))
    assert form.linear(torch.randn(17, 256, device="cuda").bfloat16(), there, (64, 256)) is None
    assert form.linear(torch.randn(1, 256, device="cuda"), there, (64, 256)) is None
