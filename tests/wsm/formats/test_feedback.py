"""Error feedback: a smaller error of the products than rounding each weight for itself, and plain formulas."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from wsm.errors import UnusableInput
from wsm.formats import feedback
from wsm.formats.registry import get


def inputs_and_weights(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs whose channels depend on each other, as a model's do."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=random) / cols**0.5
    x = torch.randn(2048, cols, generator=random) @ (mixing + 0.5 * torch.eye(cols))
    return x, (torch.randn(rows, cols, generator=random) * 0.02).to(torch.bfloat16)


def error_of(name: str, x: Tensor, weight: Tensor, importance: Tensor | None) -> float:
    planes = get(name).encode(weight, importance)
    assert planes is not None
    get(name).check((weight.shape[0], weight.shape[1]), planes)
    out = torch.empty_like(weight)
    get(name).decode_(planes, out)
    return float((x @ (out.float() - weight.float()).t()).square().mean())


@pytest.mark.parametrize("name", ["int4", "int4-g64", "int4-g32", "int4-row", "int8"])
@pytest.mark.parametrize("cols", [256, 100])
def test_products_err_less_with_feedback(name: str, cols: int) -> None:
    x, weight = inputs_and_weights(48, cols)
    moments = x.t() @ x / len(x)
    searched = error_of(name, x, weight, moments.diagonal().contiguous())
    assert error_of(name, x, weight, moments) < 0.8 * searched


def test_independent_inputs_leave_the_plain_search() -> None:
    """Where no channel says anything of another, nothing can be made up for."""
    weight = inputs_and_weights(16, 128)[1]
    squares = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.5
    with_feedback = get("int4").encode(weight, torch.diag(squares))
    plain = get("int4").encode(weight, squares)
    assert with_feedback is not None
    assert plain is not None
    assert all(torch.equal(with_feedback[name], plain[name]) for name in plain)


def test_the_first_column_is_made_up_for_as_the_least_squares_say() -> None:
    """Two columns: after the first is rounded, the second is what minimises the error of the product."""
    moments = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    weight = torch.tensor([[0.031, 1.0]] * 2).to(torch.bfloat16)
    planes = get("int8-row").encode(weight, moments)
    assert planes is not None
    out = torch.empty_like(weight)
    get("int8-row").decode_(planes, out)
    damped = moments + 0.01 * torch.eye(2)
    wanted = weight[0, 1].float() + (weight[0, 0].float() - out[0, 0].float()) * damped[0, 1] / damped[1, 1]
    assert abs(float(out[0, 1].float() - wanted)) <= float(planes["scales"][0, 0].float()) / 2 + 2**-8


@pytest.mark.parametrize("moments", [torch.zeros(32, 32), torch.full((32, 32), torch.nan)])
def test_inputs_that_say_nothing_are_refused(moments: Tensor) -> None:
    with pytest.raises(UnusableInput):
        get("int4-g32").encode(torch.ones(4, 32, dtype=torch.bfloat16), moments)


KERNEL = """
import torch
from wsm.formats import feedback
from wsm.formats.feedback_kernel import round_block_
from wsm.formats.search import Grid

random = torch.Generator().manual_seed(0)
for rows, width in ((40, 128), (16, 100), (3, 1)):
    block = torch.randn(rows, width, generator=random)
    upper = torch.randn(width, width, generator=random).triu_(1) / 30 + torch.eye(width) * 1.25
    scale, zero = torch.rand(rows, 1, generator=random) + 0.1, torch.randint(0, 16, (rows, 1), generator=random).float()
    scale[0] = 0
    codes, theirs = (torch.zeros(rows, 2 * width, dtype=torch.uint8)[:, :width] for _ in range(2))
    errors = torch.empty_like(block)
    round_block_(block.clone(), upper, scale, zero, codes, errors, top=15)
    wanted = feedback._round_block_(Grid(4, True, torch.bfloat16), block.clone(), upper, scale, zero, theirs)
    assert (codes != theirs).float().mean() < 0.02, (rows, width)
    assert torch.allclose(errors, wanted, atol=1e-4) or (codes != theirs).any()
print("alike")
"""


def test_the_kernel_does_the_same_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environ, timeout=120)
    assert done.stdout == "alike\n", done.stderr


def test_the_solver_is_the_factor_of_the_inverse_also_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the plain formula in float64: cholesky(inverse(damped moments)), upper."""
    x, _ = inputs_and_weights(1, 100)
    moments = x.t() @ x / len(x)
    damped = moments.double() + feedback._DAMPING * moments.double().diagonal().mean() * torch.eye(100).double()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for columns in (7, 50, 2048):
        monkeypatch.setattr(feedback, "_INVERTED", columns)
        torch.testing.assert_close(feedback._solver(moments).double(), expected, rtol=1e-4, atol=1e-4)
