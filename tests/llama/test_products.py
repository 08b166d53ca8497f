"""A group's products: one kernel for matrices of one input, the same bits wherever they lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.parallel.world import Collective
from llama.products import Products
from wsm.layout.model import Shard

TOGETHER = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class _Doubling(Collective):
    """Two ranks that hold the same."""

    shard = Shard(0, 2)

    def reduce_(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("apart", [False, True])
def test_names_side_by_side_are_one_product_wherever_the_matrices_lie(apart: bool) -> None:
    parts = TOGETHER.split([6, 2, 4])
    held = dict(zip(("wq", "wk", "wv"), [part.clone() for part in parts] if apart else parts, strict=True))
    assert torch.equal(Products(held, 1e-5, Collective()).linear(X, "wq", "wk", "wv"), F.linear(X, TOGETHER))


def test_a_product_is_added_to_the_residual_once_for_all_ranks() -> None:
    h = torch.ones(5, 12)
    Products({"wo": TOGETHER}, 1e-5, Collective()).add_linear_(h, X, "wo")
    assert torch.equal(h, torch.ones(5, 12).addmm_(X, TOGETHER.t()))
    h = torch.ones(5, 12)
    Products({"wo": TOGETHER}, 1e-5, _Doubling()).add_linear_(h, X, "wo")
    assert torch.equal(h, 1 + 2 * F.linear(X, TOGETHER))


def test_the_norm_is_that_of_its_vector() -> None:
    weight = torch.linspace(0.5, 1.5, 8)
    w = Products({"ffn_norm": weight}, 1e-5, Collective())
    assert torch.equal(w.norm(X, "ffn_norm"), F.rms_norm(X, (8,), weight, 1e-5))
