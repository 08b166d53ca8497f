"""What the flags make of a tree: nodes, depth and width, and what contradicts itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.speculation.shape import DEFAULT_NODES, MOST_WIDTH, Speculating, TreeShape, nodes_for, speculating, width_for
from wsm.errors import UnusableInput


def first(*flags: object) -> TreeShape:
    found = speculating(*flags)  # type: ignore[arg-type]
    assert found is not None
    return found.first


def test_depth_alone_is_a_chain_and_more_rows_are_a_tree() -> None:
    assert first("d", 8, None, None) == TreeShape(8, 1, 9)
    assert first("d", 8, None, 9) == TreeShape(8, 1, 9)
    assert first("d", 8, None, 24) == TreeShape(8, 6, 24)
    assert first("d", 4, 1, 64) == TreeShape(4, 1, 5)
    assert first("d", 4, 2, 64) == TreeShape(4, 2, 9)
    assert first("ngram", "auto", None, None) == TreeShape(DEFAULT_NODES - 1, 1, DEFAULT_NODES)
    assert first("ngram", 4, None, 64) == TreeShape(4, 1, 5)
    assert first("d", "auto", None, None).nodes == DEFAULT_NODES


def test_without_a_draft_a_row_is_one_node_unless_it_is_padded() -> None:
    assert speculating(None, "auto", None, 24) is None
    assert nodes_for(None, "auto", None) == 1
    assert nodes_for(None, "auto", 24) == 24


@given(st.integers(1, 70), st.integers(2, 70))
def test_a_tree_fills_its_nodes_and_no_level_is_wider(depth: int, nodes: int) -> None:
    width = width_for(depth, nodes)
    assert 1 <= width < nodes
    assert depth + 1 >= nodes or 1 + depth * width >= nodes or width == MOST_WIDTH


@given(st.integers(2, 70), st.one_of(st.none(), st.integers(1, 8)))
def test_a_depth_of_auto_may_become_any_that_the_nodes_hold(nodes: int, width: int | None) -> None:
    asked = Speculating("d", None, width, nodes)
    assert [shape.depth for shape in asked.possible] == list(range(1, nodes))
    assert asked.first in asked.possible
    assert Speculating("d", 3, width, 8).possible == [Speculating("d", 3, width, 8).first]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((None, 4, None, None), "--draft-depth without --draft"),
        ((None, "auto", 2, None), "--draft-width without --draft"),
        (("d", "auto", None, 1), "--verify-rows 1 has no room"),
        (("d", 8, None, 8), "--draft-depth 8 does not go into --verify-rows 8: raise the second to 9"),
        (("d", 3, 8, 8), "--draft-width 8 does not go into --verify-rows 8: raise the second to 9"),
        (("d", 1, 2, None), "--draft-width 2 does not go into --verify-rows 2: raise the second to 3"),
        (("ngram", 8, 2, None), "--draft-width 2: ngram proposes a chain"),
    ],
)
def test_flags_that_contradict_each_other_are_one_sentence(flags: tuple[object, ...], said: str) -> None:
    with pytest.raises(UnusableInput, match=said):
        speculating(*flags)  # type: ignore[arg-type]
