"""What is fetched next, as a table of claims."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from wsm.engine.schedule import choose, lines_of
from wsm.engine.slots import Pool
from wsm.layout.groups import Kind, pass_order
from wsm.settings import Settings

ON = Settings(balance_prefetch=True, balance_tol=1, pair_ahead=2, kind_ahead_cap=2)
OFF = Settings(balance_prefetch=False, balance_tol=1, pair_ahead=2, kind_ahead_cap=2)


@dataclass(frozen=True)
class Head:
    """The head of one kind's line."""

    step: int
    ready: bool
    ahead: int


def chosen(heads: dict[Kind, Head], settings: Settings) -> Kind | None:
    """The kind that is fetched from next."""
    head = choose(heads.values(), lambda head: head.ready, settings)
    return next((kind for kind in heads if heads[kind] is head), None)


def test_the_earlier_step_goes_first_when_both_are_ready() -> None:
    assert chosen({"attn": Head(4, True, 0), "ffn": Head(3, True, 0)}, ON) == "ffn"
    assert chosen({"attn": Head(4, True, 0), "ffn": Head(5, True, 0)}, OFF) == "attn"


def test_nothing_goes_when_nothing_is_ready() -> None:
    assert chosen({"attn": Head(4, False, 0), "ffn": Head(5, False, 0)}, ON) is None
    assert chosen({}, ON) is None


@pytest.mark.parametrize(("ahead", "held_ahead", "goes"), [(0, 0, True), (0, 2, True), (1, 0, False), (1, 1, True)])
def test_with_balance_on_a_held_up_group_is_overtaken_within_the_tolerance(
    ahead: int, held_ahead: int, goes: bool
) -> None:
    heads = {"attn": Head(4, False, held_ahead), "ffn": Head(5, True, ahead)}
    assert chosen(heads, ON) == ("ffn" if goes else None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("step", "goes"), [(5, True), (9, True), (11, False)])
def test_with_balance_on_it_is_overtaken_by_at_most_so_many_layers(step: int, goes: bool) -> None:
    assert chosen({"attn": Head(4, False, 0), "ffn": Head(step, True, 0)}, ON) == ("ffn" if goes else None)


@pytest.mark.parametrize(("cap", "step", "goes"), [(2, 9, True), (2, 11, False), (0, 5, True), (0, 7, False)])
def test_with_balance_off_the_cap_alone_counts(cap: int, step: int, goes: bool) -> None:
    settings = Settings(balance_prefetch=False, balance_tol=0, pair_ahead=0, kind_ahead_cap=cap)
    heads = {"attn": Head(4, False, 0), "ffn": Head(step, True, 7)}
    assert chosen(heads, settings) == ("ffn" if goes else None)  # type: ignore[arg-type]


def test_a_line_names_the_groups_of_its_layers_for_ever() -> None:
    pool = Pool([torch.empty(1, dtype=torch.uint8) for _ in range(4)], retain=False)
    line = lines_of(pass_order(4), [1, 3], {"ffn": pool})["ffn"]
    found = []
    for _ in range(4):
        found.append((str(line.group), line.step))
        line.start()
    assert found == [("L1.ffn", 3), ("L3.ffn", 7), ("L1.ffn", 11), ("L3.ffn", 15)]
    assert line.ahead == 4
