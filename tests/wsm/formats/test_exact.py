"""``exact`` gives back every bit, and refuses planes that it cannot have written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.wsm.formats.matrices import SHAPES, matrix
from wsm.errors import StoreError, UnusableInput
from wsm.formats.exact import BLOCK_WEIGHTS, Exact
from wsm.formats.format import total_bytes

ALWAYS = Exact(pays_below=float("inf"))
SHAPE = (3, BLOCK_WEIGHTS // 2)


def round_trip(weight: Tensor) -> Tensor:
    planes = ALWAYS.encode(weight)
    assert planes is not None
    ALWAYS.check((weight.shape[0], weight.shape[1]), planes)
    out = torch.full_like(weight, 7.0)
    ALWAYS.decode_(planes, out)
    return out


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def test_every_bfloat16_comes_back() -> None:
    """NaNs with their payloads, infinities, denormals and both zeros among them."""
    patterns = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).view(256, 256)
    assert same_bits(round_trip(patterns), patterns)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    cols=st.sampled_from([1, 2, 3, 100, 576, 1001, 30000, BLOCK_WEIGHTS - 1, BLOCK_WEIGHTS, BLOCK_WEIGHTS + 1]),
    strange=st.floats(0, 1),
    size=st.sampled_from([1e-38, 1e-3, 1.0, 1e38]),
    seed=st.integers(0, 1 << 30),
)
def test_mixtures_of_all_bfloat16_come_back(rows: int, cols: int, strange: float, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    usual = (torch.randn(rows, cols, generator=generator) * size).bfloat16()
    anything = torch.randint(0, 1 << 16, (rows, cols), generator=generator).to(torch.int16).view(torch.bfloat16)
    weight = torch.where(torch.rand(rows, cols, generator=generator) < strange, anything, usual)
    assert same_bits(round_trip(weight), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_come_back(shape: tuple[int, int]) -> None:
    weight = matrix(shape, torch.bfloat16)
    assert same_bits(round_trip(weight), weight)


def test_normal_weights_take_one_and_a_half_bytes() -> None:
    weight = (torch.randn(1024, 1024) * 0.02).bfloat16()
    planes = Exact().encode(weight)
    assert planes is not None
    taken = sum(plane.nbytes for plane in planes.values()) / weight.numel()
    assert 1.5 < taken < 1.502


def test_a_matrix_without_a_usual_size_stays_plain() -> None:
    half_pruned = torch.where(torch.rand(256, 256) < 0.5, 0.0, torch.randn(256, 256)).bfloat16()
    assert Exact().encode(half_pruned) is None
    assert Exact().encode(torch.zeros(256, 256).bfloat16()) is not None


def test_no_matrix_takes_more_than_the_bound() -> None:
    for seed in range(20):
        strange = torch.rand(64, 640) < seed / 40
        weight = torch.where(strange, 0.0, torch.randn(64, 640)).bfloat16()
        planes = Exact().encode(weight)
        bound = Exact().most_bytes((64, 640), torch.bfloat16)
        assert bound >= weight.nbytes
        if planes is not None:
            assert sum(-(-plane.nbytes // 512) * 512 for plane in planes.values()) <= bound
    assert Exact().most_bytes((1, 1), torch.bfloat16) >= total_bytes([])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnusableInput, match="holds bfloat16"):
        Exact().encode(torch.zeros(2, 2, dtype=dtype))


def spoiled(planes: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return planes | {name: change(planes[name].long()).to(planes[name].dtype)}


def set_at(at: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(plane: Tensor) -> Tensor:
        plane[at] = value
        return plane

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("base", set_at(0, 242), "begins at exponent 242"),
        ("counts", set_at(0, 1 << 20), "counts of escapes"),
        ("counts", set_at(-1, 2), "counts of escapes"),
        ("counts", lambda counts: counts.roll(1), "counts of escapes"),
        ("places", lambda places: places.flip(0), "out of order"),
        ("places", set_at(1, 0), "out of order"),
        ("places", set_at(-1, BLOCK_WEIGHTS - 1), "is at weight"),
        ("places", lambda places: places - 1, "whose code is not the escape"),
        ("codes", lambda codes: codes * 0, "whose code is not the escape"),
        ("codes", set_at(0, 15), "27 codes are the escape, and 26 are listed"),
        ("codes", set_at(-1, 0xF0), "27 codes are the escape, and 26 are listed"),
        ("places", lambda places: places[:-1], "plane exponents"),
        ("exponents", lambda exponents: exponents[:-1], "plane exponents"),
        ("signs", lambda signs: signs[:-2], "plane signs"),
        ("counts", lambda counts: counts[:-1], "plane counts"),
    ],
)
def test_planes_that_no_matrix_has_are_refused(name: str, change: Callable[[Tensor], Tensor], says: str) -> None:
    weight = (torch.randn(3, BLOCK_WEIGHTS // 2, generator=torch.Generator().manual_seed(3)) * 0.02).bfloat16()
    weight[:, 10:14] = 300.0
    planes = ALWAYS.encode(weight)
    assert planes is not None
    ALWAYS.check(SHAPE, planes)
    with pytest.raises(StoreError, match=says):
        ALWAYS.check(SHAPE, spoiled(planes, name, change))


def test_a_plane_that_is_missing_is_named() -> None:
    planes = ALWAYS.encode(matrix((4, 100), torch.bfloat16))
    assert planes is not None
    for name in planes:
        with pytest.raises(StoreError, match=name):
            ALWAYS.check((4, 100), {other: plane for other, plane in planes.items() if other != name})
