"""A group's products: one kernel for matrices of one input, the same bits wherever they lie."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.parallel.world import Collective
from llama.products import Products, ProductSource, Residual, Scratch
from wsm.formats import registry
from wsm.formats.format import MOST_ROWS
from wsm.layout.groups import Encoded, GroupId, Stored
from wsm.layout.model import Shard

TOGETHER = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def products(
    held: Mapping[str, Stored], collective: Collective | None = None, scratch: Scratch | None = None
) -> Products:
    source = ProductSource(None, 1e-5, collective or Collective(), scratch)  # type: ignore[arg-type]
    return Products(GroupId(0, "attn"), held, source, timed=False)


def add_linear_(w: Products, h: Tensor, x: Tensor, name: str) -> None:
    residual = Residual(h)
    w.add_linear_(residual, x, name)
    assert residual.settled() is h


class _Doubling(Collective):
    """Two ranks that hold the same."""

    shard = Shard(0, 2)

    def reduce_(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("apart", [False, True])
def test_names_side_by_side_are_one_product_wherever_the_matrices_lie(apart: bool) -> None:
    parts = TOGETHER.split([6, 2, 4])
    held = dict(zip(("wq", "wk", "wv"), [part.clone() for part in parts] if apart else parts, strict=True))
    assert torch.equal(products(held).linear(X, "wq", "wk", "wv"), F.linear(X, TOGETHER))


def test_a_product_is_added_to_the_residual_once_for_all_ranks() -> None:
    h = torch.ones(5, 12)
    add_linear_(products({"wo": TOGETHER}), h, X, "wo")
    assert torch.equal(h, torch.ones(5, 12).addmm_(X, TOGETHER.t()))
    h = torch.ones(5, 12)
    add_linear_(products({"wo": TOGETHER}, _Doubling()), h, X, "wo")
    assert torch.equal(h, 1 + 2 * F.linear(X, TOGETHER))


def test_the_norm_is_that_of_its_vector() -> None:
    weight = torch.linspace(0.5, 1.5, 8)
    w = products({"ffn_norm": weight})
    assert torch.equal(w.norm(Residual(X), "ffn_norm"), F.rms_norm(X, (8,), weight, 1e-5))


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_what_is_added_to_a_residual_is_in_the_norm_behind_it_and_added_once(rows: int) -> None:
    h, parts = torch.randn(rows, 8).bfloat16(), torch.randn(3, rows, 8).bfloat16()
    weight, residual, expected = torch.linspace(0.5, 1.5, 8).bfloat16(), Residual(h.clone()), h.clone()
    for part in parts:
        residual.add_(part)
        expected += part
        if part is not parts[0]:  # two in a row without a norm between them
            assert torch.equal(residual.norm(weight, 1e-5), F.rms_norm(expected, (8,), weight, 1e-5))
    for _ in range(2):
        assert torch.equal(residual.norm(weight, 1e-5), F.rms_norm(expected, (8,), weight, 1e-5))
        assert torch.equal(residual.settled(), expected)


def test_what_is_added_to_one_of_many_chunks_does_not_wait() -> None:
    h, part, weight = torch.randn(2, 8).bfloat16(), torch.randn(2, 8).bfloat16(), torch.ones(8).bfloat16()
    alone, among = Residual(h.clone()), Residual(h.clone(), chunks=2)
    held = weakref.ref(part)
    expected = h + part
    alone.add_(part)
    among.add_(part)
    assert torch.equal(alone.norm(weight, 1e-5), among.norm(weight, 1e-5))  # and gives back the part
    among.add_(part)
    del part
    assert held() is None
    assert torch.equal(alone.settled(), expected)


def encoded(matrix: Tensor, name: str) -> Encoded:
    planes = registry.get(name).encode(matrix)
    assert planes is not None
    return Encoded(name, tuple(matrix.shape), matrix.dtype, planes)


def decoded(matrix: Encoded) -> Tensor:
    out = torch.empty(matrix.shape, dtype=matrix.dtype)
    registry.get(matrix.format).decode_(matrix.planes, out)
    return out


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["exact", "fp8", "int8", "int4"])
def test_a_product_with_encoded_matrices_is_that_with_the_decoded_ones(name: str, kept: bool) -> None:
    matrices = dict(zip(("wq", "wk", "wv"), torch.randn(96, 64).bfloat16().split([48, 24, 24]), strict=True))
    held: dict[str, Stored] = {short: encoded(matrix, name) for short, matrix in matrices.items()}
    held["wk"] = matrices["wk"]  # a matrix that the format does not pay for stays plain
    held["wo"] = encoded(torch.randn(64, 96).bfloat16(), name)
    plain = {short: decoded(m) if isinstance(m, Encoded) else m for short, m in held.items()}
    scratch = Scratch(1 << 16 if kept else 96 * 64 * 2, torch.device("cpu"))
    x, h = torch.randn(5, 64).bfloat16(), torch.zeros(5, 64).bfloat16()
    w = products(held, scratch=scratch)
    for _ in range(3):  # as with chunks: whatever is decoded in between
        assert torch.equal(w.linear(x, "wq", "wk", "wv"), F.linear(x, torch.cat([plain[n] for n in matrices])))
        expected = h.clone().addmm_(x.repeat(1, 2)[:, :96], plain["wo"].t())
        add_linear_(w, h, x.repeat(1, 2)[:, :96], "wo")
        assert torch.equal(h, expected)


def test_plain_matrices_beside_encoded_ones_count_as_room_for_the_whole_group() -> None:
    matrices = {name: torch.randn(64, 64).bfloat16() for name in ("wq", "wk", "wv", "wo")}
    held: dict[str, Stored] = {
        **matrices,
        "wq": encoded(matrices["wq"], "exact"),
        "wo": encoded(matrices["wo"], "exact"),
    }
    w = products(held, scratch=Scratch(3 * 64 * 64 * 2 + 4 * 512, torch.device("cpu")))  # not of all four
    x, h = torch.randn(5, 64).bfloat16(), torch.zeros(5, 64).bfloat16()
    qkv = torch.cat([matrices[name] for name in ("wq", "wk", "wv")])
    for _ in range(2):
        assert torch.equal(w.linear(x, "wq", "wk", "wv"), F.linear(x, qkv))
        expected = h.clone().addmm_(x, matrices["wo"].t())
        add_linear_(w, h, x, "wo")
        assert torch.equal(h, expected)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("encodes", [(), ("w1",), ("w3",), ("w1", "w3")])
def test_a_gated_product_is_the_same_wherever_its_matrices_lie_and_its_inputs_are_seen(
    encodes: tuple[str, ...], kept: bool
) -> None:
    matrices = {name: torch.randn(96, 64).bfloat16() for name in ("w1", "w3")}
    held: dict[str, Stored] = {n: encoded(m, "exact") if n in encodes else m for n, m in matrices.items()}
    w = products(held, scratch=Scratch(1 << 16 if kept else 96 * 64 * 2, torch.device("cpu")))
    seen: list[Sequence[str]] = []
    w._source.observer = mock.Mock(saw=lambda group, names, x: seen.append(names))
    x = torch.randn(1, 64).bfloat16()
    expected = F.silu(F.linear(x, matrices["w1"])) * F.linear(x, matrices["w3"])
    for _ in range(2):
        assert torch.equal(w.gated_linear(x, "w1", "w3"), expected)
    assert seen == [("w1",), ("w3",)] * 2


def test_with_room_for_the_whole_group_a_matrix_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Stored] = {"w1": encoded(torch.randn(32, 64).bfloat16(), "int4")}
    calls = []
    family = type(registry.get("int4"))
    decode = family.decode_
    monkeypatch.setattr(family, "decode_", lambda self, *given: (calls.append(1), decode(self, *given)))
    for nbytes, decodings in ((32 * 64 * 2, 3), (32 * 64 * 2 + 2 * 512, 1)):
        w = products(held, scratch=Scratch(nbytes, torch.device("cpu")))
        calls.clear()
        for _ in range(3):
            w.linear(torch.ones(2, 64).bfloat16(), "w1")
        assert len(calls) == decodings


def test_a_packed_product_is_taken_for_few_rows_and_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family = type(registry.get("int4"))

    def packed(self: object, x: Tensor, planes: object, shape: object, out: Tensor | None = None) -> Tensor | None:
        made = x.new_full((x.shape[0], shape[0]), float(shape[0]))  # type: ignore[index]
        return None if x.shape[0] > 2 else made if out is None else out.copy_(made)

    monkeypatch.setattr(family, "linear", packed)
    names = {"wq": 48, "wk": 24, "wv": 24}
    held: dict[str, Stored] = {n: encoded(torch.randn(rows, 64).bfloat16(), "int4") for n, rows in names.items()}
    plain = torch.cat([decoded(m) for m in held.values() if isinstance(m, Encoded)])
    w = products(held, scratch=Scratch(96 * 64 * 2, torch.device("cpu")))
    few, many = torch.randn(2, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    assert torch.equal(w.linear(few, *names), torch.tensor([48.0] * 48 + [24.0] * 48).bfloat16().expand(2, -1))
    assert torch.equal(w.linear(many, *names), F.linear(many, plain))
    h = torch.ones(2, 48).bfloat16()
    add_linear_(w, h, few, "wq")
    assert torch.equal(h, torch.full((2, 48), 49.0).bfloat16())
    doubled = products(held, _Doubling(), Scratch(96 * 64 * 2, torch.device("cpu")))
    h = torch.ones(2, 48).bfloat16()
    add_linear_(doubled, h, few, "wq")
    assert torch.equal(h, torch.full((2, 48), 97.0).bfloat16())
