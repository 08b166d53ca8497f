"""``fp8``, ``int8`` and ``int4``: how far off a value can be, the rule for values, and planes that are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.wsm.formats.matrices import FORMATS, SHAPES, matrix
from wsm.errors import StoreError, UnusableInput
from wsm.formats.fp8 import Float8
from wsm.formats.integer import Integer
from wsm.formats.registry import NAMES, get

LOSSY = [name for name in FORMATS if name != "exact"]
INTEGERS = [name for name in FORMATS if name.startswith("int")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def encoded(name: str, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
    planes = get(name).encode(weight, importance)
    assert planes is not None
    get(name).check((weight.shape[0], weight.shape[1]), planes)
    return planes


def decoded(name: str, planes: dict[str, Tensor], like: Tensor) -> Tensor:
    out = torch.full_like(like, 7.0)
    get(name).decode_(planes, out)
    return out


def integer(name: str) -> Integer:
    form = Integer.named(name)
    assert form is not None
    return form


@pytest.mark.parametrize("name", LOSSY)
@settings(max_examples=12, deadline=None)
@given(shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES), size=st.sampled_from([1e-3, 0.02, 50.0]),
       seed=st.integers(0, 1 << 30))  # fmt: skip
def test_no_value_is_further_off_than_half_a_step(
    name: str, shape: tuple[int, int], dtype: torch.dtype, size: float, seed: int
) -> None:
    weight = (matrix(shape, torch.float32, seed) * size * 50).to(dtype)
    off = (decoded(name, encoded(name, weight), weight).float() - weight.float()).abs()
    eps, subnormal = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (off <= 1.02 * most_off(name, weight) + eps * weight.float().abs() + subnormal).all()


def most_off(name: str, weight: Tensor) -> Tensor:
    """Half a step of each weight's group, and what rounding the scale adds at its ends; the zero may be off by half."""
    wide = weight.float()
    if name.startswith("fp8"):
        least = (wide.abs().amax(1, keepdim=True) if name == "fp8" else wide.abs().amax()) / 448 / 512
        return torch.maximum(wide.abs() / 16, least)
    form = integer(name)
    width = form.group or weight.shape[1]
    steps = torch.empty_like(wide)
    for begin in range(0, weight.shape[1], width):
        part = wide[:, begin : begin + width]
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        span = (high - low) / ((1 << form.bits) - 1)
        half = torch.maximum(high / ((1 << form.bits - 1) - 1), -low / (1 << form.bits - 1))
        steps[:, begin : begin + width] = span if form.has_zero else half
    scales = torch.finfo(getattr(torch, form.scale))
    rounded_scale = steps * scales.eps + scales.smallest_normal * scales.eps
    return steps * (0.5 + (0.5 if form.has_zero else 0.0)) + (1 << form.bits) * rounded_scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INTEGERS)
def test_a_value_is_the_product_of_two_float32_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Written out a value at a time, as DESIGN has it, for a row whose last group is short."""
    form, weight = integer(name), matrix((2, 131), dtype)
    planes = encoded(name, weight)
    values, zeros = planes["values"].tolist(), planes.get("zeros")
    out = decoded(name, planes, weight)
    for row in range(2):
        for col in range(131):
            group = col // form.group if form.group else 0
            code = values[row][col] if form.bits == 8 else values[row][col // 2] >> (col % 2 * 4) & 15
            zero = (1 << form.bits - 1) if zeros is None else int(zeros[row, group])
            scale = planes["scales"][row, group].float()
            assert out[row, col] == (torch.tensor(float(code - zero)) * scale).to(dtype)


def test_fp8_of_all_codes_is_what_torch_makes_of_them() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(1, -1)
    planes = {"values": codes.view(torch.float8_e4m3fn), "scales": torch.tensor([0.75])}
    out = torch.empty(1, 254)
    Float8().check((1, 254), planes)
    Float8().decode_(planes, out)
    assert torch.equal(out, codes.view(torch.float8_e4m3fn).float() * 0.75)


@pytest.mark.parametrize("name", INTEGERS)
def test_the_search_never_errs_more_than_rounding_to_nearest(name: str) -> None:
    weight, importance = matrix((40, 576), torch.bfloat16), torch.rand(576).pow(6)
    importance[::7] = 0

    def error(planes: dict[str, Tensor]) -> Tensor:
        """Of each row, by the importance, before values are rounded to bfloat16."""
        off = decoded(name, planes, weight.float()) - weight.float()
        return (off.square() * importance).sum(1)

    nearest, searched = error(encoded(name, weight)), error(encoded(name, weight, importance))
    assert (searched <= nearest * 1.001).all()
    assert searched.sum() < (0.8 if integer(name).bits == 4 else 1.0) * nearest.sum()


@pytest.mark.parametrize("name", LOSSY)
def test_an_importance_of_nothing_or_everything_changes_no_row_for_the_worse(name: str) -> None:
    weight = matrix((8, 100), torch.bfloat16)
    for importance in (torch.zeros(100), torch.full((100,), 3e38), torch.full((100,), 1e-38)):
        planes = encoded(name, weight, importance)
        assert decoded(name, planes, weight).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_writes_the_same_bytes(name: str) -> None:
    weight, importance = matrix((300, 1000), torch.bfloat16), torch.rand(1000)
    before, written = torch.get_num_threads(), []
    try:
        for threads in (1, 8):
            torch.set_num_threads(threads)
            written.append([get(name).encode(weight, given) for given in (None, importance)])
    finally:
        torch.set_num_threads(before)
    for one, eight in zip(*written, strict=True):
        assert one is not None
        assert eight is not None
        assert list(one) == list(eight)
        assert all(torch.equal(one[key].view(torch.uint8), eight[key].view(torch.uint8)) for key in one)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("fill", [0.0, 1e-40, -1e-40, 3.0, -3.0, 1e30])
def test_matrices_of_one_value_are_held(name: str, fill: float) -> None:
    weight = torch.full((3, 200), fill)
    off = decoded(name, encoded(name, weight), weight) - weight
    if get(name).planes((3, 200), torch.float32)[1].dtype != torch.float16 or abs(fill) < 1e4:  # type: ignore[index]
        assert (off.abs() <= abs(fill) * 0.07 + 1e-30).all()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused(name: str, value: float) -> None:
    weight = matrix((4, 100), torch.bfloat16)
    weight[2, 50] = value
    with pytest.raises(UnusableInput, match="NaN or infinite"):
        get(name).encode(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_importance_that_is_none_is_refused(value: float) -> None:
    importance = torch.ones(100)
    importance[3] = value
    with pytest.raises(UnusableInput, match="importance"):
        get("int4").encode(matrix((4, 100), torch.bfloat16), importance)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_known_beforehand(name: str, shape: tuple[int, int]) -> None:
    planes, planned = encoded(name, matrix(shape, torch.float32)), get(name).planes(shape, torch.float32)
    assert planned is not None
    assert [(p.name, p.dtype, p.shape, p.nbytes) for p in planned] == [
        (key, plane.dtype, tuple(plane.shape), plane.nbytes) for key, plane in planes.items()
    ]
    assert get(name).most_bytes(shape, torch.float32) == sum(-(-p.nbytes // 512) * 512 for p in planned)


@pytest.mark.parametrize(
    ("name", "bytes_a_weight"),
    [("fp8", 1.0), ("int8", 1.016), ("int4", 0.523), ("int4-g64", 0.547), ("int4-g32", 0.594)],
)
def test_formats_take_what_the_table_says(name: str, bytes_a_weight: float) -> None:
    assert get(name).most_bytes((28672, 8192), torch.bfloat16) / (28672 * 8192) == pytest.approx(
        bytes_a_weight, abs=1e-3
    )


@pytest.mark.parametrize("name", LOSSY)
def test_planes_that_no_matrix_has_are_refused(name: str) -> None:
    form, planes = get(name), encoded(name, matrix((4, 100), torch.bfloat16))
    for key, plane in planes.items():
        with pytest.raises(StoreError, match=key):
            form.check((4, 100), {other: planes[other] for other in planes if other != key})
        with pytest.raises(StoreError, match=key):
            form.check((4, 100), planes | {key: plane[:-1]})
        with pytest.raises(StoreError, match=key):
            form.check((4, 100), planes | {key: plane.to(torch.int64)})
    with pytest.raises(StoreError, match="surplus"):
        form.check((4, 100), planes | {"surplus": planes["scales"]})
    for value in (float("nan"), float("inf"), float("-inf")):
        scales = planes["scales"].clone()
        scales.flatten()[-1] = value
        with pytest.raises(StoreError, match="scales holds NaN or infinity"):
            form.check((4, 100), planes | {"scales": scales})


def test_a_zero_beyond_the_codes_is_refused() -> None:
    """16 is right: some checkpoints store zeros that are one less."""
    planes = encoded("int4", matrix((4, 200), torch.bfloat16))
    planes["zeros"][3, 1] = 16
    get("int4").check((4, 200), planes)
    planes["zeros"][3, 1] = 17
    with pytest.raises(StoreError, match="is 17, beyond the codes"):
        get("int4").check((4, 200), planes)


def test_fp8_that_is_nan_is_refused() -> None:
    planes = encoded("fp8", matrix((4, 100), torch.bfloat16))
    planes["values"].view(torch.uint8)[3, 99] = 0xFF
    with pytest.raises(StoreError, match="values holds NaN"):
        get("fp8").check((4, 100), planes)
