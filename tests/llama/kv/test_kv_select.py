"""Choosing KV blocks: the bounds hold for every key, and the choice is the one that plain Python makes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.kv.select import BlockBounds, block_scores, select_blocks
from wsm.layout.kv import KV_BLOCK_TOKENS, KVLayout

CPU = torch.device("cpu")
N_KV, HEAD_DIM = 2, 4


def whole_numbers(*shape: int, seed: int, most: int = 8) -> Tensor:
    """Small whole numbers: their products and sums are exact in float32, and ties are common."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def empty_bounds(
    rows: int, n_kv_heads: int, blocks: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> BlockBounds:
    layout = KVLayout(1, rows, rows, n_kv_heads, blocks * KV_BLOCK_TOKENS, head_dim * dtype.itemsize)
    return BlockBounds(layout.bounds_shape(rows, head_dim), dtype, device)


def filled(lengths: list[int], blocks: int, seed: int = 0, most: int = 8) -> tuple[BlockBounds, list[Tensor]]:
    """Bounds of rows of these lengths, and their keys ``[length, n_kv, head_dim]``."""
    bounds = empty_bounds(len(lengths), N_KV, blocks, HEAD_DIM, torch.float32, CPU)
    keys = [whole_numbers(length, N_KV, HEAD_DIM, seed=seed + row, most=most) for row, length in enumerate(lengths)]
    for row, part in enumerate(keys):
        bounds.add_span(row, 0, part)
    return bounds, keys


# -- plain Python


def blocks_of(keys: Tensor) -> list[list[list[float]]]:
    """Of one row and KV head's keys ``[length, head_dim]``."""
    listed = keys.tolist()
    return [listed[at : at + KV_BLOCK_TOKENS] for at in range(0, len(listed), KV_BLOCK_TOKENS)]


def most_possible(query: list[float], block: list[list[float]]) -> float:
    low = [min(column) for column in zip(*block, strict=True)]
    high = [max(column) for column in zip(*block, strict=True)]
    return float(sum(max(q * a, q * b) for q, a, b in zip(query, low, high, strict=True)))


def chosen(queries: list[list[float]], blocks: list[list[list[float]]], newest: int, k: int) -> list[int]:
    """What the choice of blocks has to be, of one row and KV head; ``queries`` are the heads that share it."""
    if newest + 1 <= k:
        return [*range(newest), *[0] * (k - 1 - newest), newest]
    scores = {block: sum(most_possible(query, blocks[block]) for query in queries) for block in range(1, newest)}
    best = sorted(scores, key=lambda block: (-scores[block], block))[: k - 2]
    return [0, *sorted(best), newest]


# -- bounds


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 700), min_size=1, max_size=5), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_bounds_are_those_of_the_keys_however_they_came_in(cuts: list[int], dtype: torch.dtype) -> None:
    """Spans of any length and alignment into row 1; the others stay empty."""
    total, begin = sum(cuts), 0
    blocks = -(-total // KV_BLOCK_TOKENS) + 1
    bounds = empty_bounds(3, N_KV, blocks, HEAD_DIM, dtype, CPU)
    keys = torch.randn(total, N_KV, HEAD_DIM, generator=torch.Generator().manual_seed(total)).to(dtype)
    for length in cuts:
        bounds.add_span(1, begin, keys[begin : begin + length])
        begin += length
    for block, part in enumerate(keys.split(KV_BLOCK_TOKENS)):
        assert torch.equal(bounds.data[0, 1, :, block], part.amin(dim=0))
        assert torch.equal(bounds.data[1, 1, :, block], part.amax(dim=0))
    for empty in (bounds.data[:, 0], bounds.data[:, 2], bounds.data[:, 1, :, -1:]):
        assert bool((empty[0] == math.inf).all() and (empty[1] == -math.inf).all())


def test_a_span_takes_at_most_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = empty_bounds(1, N_KV, 40, HEAD_DIM, torch.float32, CPU)
    steps: list[None] = []
    real = torch.minimum

    def counted(*arguments: Tensor, **named: Tensor) -> Tensor:
        steps.append(None)
        return real(*arguments, **named)

    monkeypatch.setattr(torch, "minimum", counted)
    bounds.add_span(0, 100, whole_numbers(8192, N_KV, HEAD_DIM, seed=0))
    assert len(steps) == 3


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 600), min_size=1, max_size=4), data=st.data())
def test_tokens_one_by_one_give_the_bounds_of_a_span(lengths: list[int], data: st.DataObject) -> None:
    """Some rows go on by a token a step, from lengths of their own, over a block's border too."""
    bounds, keys = filled(lengths, 4)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    steps = 3
    more = [whole_numbers(steps, N_KV, HEAD_DIM, seed=50 + row, most=12) for row in range(len(lengths))]
    for step in range(steps):
        bounds.add_tokens(
            torch.tensor(rows),
            torch.tensor([lengths[row] + step for row in rows]),
            torch.stack([more[row][step] for row in rows]),
        )
    wanted = empty_bounds(len(lengths), N_KV, 4, HEAD_DIM, torch.float32, CPU)
    for row, part in enumerate(keys):
        wanted.add_span(row, 0, torch.cat((part, more[row])) if row in rows else part)
    assert torch.equal(bounds.data, wanted.data)


def test_reset_forgets_and_the_bytes_are_as_planned() -> None:
    bounds, _ = filled([300, 20], 2)
    fresh = empty_bounds(2, N_KV, 2, HEAD_DIM, torch.float32, CPU)
    assert not torch.equal(bounds.data, fresh.data)
    bounds.reset()
    assert torch.equal(bounds.data, fresh.data)
    assert bounds.data.nbytes == 2 * 2 * N_KV * 2 * HEAD_DIM * 4
    assert empty_bounds(2, 3, 5, 8, torch.bfloat16, CPU).data.nbytes == 2 * 2 * 3 * 5 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_no_key_of_a_block_scores_above_its_bound(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1024, N_KV, 64, generator=generator).to(dtype)
    queries = torch.randn(1, N_KV, 64, generator=generator).to(dtype)
    bounds = empty_bounds(1, N_KV, 4, 64, dtype, CPU)
    bounds.add_span(0, 0, keys)
    scores = block_scores(queries, bounds, torch.tensor([0]))[0]  # [n_kv, blocks]
    products = torch.einsum("hd,thd->ht", queries[0].double(), keys.double()).unflatten(1, (4, KV_BLOCK_TOKENS))
    assert scores.dtype == torch.float32
    assert bool((scores >= products.amax(dim=-1)).all())
    assert bool((scores <= 64 * 4.5**2).all()), "a bound that holds because it is endless"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(1, 255))
def test_a_bound_only_grows_as_keys_come_in(seed: int, length: int) -> None:
    bounds, _ = filled([length], 1, seed)
    queries, rows = whole_numbers(1, 3 * N_KV, HEAD_DIM, seed=seed + 1), torch.tensor([0])
    before = block_scores(queries, bounds, rows)
    bounds.add_tokens(rows, torch.tensor([length]), whole_numbers(1, N_KV, HEAD_DIM, seed=seed + 2, most=20))
    assert bool((block_scores(queries, bounds, rows) >= before).all())


# -- the choice


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 8 * KV_BLOCK_TOKENS - 1), min_size=1, max_size=4),
    n_rep=st.integers(1, 3),
    k=st.integers(2, 11),
    most=st.sampled_from([1, 8]),
    seed=st.integers(0, 1000),
)
def test_the_choice_is_plain_python_s(lengths: list[int], n_rep: int, k: int, most: int, seed: int) -> None:
    """Rows of any lengths, empty ones too; k from 2 to more than there are blocks; ties common where most is 1."""
    bounds, keys = filled(lengths, 8, seed, most)
    rows = list(reversed(range(len(lengths))))
    queries = whole_numbers(len(rows), n_rep * N_KV, HEAD_DIM, seed=seed + 99, most=most)
    newest = [lengths[row] // KV_BLOCK_TOKENS for row in rows]
    found = select_blocks(queries, bounds, torch.tensor(rows), torch.tensor(newest), k)
    assert (found.dtype, found.shape) == (torch.int64, (len(rows), N_KV, k))
    for place, row in enumerate(rows):
        for head in range(N_KV):
            shared = queries[place, head * n_rep : (head + 1) * n_rep].tolist()
            assert found[place, head].tolist() == chosen(shared, blocks_of(keys[row][:, head]), newest[place], k)


def test_two_blocks_are_the_first_and_the_newest() -> None:
    bounds, _ = filled([1500, 10, 300], 8)
    newest = torch.tensor([5, 0, 1])
    found = select_blocks(torch.ones(3, N_KV, HEAD_DIM), bounds, torch.arange(3), newest, 2)
    assert found.tolist() == [[[0, 5]] * N_KV, [[0, 0]] * N_KV, [[0, 1]] * N_KV]


def test_a_newest_block_that_has_no_keys_yet_is_chosen_and_makes_no_nan() -> None:
    bounds, _ = filled([5 * KV_BLOCK_TOKENS], 6)
    queries = torch.zeros(1, N_KV, HEAD_DIM)  # 0 * inf
    found = select_blocks(queries, bounds, torch.tensor([0]), torch.tensor([5]), 4)
    assert found.tolist() == [[[0, 1, 2, 5]] * N_KV]


def test_each_kv_head_chooses_for_itself_and_the_loudest_key_wins() -> None:
    bounds = empty_bounds(1, N_KV, 8, HEAD_DIM, torch.bfloat16, CPU)
    keys = torch.zeros(8 * KV_BLOCK_TOKENS - 1, N_KV, HEAD_DIM, dtype=torch.bfloat16)
    keys[3 * KV_BLOCK_TOKENS + 17, 0, 2] = -9
    keys[6 * KV_BLOCK_TOKENS, 1, 0] = 5
    keys[2 * KV_BLOCK_TOKENS, :, 0] = -50  # against the query: no reason to fetch it
    bounds.add_span(0, 0, keys)
    queries = torch.tensor([[[0, 0, -1, 0], [1, 0, 0, 0]]], dtype=torch.bfloat16)
    found = select_blocks(queries, bounds, torch.tensor([0]), torch.tensor([7]), 3)
    assert found.tolist() == [[[0, 3, 7], [0, 6, 7]]]


def test_equal_scores_take_the_lower_block() -> None:
    bounds = empty_bounds(1, 1, 64, HEAD_DIM, torch.float32, CPU)
    bounds.add_span(0, 0, torch.ones(63 * KV_BLOCK_TOKENS, 1, HEAD_DIM))
    found = select_blocks(torch.ones(1, 1, HEAD_DIM), bounds, torch.tensor([0]), torch.tensor([63]), 8)
    assert found.tolist() == [[[0, 1, 2, 3, 4, 5, 6, 63]]]


def test_scores_that_overflow_still_give_blocks_that_the_row_has() -> None:
    bounds = empty_bounds(1, 1, 8, HEAD_DIM, torch.float32, CPU)
    bounds.add_span(0, 0, torch.full((6 * KV_BLOCK_TOKENS, 1, HEAD_DIM), 3e38))
    queries = torch.tensor([[[-3e38, -3e38, -3e38, -3e38]], [[3e38, -3e38, 3e38, -3e38]]])
    found = select_blocks(queries, bounds, torch.tensor([0, 0]), torch.tensor([6, 6]), 4)
    assert found.tolist() == [[[0, 1, 2, 6]]] * 2


def test_fewer_than_two_blocks_are_refused() -> None:
    bounds, _ = filled([10], 1)
    with pytest.raises(ValueError, match="first and the newest block, not 1"):
        select_blocks(torch.ones(1, N_KV, HEAD_DIM), bounds, torch.tensor([0]), torch.tensor([0]), 1)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without data raise whenever the host asks for a value."""
    bounds = empty_bounds(3, N_KV, 8, HEAD_DIM, torch.bfloat16, torch.device("meta"))
    with torch.device("meta"):
        keys, queries = torch.empty(600, N_KV, HEAD_DIM), torch.empty(2, 2 * N_KV, HEAD_DIM)
        rows, newest = torch.empty(2, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    bounds.add_span(0, 200, keys.bfloat16())
    bounds.add_tokens(rows, newest, keys[:2].bfloat16())
    found = select_blocks(queries.bfloat16(), bounds, rows, newest, 4)
    assert found.shape == (2, N_KV, 4)
    with pytest.raises(RuntimeError, match="meta"):
        found[0, 0, 0].item()
