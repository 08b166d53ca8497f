"""The flags that trade memory for time, in one table.

``plan`` shows what one step of each would buy, ``--auto`` sets them, and where a run does not fit the smallest change
of them that fits is looked for (:mod:`wsm.plan.search`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

from wsm.plan.inputs import PlanInputs
from wsm.plan.kv import KV_WAIT_MS
from wsm.plan.plan import Plan, make_plan
from wsm.plan.time import Ceiling, PassTimes, pass_times
from wsm.settings import CHOSEN, MODES

_PAGED = ("mixed", "stream")


@dataclass(frozen=True, slots=True)
class Lever:
    """A flag, the modes in which it changes anything, and what can be done with it.

    ``step`` gives, from inputs and a value, the next value that buys time or memory; the same one where there is none.
    Less memory is taken the smaller the number; ``most`` and ``least`` are those beyond which nothing changes. ``many``
    values are searched by halves, which finds one that fits where the next larger one does not.
    """

    field: str
    modes: Sequence[str]
    step: Callable[[PlanInputs, Any], Any]
    most: Callable[[PlanInputs], int] | None = None
    least: Callable[[PlanInputs], int] = lambda inputs: 0
    many: bool = False

    def asked(self, inputs: PlanInputs) -> Any:
        """The value as it was asked for."""
        return inputs.shape.batch if self is BATCH else getattr(inputs.settings, self.field)

    def value(self, inputs: PlanInputs) -> Any:
        """As far as it changes anything."""
        return self.asked(inputs) if self.most is None else min(self.asked(inputs), self.most(inputs))

    def at(self, inputs: PlanInputs, value: Any, original: PlanInputs | None = None) -> PlanInputs:
        """The inputs with this flag at ``value``; where that is the ``original`` one, as it was asked for."""
        if self is BATCH:  # cut from the original one: the rows' lengths are known for it alone
            return replace(inputs, shape=(original or inputs).shape.with_batch(value))
        if original is not None and value == self.value(original):
            value = self.asked(original)
        return _with(inputs, {self.field: value})

    def spelled(self, value: Any) -> str:
        """As it is typed."""
        return f"--{self.field.replace('_', '-')} {value}"


def _with(inputs: PlanInputs, changes: dict[str, Any]) -> PlanInputs:
    return replace(inputs, settings=replace(inputs.settings, **changes))


def as_asked(inputs: PlanInputs) -> PlanInputs:
    """The inputs as they were before ``--auto`` chose any."""
    return inputs if inputs.asked is None else replace(inputs, settings=inputs.asked, asked=None)


def _least_depth(inputs: PlanInputs) -> int:
    """WSM_AGGRESSIVE_GPU_PREFETCH is a floor under the depth: a smaller depth would free nothing."""
    return max(1, inputs.settings.aggressive_gpu_prefetch)


def _most_depth(inputs: PlanInputs) -> int:
    """Nor would one that WSM_GPU_MAX_GROUPS caps anyway."""
    return max(inputs.settings.gpu_max_groups, _least_depth(inputs))


_layers = attrgetter("config.n_layers")
RESIDENTS = Lever("gpu_cached_layers", _PAGED, lambda inputs, now: min(now + 1, _layers(inputs)), _layers)
DEPTH = Lever(
    "group_prefetch_depth", _PAGED, lambda inputs, now: min(now, _least_depth(inputs)), _most_depth, _least_depth
)
CPU_LAYERS = Lever("cpu_cache_layers", ("mixed",), lambda inputs, now: now + 1, _layers, lambda inputs: 1)
# The pools are part of --cpu-cache-layers, so a smaller --prefetch-distance only turns slots into residents: it frees
# nothing, and is never advised.
DISTANCE = Lever("prefetch_distance", ("mixed",), lambda inputs, now: max(now - 1, 1))
MODE = Lever("mode", ("mixed",), lambda inputs, now: "stream")
EMBEDDING = Lever("embedding", (*_PAGED, "preload"), lambda inputs, now: "cpu")
BATCH = Lever("batch_size", MODES, lambda inputs, now: 2 * now, least=lambda inputs: 1, many=True)

LEVERS = (RESIDENTS, DEPTH, CPU_LAYERS, DISTANCE, MODE, EMBEDDING, BATCH)
"""In the order in which their steps are shown, and the choice of ``--auto``."""
GIVEN_UP = (EMBEDDING, RESIDENTS, DEPTH, CPU_LAYERS, BATCH)
"""What frees memory, in the order in which it is told."""


class Step(NamedTuple):
    """One flag's next value and the plan that it gives; ``times`` is None where no rates are known."""

    flag: str
    before: Plan
    after: Plan
    times: PassTimes | None

    @property
    def beside(self) -> list[str]:
        """What the figures do not say: that it does not fit, and what else changes with the flag."""
        old, new = self.before, self.after
        said = [] if new.fits else ["does not fit"]
        for name, where in (("cpu", "in CPU memory"), ("disk", "on --kv-device")):
            if more := len(getattr(new.kv, name)) - len(getattr(old.kv, name)):
                parts = "1 part" if abs(more) == 1 else f"{abs(more)} parts"
                said.append(f"{parts} of KV {'more' if more > 0 else 'fewer'} {where}")
        if new.placement.cpu_slots == 1 < old.placement.cpu_slots:
            said.append("with one slot the drive waits for copies, which is not counted: --auto keeps 2")
        others = (lever for lever in LEVERS if lever.field in CHOSEN and not self.flag.startswith(lever.spelled("")))
        changed = [
            lever.spelled(lever.asked(new.inputs))
            for lever in others
            if new.placement.mode in lever.modes and lever.asked(old.inputs) != lever.asked(new.inputs)
        ]
        return [*said, f"--auto then chooses {' '.join(changed)}"] if changed else said


def steps(plan: Plan, ceilings: Mapping[str, Ceiling]) -> list[Step]:
    """A step for every flag that moves other bytes or takes other memory in this plan's mode.

    A flag that ``--auto`` leaves alone is typed beside it: then the rest is chosen anew.
    """
    found = []
    for lever in LEVERS:
        if plan.inputs.settings.mode in lever.modes:
            value = lever.step(plan.inputs, lever.asked(plan.inputs))
            if plan.inputs.asked is None or lever.field in CHOSEN:
                after = make_plan(lever.at(plan.inputs, value))
            else:
                after = make_plan(choose_settings(lever.at(as_asked(plan.inputs), value)))
            if any(more_bytes(plan, after).values()):
                found.append(Step(lever.spelled(value), plan, after, pass_times(plan, after, ceilings)))
    return found


def more_bytes(before: Plan, after: Plan) -> dict[str, int]:
    """How many bytes more a pass of ``after`` moves, by way, and how many more each tier holds (``gpu``, ``cpu``)."""
    moved = {way: after.bytes_per_pass[way] - nbytes for way, nbytes in before.bytes_per_pass.items()}
    return {**moved, "gpu": after.gpu_bytes - before.gpu_bytes, "cpu": after.cpu_bytes - before.cpu_bytes}


def changed_flags(before: PlanInputs, after: PlanInputs) -> list[str]:
    """The flags that lead from one set of inputs to the other, as they are typed; ``--auto`` is kept where it chose."""
    levers = [lever for lever in (MODE, *GIVEN_UP) if after.asked is None or lever.field not in CHOSEN]
    chunk = [] if after.chunk_tokens == before.chunk_tokens else [f"--prefill-chunk-tokens {after.chunk_tokens}"]
    return [lever.spelled(lever.value(after)) for lever in levers if lever.value(before) != lever.value(after)] + chunk


Good = Callable[[Plan], bool]


def largest(
    lever: Lever, inputs: PlanInputs, values: range, good: Good, original: PlanInputs | None = None
) -> Plan | None:
    """The plan at the largest of the ascending ``values`` that is good; None where none is."""

    def plan_at(value: int) -> Plan:
        return make_plan(lever.at(inputs, value, original))

    if not lever.many:
        return next(filter(good, map(plan_at, reversed(values))), None)
    low, high = values[0], values[-1]
    if good(found := plan_at(high)):
        return found
    if not good(found := plan_at(low)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if good(plan := plan_at(middle)):
            low, found = middle, plan
        else:
            high = middle
    return found


LOOK_AHEAD_GROUPS, READ_AHEAD_LAYERS = 2, 2
"""Two slots of each kind keep the link busy (docs/LOG.md), so the pools are that small and residents take the rest."""


def choose_settings(inputs: PlanInputs) -> PlanInputs:
    """``--auto``: the inputs with the residency and pools that make a pass shortest within the budgets.

    A pass is bound by the SSD or by the link, and both carry fewer bytes the more layers are resident, on the GPU above
    all; but a layer there may drive out as many bytes of KV. The embedding moves to CPU memory where that lets a pass
    move fewer bytes: first from the drives, then over the link. The mode stays as it is: ``full`` and ``preload`` have
    nothing to choose. Where nothing fits, it is the smallest choice, for the advice to explain.
    """
    found = inputs
    if inputs.settings.mode in _PAGED:
        found = min(_most_layers(inputs), _most_layers(EMBEDDING.at(inputs, "cpu")), key=_moved).inputs
    return replace(found, asked=inputs.settings)


_LINK_BYTES_A_MS = 54e6
"""Of the link on which :data:`KV_WAIT_MS` was measured: its rate is not known yet when flags are chosen."""


def _moved(plan: Plan) -> tuple[bool, int, int]:
    """What ``--auto`` keeps small: bytes of a pass from the drive that gives more, then over the link, with what it
    could carry while KV is waited for; what fits comes first. The store and ``--kv-device`` are read side by side, and
    either is far slower than the link."""
    moved = plan.bytes_per_pass
    drives = max(moved["ssd_read"], moved["kv_read"])
    waited_for = int(plan.kv.layers_below * KV_WAIT_MS * _LINK_BYTES_A_MS)
    return not plan.fits, drives, moved["weight_h2d"] + moved["kv_h2d"] + waited_for


def _most_layers(inputs: PlanInputs) -> Plan:
    """As many layers on the GPU as fit, then as many in CPU memory."""
    layers = _layers(inputs)
    small = _with(inputs, {"group_prefetch_depth": LOOK_AHEAD_GROUPS, "prefetch_distance": READ_AHEAD_LAYERS})
    # The globals are loaded through CPU layers where these are as large, and else through a buffer of their own: one
    # layer more on the GPU may cost several in CPU memory. So both starts are followed to their end.
    as_large = min(layers, -(-inputs.layouts[None].nbytes // inputs.slot_bytes()))
    counts = {1, as_large} if inputs.settings.mode == "mixed" else {1}
    starts = [_with(small, {"cpu_cache_layers": in_cpu}) for in_cpu in sorted(counts)]
    found = [make_plan(RESIDENTS.at(starts[-1], 0))]
    most = _most_held(found[0], _gpu_limit(found[0]), layers)

    @cache  # it is asked for the same ones again and again
    def planned(place: int, on_gpu: int) -> Plan:
        return make_plan(RESIDENTS.at(starts[place], on_gpu))

    def largest_on_gpu(place: int, good: Good) -> Plan | None:
        return next(filter(good, (planned(place, on_gpu) for on_gpu in range(most, -1, -1))), None)

    # So do residents of the GPU: where all layers are there, fewer may fit where all do not.
    goods: list[Good] = [lambda plan: plan.fits, lambda plan: plan.inputs.hardware.has_gpu and plan.fits_gpu]
    for good in goods:
        fitting = [largest_on_gpu(place, each) for place in range(len(starts)) for each in (good, _with_kv(good))]
        if any(fitting):
            found = [plan for plan in fitting if plan is not None]
            break
    return _one_by_one(min((_most_in_cpu(plan, layers) for plan in found), key=_moved), layers)


def _one_by_one(plan: Plan, layers: int) -> Plan:
    """The same with a layer more or less on the GPU, for as long as that is better: KV goes down in whole parts, so
    between all of it on the device and as many layers as fit there may be something better than both."""
    while True:
        counts = {plan.inputs.settings.gpu_cached_layers + more for more in (1, -1)} & {*range(layers + 1)}
        beside = [make_plan(RESIDENTS.at(plan.inputs, count)) for count in sorted(counts)]
        best = min([plan, *(_most_in_cpu(each, layers) for each in beside if each.fits_gpu)], key=_moved)
        if best is plan:
            return plan
        plan = best


def _gpu_limit(plan: Plan) -> int:
    """What the GPU tier may take at most, also where it is ordinary memory."""
    return plan.cpu_budget_bytes if plan.gpu_budget_bytes is None else plan.gpu_budget_bytes


def _most_held(plan: Plan, limit: int, layers: int) -> int:
    """How many of the ``layers`` a tier could hold if it held nothing else: no more need be tried."""
    smallest = min(plan.inputs.layers_bytes([layer]) for layer in range(_layers(plan.inputs)))
    return min(layers, limit // smallest)


def _with_kv(good: Good) -> Good:
    """Those of the good plans that keep all KV on the device."""
    return lambda plan: good(plan) and not plan.kv.below


def _most_in_cpu(plan: Plan, layers: int) -> Plan:
    """The same with as many layers in CPU memory as fit, or as many as make the drives' reads shortest."""
    if plan.inputs.settings.mode == "stream":
        return plan
    most = _most_held(plan, plan.cpu_budget_bytes, layers - plan.inputs.settings.gpu_cached_layers)
    in_cpu = range(1, max(1, most) + 1)
    found = largest(CPU_LAYERS, plan.inputs, in_cpu, lambda plan: plan.fits) or plan
    if not found.fits or not found.kv.disk:
        return found
    # Then a layer more in CPU memory drives as many bytes of KV to the device.
    fewer = (make_plan(CPU_LAYERS.at(plan.inputs, count)) for count in reversed(in_cpu))
    return min(found, *fewer, key=_moved)


def auto_flags(plan: Plan) -> list[str]:
    """The choice of ``--auto`` as flags to keep, with the values in force."""
    settings = plan.inputs.settings
    return [
        lever.spelled(plan.placement.clipped.get(lever.field, lever.asked(plan.inputs)))
        for lever in LEVERS
        if lever.field in CHOSEN and settings.mode in lever.modes and settings.mode in _PAGED
        if lever is not EMBEDDING or settings.embedding != "gpu"
    ]
