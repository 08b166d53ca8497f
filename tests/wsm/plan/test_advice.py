"""Following the advice always fits, and nothing in it is more than needed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llama.config import ModelConfig
from tests.plans import TINY, inputs_for, placements
from wsm.errors import DoesNotFit
from wsm.plan.advice import check_fits
from wsm.plan.hardware import GIB, Hardware
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.levers import changed_flags
from wsm.plan.plan import Plan, make_plan
from wsm.plan.search import least_memory, row_ms, smallest_change
from wsm.plan.time import Ceiling
from wsm.settings import MODES, Settings

machines = st.builds(
    lambda gpu, cpu: Hardware("cuda:0", 80 * GIB, gpu, 0, cpu) if gpu else Hardware("cpu", None, None, 0, cpu),
    st.one_of(st.none(), st.integers(100 << 20, 260 << 20)),
    st.integers(0, 40 << 20),
)
small_models = st.builds(lambda layers: replace(TINY, n_layers=layers, dim=128, ffn_dim=2048), st.integers(1, 14))
shapes = st.builds(lambda b, p, n: RunShape(b, p, n, b * p), st.integers(1, 24), st.integers(1, 700), st.integers(1, 9))


@given(config=small_models, chosen=placements, shape=shapes, hardware=machines)
@example(  # more layers are asked for than there are, given up, and found to fit after all
    config=replace(TINY, n_layers=2, dim=128, ffn_dim=2048),
    chosen={"gpu_cached_layers": 3, "cpu_cache_layers": 1, "prefetch_distance": 1, "gpu_max_groups": 2},
    shape=RunShape(2, 160, 1, 320),
    hardware=Hardware("cuda:0", 80 * GIB, 105747238, 0, 3260416),
)
@hypothesis_settings(max_examples=80, deadline=None)
def test_following_the_advice_fits_and_nothing_in_it_is_more_than_needed(
    config: ModelConfig, chosen: dict[str, Any], shape: RunShape, hardware: Hardware
) -> None:
    inputs = inputs_for(config, Settings(**chosen), shape, hardware)
    fitting = smallest_change(inputs)
    if fitting is None:
        return
    assert make_plan(fitting).fits
    flags = changed_flags(inputs, fitting)
    assert bool(flags) == (not make_plan(inputs).fits)
    assert follow(inputs, flags).settings == fitting.settings
    assert make_plan(follow(inputs, flags)).fits
    for left_out in flags:
        assert not make_plan(follow(inputs, [flag for flag in flags if flag != left_out])).fits
        flag, value = left_out.split()
        if value.isdecimal():
            more = 2 * int(value) if flag == "--prefill-chunk-tokens" else int(value) + 1
            one_more = [text if text != left_out else f"{flag} {more}" for text in flags]
            assert not make_plan(follow(inputs, one_more)).fits


def follow(inputs: PlanInputs, flags: list[str]) -> PlanInputs:
    """What the user's next run would plan from."""
    for text in flags:
        flag, value = text.split()
        field = flag.removeprefix("--").replace("-", "_")
        if field == "batch_size":
            inputs = replace(inputs, shape=inputs.shape.with_batch(int(value)))
        elif field == "prefill_chunk_tokens":
            inputs = replace(inputs, chunk_tokens=int(value))
        else:
            changes: dict[str, Any] = {field: int(value) if value.isdecimal() else value}
            inputs = replace(inputs, settings=replace(inputs.settings, **changes))
    return inputs


def test_where_a_smaller_budget_fits_a_larger_one_is_told_a_change_that_fits() -> None:
    """The automatic chunk grows with the budget, in steps: where nothing else suffices, a smaller one is named."""
    shape, hardware = RunShape(2, 3000, 8, 6000), Hardware("cpu", None, None, 0, 8 * GIB)
    named, fits = set[str](), False
    for budget_mb in range(10, 120, 2):
        settings = Settings(mode="stream", gpu_cached_layers=2, gpu_mem_gb=budget_mb / 1024)
        inputs = inputs_for(replace(TINY, n_layers=48, dim=256, ffn_dim=768), settings, shape, hardware)
        fitting = smallest_change(inputs)
        assert fitting is not None or not fits
        if fitting is not None:
            fits = True
            flags = changed_flags(inputs, fitting)
            assert make_plan(follow(inputs, flags)).fits
            named |= {flag.split()[0] for flag in flags}
    assert "--prefill-chunk-tokens" in named


@given(config=small_models, chosen=placements, shape=shapes, hardware=machines)
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_least_memory_that_is_named_suffices(
    config: ModelConfig, chosen: dict[str, Any], shape: RunShape, hardware: Hardware
) -> None:
    plan = least_memory(inputs_for(config, Settings(**chosen), shape, hardware))
    assert plan.fits
    assert smallest_change(plan.inputs) is plan.inputs


@pytest.mark.parametrize(
    ("settings", "batch", "advised"),
    [
        (Settings(gpu_mem_gb=15), 1, ["--embedding cpu"]),
        (Settings(gpu_mem_gb=15, embedding="cpu"), 1, []),
        (Settings(gpu_mem_gb=14, embedding="cpu"), 1, ["--group-prefetch-depth 3"]),
        (Settings(gpu_mem_gb=9.5, embedding="cpu"), 1, ["--gpu-cached-layers 2", "--group-prefetch-depth 3"]),
        (Settings(gpu_mem_gb=16), 32, ["--embedding cpu"]),
        (Settings(cpu_mem_gb=32), 1, ["--cpu-cache-layers 20"]),
        (Settings(mode="stream", cpu_mem_gb=100), 1, ["--mode mixed"]),
        (Settings(mode="preload", gpu_mem_gb=24), 1, ["--mode stream"]),
        (Settings(mode="full", gpu_mem_gb=24, cpu_mem_gb=100), 1, ["--mode mixed"]),
        (Settings(mode="full", gpu_mem_gb=150, cpu_mem_gb=100), 512, ["--batch-size 167"]),
        # 24 of 40 layers of CPU memory were given up for KV where 30 rows fewer cost a third of the time.
        (
            Settings(gpu_mem_gb=24, cpu_mem_gb=100),
            128,
            ["--group-prefetch-depth 3", "--cpu-cache-layers 29", "--batch-size 98"],
        ),
        (Settings(mode="stream", cpu_mem_gb=134, gpu_mem_gb=24, group_prefetch_depth=3), 33, ["--batch-size 32"]),
    ],
)
def test_the_advice_for_70b(settings: Settings, batch: int, advised: list[str]) -> None:
    inputs = inputs_for(settings=settings, shape=RunShape(batch, 2016, 32, batch * 2016))
    if not advised:
        check_fits(make_plan(inputs))
        return
    with pytest.raises(DoesNotFit) as raised:
        check_fits(make_plan(inputs))
    fitting = smallest_change(inputs)
    assert fitting is not None
    assert changed_flags(inputs, fitting) == advised
    assert f"it fits with {' '.join(advised)}\n" in str(raised.value)


def test_one_row_less_is_advised_where_it_saves_a_layer() -> None:
    """A row of KV in CPU memory takes 0.7 GB, a layer 1.7: to give up the layer costs 2 % a token, the row 1 %."""
    asked = Settings(gpu_mem_gb=24, cpu_mem_gb=400, group_prefetch_depth=3, embedding="cpu")
    inputs = inputs_for(settings=asked, shape=RunShape(100, 2016, 32, 100 * 2016))
    budget = (make_plan(inputs).cpu_bytes - 100_000_000) / GIB
    short = replace(inputs, settings=replace(asked, cpu_mem_gb=budget))
    fitting = smallest_change(short)
    assert fitting is not None
    assert changed_flags(short, fitting) == ["--batch-size 99"]


def _tight(mode: str, on_gpu: int, *, gpu_MiB: int, cpu_MiB: int) -> dict[str, Any]:
    """A row with the least of all that is not named."""
    ones = dict.fromkeys(("cpu_cache_layers", "prefetch_distance", "group_prefetch_depth"), 1)
    chosen = {"mode": mode, "gpu_cached_layers": on_gpu, **ones}
    return {"chosen": chosen, "rows": 1, "gpu_MiB": gpu_MiB, "cpu_MiB": cpu_MiB, "ssd_MBps": 500.0}


@given(
    chosen=st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["mixed", "stream", "preload", "full"]),
            "gpu_cached_layers": st.integers(0, 4),
            "cpu_cache_layers": st.integers(1, 4),
            "prefetch_distance": st.integers(1, 3),
            "group_prefetch_depth": st.integers(1, 6),
        }
    ),
    rows=st.integers(1, 5),
    gpu_MiB=st.integers(60, 200),
    cpu_MiB=st.integers(5, 200),
    ssd_MBps=st.sampled_from([500.0, 7_000.0]),
)
@example(
    **_tight("mixed", 2, gpu_MiB=129, cpu_MiB=21)
)  # a layer less makes a chunk smaller, and frees as much as three
@example(
    **_tight("stream", 2, gpu_MiB=125, cpu_MiB=24)
)  # without layers there, too many in CPU memory; with one they fit
@example(**_tight("mixed", 3, gpu_MiB=135, cpu_MiB=21))  # a layer less on the GPU takes less of CPU memory, too
@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
def test_no_other_change_that_fits_is_predicted_to_cost_a_row_noticeably_less(
    chosen: dict[str, Any], rows: int, gpu_MiB: int, cpu_MiB: int, ssd_MBps: float
) -> None:
    """Every mode, embedding, depth, number of layers in both tiers, and of rows."""
    config = replace(TINY, n_layers=4, dim=128, ffn_dim=8192, vocab_size=20_000)
    hardware = Hardware("cuda:0", 80 * GIB, gpu_MiB << 20, 0, cpu_MiB << 20)
    inputs = inputs_for(config, Settings(**chosen), RunShape(rows, 512, 8, rows * 512), hardware)
    rates = {name: Ceiling(rate, rate, "MBps", 0.0, "") for name, rate in (("ssd", ssd_MBps), ("h2d", 25_000.0))}
    fitting, asked = smallest_change(inputs, rates), inputs.settings
    modes = {"full": MODES, "preload": MODES[:3], "stream": MODES[:2], "mixed": MODES[:1]}[asked.mode]
    best = min(
        (
            row_ms(plan, rates)
            for mode, embedding, depth, on_gpu, in_cpu, batch in itertools.product(
                (mode for mode in modes if mode in ("mixed", "stream", asked.mode)),
                ("gpu", "cpu"),
                range(2, asked.group_prefetch_depth + 1) or [asked.group_prefetch_depth],
                range(asked.gpu_cached_layers + 1),
                range(1, asked.cpu_cache_layers + 1),
                range(1, rows + 1),
            )
            if (plan := make_plan(_at(inputs, batch, mode, embedding, depth, on_gpu, in_cpu))).fits
        ),
        default=None,
    )
    assert (fitting is None) == (best is None)
    if fitting is not None and best is not None:
        assert row_ms(make_plan(fitting), rates) <= 1.005 * best


def _at(inputs: PlanInputs, batch: int, mode: str, embedding: Any, depth: int, on_gpu: int, in_cpu: int) -> PlanInputs:
    settings = replace(
        inputs.settings,
        mode=mode,
        embedding=embedding,
        group_prefetch_depth=depth,
        gpu_cached_layers=on_gpu,
        cpu_cache_layers=in_cpu,
    )
    return replace(inputs, settings=settings, shape=inputs.shape.with_batch(batch))


def test_the_advice_for_a_large_batch_is_found_in_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(inputs: PlanInputs) -> Plan:
        made.append(inputs.shape.batch)
        return make_plan(inputs)

    monkeypatch.setattr("wsm.plan.search.make_plan", counted)
    inputs = inputs_for(settings=Settings(gpu_mem_gb=16), shape=RunShape(4_000, 2016, 32, 4_000 * 2016))
    assert smallest_change(inputs) is not None
    assert len(made) < 300


def test_a_depth_below_the_aggressive_prefetch_is_never_advised() -> None:
    inputs = inputs_for(settings=Settings(gpu_mem_gb=7, aggressive_gpu_prefetch=4))
    with pytest.raises(DoesNotFit, match="suffices: even --embedding cpu --gpu-cached-layers 0 --cpu"):
        check_fits(make_plan(inputs))


def test_what_does_not_fit_is_told_line_by_line() -> None:
    with pytest.raises(DoesNotFit) as raised:
        check_fits(make_plan(inputs_for(settings=Settings(gpu_mem_gb=5))))
    first, *table = str(raised.value).splitlines()
    assert first.startswith("the run does not fit: it takes 16.")
    assert "; no change of flags suffices: even --embedding cpu --gpu-cached-layers 0 " in first
    assert " would take 6.11 GiB of GPU memory and 8.09 GiB of CPU memory" in first
    names = [line.strip().split("  ")[0] for line in table]
    for name in ("GPU memory", "weights resident, 4 layers", "pools, 3 slots a kind", "KV windows, 3 parts", "budget"):
        assert name in names
    assert len({len(line) for line in table[: names.index("budget") + 1]}) == 1
