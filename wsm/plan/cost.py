"""What a change of flags costs or buys: time of a decode pass, bytes, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wsm.plan.ceilings import Ceiling
from wsm.plan.floor import predicted_floor
from wsm.plan.plan import Plan
from wsm.plan.prediction import predicted_pass_ms

UNKNOWN_TIME = "not known in time yet: the first run of this model measures this machine's rates, and plans use them"


@dataclass(frozen=True, slots=True)
class PassTimes:
    """A decode pass of two plans, in ms; ``at_least`` if both are floors and no predictions."""

    before_ms: float
    after_ms: float
    at_least: bool

    @property
    def change_ms(self) -> float:
        return self.after_ms - self.before_ms


def pass_times(before: Plan, after: Plan, ceilings: Mapping[str, Ceiling]) -> PassTimes | None:
    """Both by the same rule: predicted where both can be, else both floors; None where neither is known."""
    predicted = [predicted_pass_ms(plan, ceilings)["decode"] for plan in (before, after)]
    if predicted[0] is not None and predicted[1] is not None:
        return PassTimes(predicted[0], predicted[1], at_least=False)
    if any(_unknown(plan, ceilings) for plan in (before, after)):
        return None
    best = {name: ceiling.value for name, ceiling in ceilings.items()}
    floors = [predicted_floor(plan, best).get("decode") for plan in (before, after)]
    if floors[0] is None or floors[1] is None:
        return None
    return PassTimes(floors[0].ms, floors[1].ms, at_least=True)


def _unknown(plan: Plan, ceilings: Mapping[str, Ceiling]) -> bool:
    """Whether the plan moves bytes whose rate is not known; a floor without them would flatter it."""
    needed = {"ssd_read": "ssd", "weight_h2d": "h2d"}
    return any(plan.bytes_per_pass[moved] and rate not in ceilings for moved, rate in needed.items())


def cost_of(before: Plan, after: Plan, ceilings: Mapping[str, Ceiling]) -> str:
    """What following an advice costs, in a sentence; ``before`` is what was asked for, as if it fitted."""
    times = pass_times(before, after, ceilings)
    if times is None:
        return f"its cost is {UNKNOWN_TIME}; {_bytes_more(before, after)}"
    bound = "at least " if times.at_least else ""
    text = f"its predicted cost: a decode pass of {bound}{times.after_ms:.2f} ms instead of {times.before_ms:.2f} ms"
    if times.before_ms:
        text += f" ({100 * times.change_ms / times.before_ms:+.1f} %)"
    rows = before.shape.batch, after.shape.batch
    if rows[0] != rows[1]:
        each = times.before_ms / rows[0], times.after_ms / rows[1]
        text += f", for {rows[1]} rows instead of {rows[0]}: {each[1]:.2f} ms a token instead of {each[0]:.2f} ms"
    return f"{text}; {_bytes_more(before, after)}"


def _bytes_more(before: Plan, after: Plan) -> str:
    more = {name: after.bytes_per_pass[name] - before.bytes_per_pass[name] for name in ("ssd_read", "weight_h2d")}
    told = {"ssd_read": "from the SSD", "weight_h2d": "over the link"}
    parts = [f"{more[name] / 1e6:+.1f} MB {where}" for name, where in told.items() if more[name]]
    return f"a pass moves {' and '.join(parts)}" if parts else "a pass moves the same bytes"
