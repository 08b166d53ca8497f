"""On a CUDA device: every format's decoder gives the bits of the CPU's, and packed products do not mix rows."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.wsm.formats.matrices import FORMATS, SHAPES, matrix
from wsm.formats import backend
from wsm.formats.exact import Exact
from wsm.formats.format import WeightFormat
from wsm.formats.integer import Integer
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


def test_exact_brings_back_every_bfloat16() -> None:
    patterns = torch.arange(1 << 16).repeat(3)[torch.randperm(3 << 16)].to(torch.int16).view(torch.bfloat16).view(3, -1)
    form = Exact(pays_below=9.0)
    planes = form.encode(patterns)
    assert planes is not None
    assert torch.equal(bits(decoded(form, on_gpu(planes), patterns.cuda())), bits(patterns))


@pytest.mark.parametrize("name", FORMATS)
def test_decoders_can_be_captured(name: str) -> None:
    form, weight = get(name), matrix(LARGE, torch.bfloat16)
    planes = form.encode(weight)
    assert planes is not None
    there, out = on_gpu(planes), torch.empty_like(weight, device="cuda")
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
@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("int")])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (576, 576), (100, 100)])
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    form = Integer.named(name)
    assert form is not None
    weight = matrix(shape, dtype)
    planes = on_gpu(form.encode(weight))
    x = torch.randn(8, shape[1], device="cuda").to(dtype)
    together = form.linear(x, planes, shape)
    assert together is not None
    for place in range(7):
        two = form.linear(x[place : place + 2], planes, shape)
        others = form.linear(x.roll(3, 0)[: 5 + place % 3], planes, shape)
        assert two is not None
        assert torch.equal(two, together[place : place + 2])
        assert others is not None
        assert all(torch.equal(row, together[(at - 3) % 8]) for at, row in enumerate(others))
    ones = [form.linear(row, planes, shape) for row in x.split(1)]  # a kernel of its own, of other sums
    alone = torch.cat([one for one in ones if one is not None])
    values = decoded(form, planes, weight.cuda()).double()
    expected = x.double() @ values.T
    size = x.double().abs() @ values.abs().T
    for found in (together, alone):
        assert ((found.double() - expected).abs() <= 0.01 * size).all()
        assert (found.double() - expected).norm() <= 0.005 * expected.norm()


def test_a_packed_product_goes_into_a_part_of_a_wider_tensor() -> None:
    form, weight = get("int4"), matrix((1024, 4096), torch.bfloat16)
    planes = form.encode(weight)
    assert planes is not None
    x, wide = torch.randn(3, 4096, device="cuda").bfloat16(), torch.zeros(3, 1536, device="cuda").bfloat16()
    form.linear(x, on_gpu(planes), (1024, 4096), out=wide[:, 256:1280])
    alone = form.linear(x, on_gpu(planes), (1024, 4096))
    assert torch.equal(wide[:, 256:1280], alone)
    assert not wide[:, :256].any()
    assert not wide[:, 1280:].any()


def test_many_rows_and_float32_are_decoded_first() -> None:
    form, weight = get("int4"), matrix((64, 256), torch.bfloat16)
    planes = form.encode(weight)
    assert planes is not None
    there = on_gpu(planes)
    assert form.linear(torch.randn(17, 256, device="cuda").bfloat16(), there, (64, 256)) is None
    assert form.linear(torch.randn(1, 256, device="cuda"), there, (64, 256)) is None
