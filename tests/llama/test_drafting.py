"""How deep a draft looks, where it is to choose: as far as the link hides it, and by what was measured alone."""

from __future__ import annotations

import pytest

from llama.drafting import LONGER, depth_that_is_hidden
from llama.speculation.shape import TreeShape
from tests.plans import inputs_for
from wsm.engine.stretch import PhaseStats
from wsm.plan.plan import Plan, make_plan
from wsm.settings import Settings

PASSES, LEVEL_MS = 2, 2.0
SHAPE = TreeShape(8, 1, 9)


def layers_of(plan: Plan) -> int:
    return len(plan.placement.residency.cpu)


def decode(plan: Plan, *, link_ms: float, stall_ms: float, hidden_ms: float = 0.0, once_ms: float = 0.0) -> PhaseStats:
    """Two passes, each with nine levels, in which the link moves a layer in ``link_ms``."""
    layers = layers_of(plan)
    moved = PASSES * layers * plan.inputs.slot_bytes()
    drafting_ms = PASSES * LEVEL_MS * (SHAPE.depth + 1)
    return PhaseStats(
        passes=PASSES,
        wall_ms=PASSES * layers * link_ms + once_ms,
        bytes={},
        bytes_moved={"weight_h2d": moved},
        busy_ms={"h2d": PASSES * layers * link_ms or None},
        stall_ms={"h2d": PASSES * stall_ms, "ssd": None},
        idle_ms={},
        drafting_ms=drafting_ms,
        drafting_link_ms=PASSES * hidden_ms,
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    made = make_plan(inputs_for(settings=Settings(mode="stream", gpu_cached_layers=4, group_prefetch_depth=4)))
    assert made.placement.gpu_slots == 3
    return made


def test_three_slots_hide_as_many_levels_as_their_bytes_take(plan: Plan) -> None:
    allowed_ms = LONGER * layers_of(plan) * 8.0
    for once_ms in (0.0, 5000.0):  # kernels that are compiled in a first pass make no later one longer
        found = depth_that_is_hidden(plan, decode(plan, link_ms=8.0, stall_ms=600.0, once_ms=once_ms), SHAPE)
        assert found == int((3 * 8.0 + allowed_ms) / LEVEL_MS) - 1


def test_where_the_computation_waits_for_nothing_nothing_is_hidden(plan: Plan) -> None:
    still = depth_that_is_hidden(plan, decode(plan, link_ms=8.0, stall_ms=0.0), SHAPE)
    assert still == int(LONGER * layers_of(plan) * 8.0 / LEVEL_MS) - 1
    hidden_already = depth_that_is_hidden(plan, decode(plan, link_ms=8.0, stall_ms=0.0, hidden_ms=10.0), SHAPE)
    assert hidden_already == still + 5


def test_a_slow_draft_still_proposes_a_token_and_one_that_was_not_timed_stays(plan: Plan) -> None:
    slow = decode(plan, link_ms=0.01, stall_ms=0.01)
    slow = PhaseStats(**{name: getattr(slow, name) for name in slow.__dataclass_fields__} | {"drafting_ms": 1e6})
    assert depth_that_is_hidden(plan, slow, SHAPE) == 1
    none = PhaseStats(0, 0.0, {}, {}, {"h2d": None}, {"h2d": None}, {})
    assert depth_that_is_hidden(plan, none, SHAPE) == SHAPE.depth
