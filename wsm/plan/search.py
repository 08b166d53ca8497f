"""Where a run does not fit: the change of flags that fits and costs the least predicted time, found by one search.

Layers on the GPU and in CPU memory are given up only as far as they have to be, so for every other choice (mode,
embedding, slots, rows) there is one best plan. Fewer rows may save a layer and a layer many rows: both are weighed by
the time that a row takes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, takewhile
from typing import NamedTuple

from wsm.plan.hardware import GIB, MIB
from wsm.plan.inputs import PlanInputs
from wsm.plan.levers import (
    BATCH,
    CPU_LAYERS,
    DEPTH,
    EMBEDDING,
    GIVEN_UP,
    MODE,
    RESIDENTS,
    Lever,
    as_asked,
    changed_flags,
    choose_settings,
    largest,
)
from wsm.plan.memory import FEWEST_CHUNK_TOKENS
from wsm.plan.plan import Plan, make_plan
from wsm.plan.time import ONE_SLOT, Ceiling, lasting, least_ms, pass_work, passes_of

_OTHER_MODES = {"full": ("stream", "mixed"), "preload": ("stream", "mixed"), "stream": ("mixed",), "mixed": ()}
_ALIKE_MS = 1.001
"""Times this near each other are the same: then the plan with fewer changes is better."""
_TYPICAL = {"ssd": 5e3, "kv_read": 5e3, "kv_write": 3e3, "h2d": 25e3, "d2h": 25e3, "hbm": 1e6, "matmul": 100.0}
"""Of a card on PCIe 4 and a good drive: they only order plans while the machine's own rates are not known."""


def row_ms(plan: Plan, ceilings: Mapping[str, Ceiling]) -> float:
    """What a row of the run takes at least: to choose between plans, of other batches too, by known or typical rates.

    A pass is shared by the rows of a wave in the prefill, and by all rows in the decode. Waits for KV are left out:
    with them fewer rows may be better with the same layers, and :func:`smallest_change` would have to try them all.
    """
    rates = _TYPICAL | {name: ceiling.median for name, ceiling in lasting(ceilings).items()}
    factor = ONE_SLOT if plan.placement.gpu_slots == 1 else 1.0
    rows = {"prefill": min(plan.wave_rows, plan.shape.batch), "decode": plan.shape.batch}
    count = {"prefill": 1, "decode": passes_of(plan)["decode"]}
    work = {phase: work._replace(kv_layers=0) for phase, work in pass_work(plan).items()}
    return factor * sum(count[phase] * least_ms(work[phase], rates) / rows[phase] for phase in rows)


def smallest_change(
    inputs: PlanInputs, ceilings: Mapping[str, Ceiling] | None = None, most_gpu_bytes: int | None = None
) -> PlanInputs | None:
    """The inputs that fit and whose rows take the least predicted time; None if nothing fits.

    Flags are only ever turned down, the embedding moved to CPU memory, or a mode that pages more is taken. Besides
    fitting the budget, at most ``most_gpu_bytes`` are planned. Beside ``--auto``, which chooses all else anew, only
    mode and rows are changed; where that is not enough, it is given up, and ``asked`` is None in what is found.
    """
    if inputs.asked is not None:
        return _chosen_anew(inputs, ceilings or {}) or smallest_change(as_asked(inputs), ceilings, most_gpu_bytes)
    search = _Search(inputs, ceilings or {}, most_gpu_bytes)
    if search.good(make_plan(inputs)):
        return inputs
    best: _Found | None = None
    for mode in (inputs.settings.mode, *_OTHER_MODES[inputs.settings.mode]):
        for choice in _choices(inputs, MODE.at(inputs, mode)):
            best = search.over_rows(choice, best)
    if best is None:
        return _with_smaller_chunks(search, inputs)
    return search.turned_up(best.plan.inputs)


def _with_smaller_chunks(search: _Search, inputs: PlanInputs) -> PlanInputs | None:
    """Where no other flag suffices: with prompts computed fewer tokens at a time, the most that fit; None if none do.

    The automatic number grows with the budget, in steps, so a larger budget may take more than it has.
    """
    chunk = make_plan(inputs).chunk_tokens
    if chunk <= FEWEST_CHUNK_TOKENS:
        return None
    found = smallest_change(replace(inputs, chunk_tokens=FEWEST_CHUNK_TOKENS), search.ceilings, search.most_gpu_bytes)
    if found is None:
        return None
    halves = takewhile(lambda tokens: tokens > FEWEST_CHUNK_TOKENS, (chunk >> times for times in count(1)))
    larger = (replace(found, chunk_tokens=tokens) for tokens in halves)
    return next((each for each in larger if search.good(make_plan(each))), found)


def _chosen_anew(inputs: PlanInputs, ceilings: Mapping[str, Ceiling]) -> PlanInputs | None:
    """What ``--auto`` chooses in the mode and for the rows that take the least time; None where it finds nothing.

    All rows in each mode, and the rows that the search finds: it goes down from all layers that ``--auto`` would take.
    """
    asked, layers = as_asked(inputs), inputs.config.n_layers
    tried = [MODE.at(asked, mode) for mode in (asked.settings.mode, *_OTHER_MODES[asked.settings.mode])]
    plans = [plan for each in tried if (plan := make_plan(choose_settings(each))).fits]
    if inputs.shape.batch > 1 and not (plans and plans[0].placement.mode == asked.settings.mode):
        roomy = CPU_LAYERS.at(replace(inputs, asked=None), layers)
        if (fewer := smallest_change(roomy, ceilings)) is not None:
            fewer = replace(asked, shape=fewer.shape, settings=MODE.at(asked, fewer.settings.mode).settings)
            plans += [plan for plan in [make_plan(choose_settings(fewer))] if plan.fits]
    return min(plans, key=lambda plan: row_ms(plan, ceilings)).inputs if plans else None


def most_layers(inputs: PlanInputs) -> int:
    """How many of the model's layers fit as it was asked for; 0 if not even one does. For weights that are random."""

    def fits(count: int) -> bool:
        model = as_asked(inputs).with_layers(count)
        return make_plan(choose_settings(model) if inputs.asked is not None else model).fits

    return bisect_left(range(1, inputs.config.n_layers + 1), True, key=lambda count: not fits(count))


def _choices(original: PlanInputs, inputs: PlanInputs) -> Iterator[PlanInputs]:
    """The embedding where it is or in CPU memory, with each number of GPU slots: the fewer changes, the earlier."""
    mode, least = inputs.settings.mode, DEPTH.least(inputs)
    depths = [DEPTH.value(inputs)]
    if mode in DEPTH.modes:
        slots = max(depths[0], least) // 2 + 1
        depths += [depth for depth in range(2 * slots - 3, least - 1, -2) if depth < depths[0]]
    for depth in depths:
        deep = DEPTH.at(inputs, depth, original)
        yield deep
        moved = EMBEDDING.at(deep, "cpu")
        if moved.embedding_on_cpu and not deep.embedding_on_cpu:
            yield moved


class _Found(NamedTuple):
    plan: Plan
    row_ms: float
    changes: int

    def better_than(self, other: _Found | None) -> bool:
        if other is None or self.row_ms * _ALIKE_MS < other.row_ms:
            return True
        return self.row_ms <= other.row_ms * _ALIKE_MS and self.changes < other.changes


class _Search:
    """What is looked for: plans that fit, and how one is better than another."""

    def __init__(self, original: PlanInputs, ceilings: Mapping[str, Ceiling], most_gpu_bytes: int | None) -> None:
        self._original, self.ceilings, self.most_gpu_bytes = original, ceilings, most_gpu_bytes

    def good(self, plan: Plan) -> bool:
        return plan.fits_cpu and self._over_gpu(plan) <= 0

    def _over_gpu(self, plan: Plan) -> int:
        limits = [limit for limit in (plan.gpu_budget_bytes, self.most_gpu_bytes) if limit is not None]
        return plan.gpu_bytes - min(limits) if limits else 0

    def _rows(self, inputs: PlanInputs, rows: int) -> PlanInputs:
        return BATCH.at(inputs, rows, self._original)

    def _with_layers(self, inputs: PlanInputs) -> Plan | None:
        """As many layers on the GPU and in CPU memory as fit, at most as many as asked; None if none fit.

        What is too much is given up at once, a layer at most for each layer's bytes. What goes with a layer (a chunk's
        activations may) can free more than that: then layers are taken back as long as they fit, also where what was
        given up has filled CPU memory.
        """
        mode, layer, too_many = inputs.settings.mode, inputs.slot_bytes(), 0
        while not self.good(plan := make_plan(inputs)):
            on_gpu, in_cpu = RESIDENTS.value(inputs), CPU_LAYERS.value(inputs)
            over_gpu, over_cpu = self._over_gpu(plan), plan.cpu_bytes - plan.cpu_budget_bytes
            alone = inputs.hardware.has_gpu or in_cpu == 1
            if on_gpu and mode in RESIDENTS.modes and (over_gpu > 0 or (not inputs.hardware.has_gpu and alone)):
                # Each of a layer's two images is rounded up by the allocator, to 2 MiB at most.
                fewer, too_many = max(1, over_gpu // (layer + 4 * MIB)), on_gpu
                inputs = RESIDENTS.at(inputs, max(0, on_gpu - fewer), self._original)
            elif over_gpu <= 0 and in_cpu > 1 and mode in CPU_LAYERS.modes:
                inputs = CPU_LAYERS.at(inputs, max(1, in_cpu - max(1, over_cpu // layer)), self._original)
            elif over_gpu <= 0 and on_gpu and mode == "mixed":
                # The buffer that a layer is loaded through may be too much for CPU memory.
                inputs, too_many = RESIDENTS.at(inputs, on_gpu - 1, self._original), on_gpu
            else:
                break
        found = plan if self.good(plan) else None
        for on_gpu in range(RESIDENTS.value(plan.inputs) + 1, too_many):
            if self.good(more := make_plan(RESIDENTS.at(plan.inputs, on_gpu, self._original))):
                found = more
            elif found is not None:
                break
        return found

    def over_rows(self, choice: PlanInputs, best: _Found | None) -> _Found | None:
        """The better of ``best`` and what this choice gives with all rows, or with just so few that a layer more fits.

        Between such numbers of rows the layers are the same, and more rows are better.
        """
        rows = self._original.shape.batch
        changes = len(changed_flags(self._original, choice))
        asked = self._found(make_plan(choice), changes)
        if not asked.better_than(best):  # nothing that gives up more than the choice itself can be
            return best
        plan = self._with_layers(self._rows(choice, rows))
        if plan is None:
            rows, plan = self._most_rows(choice, rows, step=max(1, rows // 2))
        while plan is not None:
            found = self._found(plan, len(changed_flags(self._original, plan.inputs)))
            best = found if found.better_than(best) else best
            if rows == 1 or not self._may_pay(choice, rows - 1, best):
                break
            rows, plan = self._most_rows(choice, rows, max(1, rows // 64), other_than=_layers(plan))
        return best

    def _found(self, plan: Plan, changes: int) -> _Found:
        return _Found(plan, row_ms(plan, self.ceilings), changes)

    def _may_pay(self, choice: PlanInputs, rows: int, best: _Found | None) -> bool:
        """Whether fewer rows could be better if they kept all layers."""
        return best is None or row_ms(make_plan(self._rows(choice, rows)), self.ceilings) * _ALIKE_MS < best.row_ms

    def _most_rows(
        self, choice: PlanInputs, below: int, step: int, other_than: tuple[int, int] | None = None
    ) -> tuple[int, Plan | None]:
        """The most rows, fewer than ``below``, that fit, with ``other_than`` these layers, and their plan.

        In steps that double, then by halves; of many rows to a 64th: what is chosen in the end is turned up to the row.
        """

        def tried(rows: int) -> Plan | None:
            plan = self._with_layers(self._rows(choice, rows))
            return plan if plan is not None and _layers(plan) != other_than else None

        low, high, found = below, below, None
        while found is None and low > 1:
            low, step = max(1, low - step), 2 * step
            if (found := tried(low)) is None:
                high = low
        while found is not None and high - low > max(1, low // 64):
            middle = (low + high) // 2
            if (plan := tried(middle)) is not None:
                low, found = middle, plan
            else:
                high = middle
        return low, found

    def turned_up(self, inputs: PlanInputs) -> PlanInputs:
        """The same with each changed flag as near to what was asked for as still fits."""
        original, before = self._original, None
        while inputs != before:
            before = inputs
            for lever in (EMBEDDING, RESIDENTS, CPU_LAYERS, DEPTH, BATCH):
                if lever.value(inputs) != lever.value(original):
                    inputs = self._raised(lever, inputs)
        return inputs

    def _raised(self, lever: Lever, inputs: PlanInputs) -> PlanInputs:
        original = self._original
        if lever is EMBEDDING:
            back = lever.at(inputs, lever.value(original))
            return back if self.good(make_plan(back)) else inputs
        values = range(lever.value(inputs), lever.value(original) + 1)
        found = largest(lever, inputs, values, self.good, original)
        return inputs if found is None else found.inputs


def _layers(plan: Plan) -> tuple[int, int]:
    return RESIDENTS.value(plan.inputs), CPU_LAYERS.value(plan.inputs)


def least_memory(inputs: PlanInputs) -> Plan:
    """The plan with every flag turned down, for budgets of just what it takes.

    The embedding stays on the GPU where only CPU memory is short.
    """
    inputs = MODE.at(as_asked(inputs), "mixed")
    for lever in GIVEN_UP:
        if lever is not EMBEDDING:
            inputs = lever.at(inputs, min(lever.value(inputs), lever.least(inputs)))
    plan = make_plan(inputs)
    if not plan.fits_gpu:
        plan = make_plan(EMBEDDING.at(inputs, "cpu"))
    while not plan.fits:  # a larger budget may make larger chunks: until both agree
        gpu, cpu = max(plan.gpu_bytes, plan.gpu_budget_bytes or 0), max(plan.cpu_bytes, plan.cpu_budget_bytes)
        budget = None if plan.gpu_budget_bytes is None else gpu / GIB
        on_gpu = gpu if inputs.hardware.has_gpu else None
        there = replace(plan.inputs.hardware, gpu_available_bytes=on_gpu, cpu_available_bytes=cpu)
        settings = replace(plan.inputs.settings, gpu_mem_gb=budget, cpu_mem_gb=None)
        plan = make_plan(replace(plan.inputs, settings=settings, hardware=there))
    return plan
