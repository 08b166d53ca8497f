"""Prompt lookup copies what followed the latest place with most of the last tokens, and waits for nobody."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from llama.speculation.ngram import LONGEST, NgramDraft
from tests.llama.test_generation import WAITS
from wsm.layout.kv import KV_BLOCK_TOKENS

CPU = torch.device("cpu")


def looked_up(tokens: list[int], count: int) -> list[int]:
    """The definition, token by token; nothing where the last token never stood before."""
    end = len(tokens)
    for longest in range(min(LONGEST, end - 1), 0, -1):
        for place in range(end - 2, longest - 2, -1):
            if tokens[place - longest + 1 : place + 1] == tokens[end - longest :]:
                following = tokens[place + 1 :]
                return [following[n % len(following)] for n in range(count)]
    return []


def proposals(draft: NgramDraft, rows: list[list[int]]) -> list[list[int]]:
    roots = torch.tensor([row[-1] for row in rows])
    tree = draft.propose(roots, torch.tensor([len(row) - 1 for row in rows]))
    assert tree.tokens.shape == (len(rows), draft.nodes)
    assert int(tree.tokens.min()) >= 0, "padding is computed, too"
    chain = [max(0, node - 1) for node in range(draft.depth + 1)]
    assert tree.parents[:, : draft.depth + 1].tolist() == [chain] * len(rows)
    assert tree.tokens[:, 0].tolist() == roots.tolist()
    return [tokens[real][1:].tolist() for tokens, real in zip(tree.tokens, tree.real, strict=True)]


_row = st.lists(st.integers(0, 3), min_size=2, max_size=30)


@settings(deadline=None)
@given(st.lists(_row, min_size=1, max_size=3), st.integers(1, 9), st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_the_continuation_of_the_latest_longest_match_is_proposed(
    rows: list[list[int]], depth: int, later: list[int]
) -> None:
    draft = NgramDraft(depth, depth + 3, KV_BLOCK_TOKENS, CPU)
    draft.prefill([row[:-1] for row in rows])
    assert proposals(draft, rows) == [looked_up(row, depth) for row in rows]
    # As many of `later` as the tree has room for are accepted in the first row, and nothing in the others.
    new = later[: depth + 1] + [0] * (depth + 1 - len(later))
    starts = torch.tensor([len(row) - 1 for row in rows])
    counts = torch.tensor([min(len(later), depth + 1)] + [0] * (len(rows) - 1))
    path = torch.zeros(len(rows), depth + 1, dtype=torch.int64)
    draft.accepted(starts, path, counts, torch.tensor([new] * len(rows)))
    rows = [rows[0] + later[: depth + 1], *rows[1:]]
    assert proposals(draft, rows) == [looked_up(row, depth) for row in rows]


def test_a_chain_ends_with_the_block_and_a_full_row_is_no_error() -> None:
    draft = NgramDraft(4, 5, KV_BLOCK_TOKENS, CPU)
    row = [1, 2] * (KV_BLOCK_TOKENS // 2)
    for length, most in ((KV_BLOCK_TOKENS - 2, 2), (KV_BLOCK_TOKENS, 0)):
        draft.prefill([row[: length - 1]])
        assert proposals(draft, [row[:length]]) == [([1, 2] * 2)[:most]]
    path, tokens = torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    draft.accepted(torch.tensor([KV_BLOCK_TOKENS - 1]), path, torch.tensor([5]), tokens)


def test_after_the_prefill_no_host_waits() -> None:
    draft = NgramDraft(4, 5, KV_BLOCK_TOKENS, CPU)
    draft.prefill([[1, 2, 1, 2]])
    roots, starts = torch.tensor([1]), torch.tensor([4])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        tree = draft.propose(roots, starts)
        draft.accepted(starts, tree.parents, roots, tree.tokens)
    ops = {event.key for event in seen.key_averages()}
    assert "aten::scatter_" in ops
    assert not ops & WAITS
