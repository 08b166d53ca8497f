"""A node's attention depends on its row's KV alone, to the last bit, in every head geometry."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch

from llama.nodes.attention import attend_nodes
from tests.llama.nodes.cases import GEOMETRIES, Case, permuted
from wsm.plan.inputs import ALIKE_ROWS

DTYPES = [torch.float32, torch.bfloat16]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Of torch: on the CPU its number decides what is computed by which instructions."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_places_neighbours_other_rows_and_masked_keys_change_no_bit(
    geometry: tuple[int, int, int], dtype: torch.dtype
) -> None:
    case = Case.random(*geometry, dtype)
    with threads(3 if case.q.numel() < 10_000 else 1):
        found = attend_nodes(*case)
        for other, places in permuted(case):
            assert attend_nodes(*other).equal(places(found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_is_softmax_over_the_keys_that_a_node_attends_to(geometry: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case.random(*geometry, dtype)
    found, n_rep = attend_nodes(*case), geometry[0] // geometry[1]
    for row, prefix in enumerate(case.batch.prefix.tolist()):
        for node in range(found.shape[1]):
            window = case.batch.window[row, node]
            columns = torch.cat((torch.arange(prefix), window[window >= 0]))
            keys = case.keys[row, :, columns].double().repeat_interleave(n_rep, 0)
            values = case.values[row, :, columns].double().repeat_interleave(n_rep, 0)
            scores = torch.einsum("hd,hkd->hk", case.q[row, node].double(), keys) / math.sqrt(geometry[2])
            expected = torch.einsum("hk,hkd->hd", scores.softmax(-1), values)
            error = (found[row, node].double() - expected).abs().max()
            assert error <= (2e-6 if dtype == torch.float32 else 8e-3) * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [ALIKE_ROWS, 3 * ALIKE_ROWS, 8 * ALIKE_ROWS])
@pytest.mark.parametrize("shape", [(576, 960), (576, 1536), (1536, 576), (64, 300), (96, 64), (2048, 512)], ids=str)
def test_a_row_of_a_product_does_not_depend_on_its_place(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(rows)
    weight = (torch.randn(shape[1], shape[0], generator=random) * 0.05).to(dtype)
    x, h = torch.randn(rows, shape[0], generator=random), torch.randn(rows, shape[1], generator=random)
    x[rows // 2], h[rows // 2] = x[0], h[0]
    x[-1], h[-1] = x[0], h[0]
    for count in (1, 2, 3):
        with threads(count):
            product = torch.nn.functional.linear(x.to(dtype), weight)
            added = h.to(dtype).addmm_(x.to(dtype), weight.t())
        for found in (product, added):
            assert found[rows // 2].equal(found[0])
            assert found[-1].equal(found[0])
