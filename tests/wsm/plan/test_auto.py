"""``--auto`` against settings by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.plans import H70B, inputs_for
from wsm.plan.hardware import GIB, Hardware
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.levers import auto_flags, choose_settings
from wsm.plan.plan import Plan, make_plan
from wsm.plan.time import Ceiling, predicted_pass_ms
from wsm.settings import CHOSEN, Settings

EIGHT_LAYERS, SIXTEEN_LAYERS = (replace(H70B, n_layers=count) for count in (8, 16))
MACHINE = Hardware("cuda:0", 80 * GIB, 80 * GIB, GIB // 2, 64 * GIB)


def decode_ms(plan: Plan, ssd_MBps: float, h2d_MBps: float) -> float:
    """The predicted pass; where nothing streams, nothing is predicted, and nothing is faster."""
    rates = {"ssd": ssd_MBps, "h2d": h2d_MBps}
    ceilings = {name: Ceiling(rate, rate, "MBps", 0.0, "") for name, rate in rates.items()}
    estimate = predicted_pass_ms(plan, ceilings)["decode"]
    return 0.0 if estimate is None else estimate.ms


def with_settings(inputs: PlanInputs, **changes: int) -> PlanInputs:
    return replace(inputs, settings=replace(inputs.settings, **changes))  # type: ignore[arg-type]


@given(
    mode=st.sampled_from(["mixed", "stream"]),
    gpu_GiB=st.floats(8, 30),
    cpu_GiB=st.floats(4, 40),
    ssd_MBps=st.sampled_from([500.0, 1_800.0, 7_000.0, 30_000.0]),
    h2d_MBps=st.sampled_from([12_000.0, 25_000.0, 54_000.0]),
    on_gpu=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    in_cpu=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    depth=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    distance=st.integers(2, 6),
)
@example(
    mode="mixed",
    gpu_GiB=17.0,
    cpu_GiB=5.0,
    ssd_MBps=500.0,
    h2d_MBps=12_000.0,
    on_gpu=(0, 0),
    in_cpu=(1, 3),
    depth=(1, 1),
    distance=2,
)
@example(  # the globals' loading buffer costs the sixth layer on the GPU two in CPU memory
    mode="mixed",
    gpu_GiB=18.0,
    cpu_GiB=6.0,
    ssd_MBps=500.0,
    h2d_MBps=12_000.0,
    on_gpu=(5, 5),
    in_cpu=(3, 3),
    depth=(2, 2),
    distance=2,
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_auto_beats_or_ties_every_setting_of_a_grid_on_the_same_budgets(
    mode: str,
    gpu_GiB: float,
    cpu_GiB: float,
    ssd_MBps: float,
    h2d_MBps: float,
    on_gpu: tuple[int, int],
    in_cpu: tuple[int, int],
    depth: tuple[int, int],
    distance: int,
) -> None:
    budgets = Settings(mode=mode, gpu_mem_gb=gpu_GiB, cpu_mem_gb=cpu_GiB, prefetch_distance=distance)
    inputs = inputs_for(EIGHT_LAYERS, budgets, hardware=MACHINE)
    by_hand = [
        make_plan(with_settings(inputs, gpu_cached_layers=g, cpu_cache_layers=c, group_prefetch_depth=d))
        for g, c, d in itertools.product(on_gpu, in_cpu, depth)
    ]
    fitting = [decode_ms(plan, ssd_MBps, h2d_MBps) for plan in by_hand if plan.fits]
    assume(fitting)
    chosen = make_plan(choose_settings(inputs))
    assert chosen.fits
    assert decode_ms(chosen, ssd_MBps, h2d_MBps) <= 1.02 * min(fitting)


def test_the_embedding_moves_to_cpu_memory_where_that_buys_a_layer() -> None:
    inputs = inputs_for(EIGHT_LAYERS, Settings(mode="stream", gpu_mem_gb=16.0), hardware=MACHINE)
    chosen = choose_settings(inputs).settings
    assert chosen.embedding == "cpu"
    assert not make_plan(replace(inputs, settings=replace(chosen, embedding="gpu"))).fits


def test_layers_on_the_gpu_do_not_drive_out_as_many_bytes_of_kv() -> None:
    """32 rows of 2 048 tokens: a fifth layer would spare the link 1.7 GB a pass, and cost it 2.1."""
    shape = RunShape(32, 2016, 32, 32 * 2016)
    inputs = inputs_for(EIGHT_LAYERS, Settings(mode="stream", gpu_mem_gb=16.0), shape, MACHINE, topk_blk=0)
    plan = make_plan(choose_settings(inputs))
    more = make_plan(with_settings(plan.inputs, gpu_cached_layers=plan.inputs.settings.gpu_cached_layers + 1))
    assert not plan.kv.below
    assert more.fits
    assert sum(more.bytes_per_pass[way] - plan.bytes_per_pass[way] for way in ("weight_h2d", "kv_h2d")) > 0


@pytest.mark.parametrize(
    ("mode", "gpu_gib", "cpu_gib", "batch", "prompt"),
    [("mixed", 24.36, 41.2, 8, 16_000), ("stream", 16.42, 34.54, 64, 2_000), ("stream", 18.0, 51.77, 8, 16_000)],
)
def test_no_single_layer_more_on_the_gpu_is_better_where_part_of_kv_goes_down(
    mode: str, gpu_gib: float, cpu_gib: float, batch: int, prompt: int
) -> None:
    hardware = Hardware("cuda:0", int(gpu_gib * GIB), int(gpu_gib * GIB), GIB // 2, int(cpu_gib * GIB))
    shape = RunShape(batch, prompt, 32, batch * prompt)
    plan = make_plan(choose_settings(inputs_for(SIXTEEN_LAYERS, Settings(mode=mode), shape, hardware)))
    chosen = plan.inputs.settings.gpu_cached_layers
    assert plan.fits
    for on_gpu in (chosen - 1, chosen + 1):
        if on_gpu >= 0 and (other := make_plan(with_settings(plan.inputs, gpu_cached_layers=on_gpu))).fits:
            assert decode_ms(plan, 7_000.0, 54_000.0) <= decode_ms(other, 7_000.0, 54_000.0)


def test_kv_of_short_contexts_stays_on_the_device_where_waiting_for_it_takes_longer_than_a_layer() -> None:
    """1 row of 1 032 tokens: a layer more would spare the link 0.4 GB a pass, 8 ms, and cost it 36 of waiting."""
    shape = RunShape(1, 1024, 8, 1024)
    small = replace(H70B, ffn_dim=4096, vocab_size=32_000)
    inputs = inputs_for(small, Settings(mode="stream", gpu_mem_gb=24.0), shape, MACHINE, topk_blk=0)
    plan = make_plan(choose_settings(inputs))
    more = make_plan(with_settings(plan.inputs, gpu_cached_layers=plan.inputs.settings.gpu_cached_layers + 1))
    assert not plan.kv.below
    assert not more.fits or more.kv.layers_below > 0
    assert decode_ms(plan, 1.0, 54_000.0) < decode_ms(more, 1.0, 54_000.0)


def test_the_choice_can_be_kept_as_flags() -> None:
    inputs = inputs_for(EIGHT_LAYERS, Settings(gpu_mem_gb=16.0, cpu_mem_gb=10.0), hardware=MACHINE)
    plan = make_plan(choose_settings(inputs))
    flags = " ".join(auto_flags(plan))
    for name in ("gpu_cached_layers", "cpu_cache_layers", "group_prefetch_depth", "prefetch_distance"):
        assert f"--{name.replace('_', '-')} {getattr(plan.inputs.settings, name)}" in flags


@pytest.mark.parametrize("mode", ["full", "preload"])
def test_modes_without_layers_to_place_stay_as_they_are(mode: str) -> None:
    inputs = inputs_for(EIGHT_LAYERS, Settings(mode=mode), hardware=MACHINE)
    assert choose_settings(inputs).settings == inputs.settings
    assert auto_flags(make_plan(inputs)) == []


def test_what_auto_decides_is_named_in_one_place() -> None:
    """Results of other choices are told apart by these names."""
    inputs = inputs_for(EIGHT_LAYERS, Settings())
    plan = make_plan(replace(inputs, settings=replace(inputs.settings, embedding="cpu")))
    assert {flag.split()[0].removeprefix("--").replace("-", "_") for flag in auto_flags(plan)} == CHOSEN


WIDE = RunShape(128, 2016, 32, 128 * 2016)


def with_kv_device(mode: str, gpu_gib: int, cpu_gib: int) -> Plan:
    hardware = Hardware("cuda:0", 80 * GIB, gpu_gib * GIB, GIB // 2, cpu_gib * GIB)
    settings = Settings(mode=mode)
    inputs = inputs_for(SIXTEEN_LAYERS, settings, WIDE, hardware, topk_blk=8, kv_device="/kv")
    return make_plan(choose_settings(inputs))


def test_auto_streams_weights_over_the_link_before_it_has_kv_read_from_a_device() -> None:
    """With all 16 layers on the GPU 6.1 GB of KV would come from the device in each pass."""
    plan = with_kv_device("stream", 40, 14)
    assert plan.fits
    assert plan.bytes_per_pass["kv_read"] == 0
    assert 0 < plan.inputs.settings.gpu_cached_layers < 16


def test_auto_shares_cpu_memory_between_weights_and_kv_where_both_have_a_drive() -> None:
    """With as many layers there as fit, 13.6 GB of KV would be read in each pass, and none of the store."""
    plan = with_kv_device("mixed", 20, 20)
    moved, layer = plan.bytes_per_pass, plan.inputs.slot_bytes()
    assert plan.fits
    assert abs(moved["ssd_read"] - moved["kv_read"]) < 2 * layer
    assert max(moved["ssd_read"], moved["kv_read"]) < 9e9


@pytest.mark.parametrize("kv_device", [None, "/kv"])
def test_where_nothing_fits_auto_asks_for_as_little_cpu_memory_as_it_can(kv_device: str | None) -> None:
    settings = Settings(mode="mixed", gpu_mem_gb=4, cpu_mem_gb=2)
    plan = make_plan(
        choose_settings(inputs_for(EIGHT_LAYERS, settings, RunShape(8, 2016, 32, 8 * 2016), kv_device=kv_device))
    )
    assert not plan.fits
    assert plan.inputs.settings.cpu_cache_layers == 3  # what loads the globals; 8 were asked for beside --kv-device


def test_auto_plans_no_more_layers_in_a_tier_than_it_could_hold_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[PlanInputs] = []

    def counted(inputs: PlanInputs) -> Plan:
        tried.append(inputs)
        return make_plan(inputs)

    monkeypatch.setattr("wsm.plan.levers.make_plan", counted)
    choose_settings(inputs_for(settings=Settings(mode="mixed", gpu_mem_gb=12, cpu_mem_gb=4)))
    assert max(inputs.settings.gpu_cached_layers for inputs in tried) == 7  # of 80: 8 layers are more than 12 GiB
    assert len(tried) < 100
