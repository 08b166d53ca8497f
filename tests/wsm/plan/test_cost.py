"""What a change of flags costs or buys: in bytes always, in time where the rates are known."""

from __future__ import annotations

import re

import pytest

from tests.plans import H70B, ROOMY, TINY, inputs_for
from wsm.errors import DoesNotFit
from wsm.plan.advice import check_fits, cost_of, describe, ran_out, what_each_flag_buys
from wsm.plan.inputs import RunShape
from wsm.plan.levers import choose_settings, steps
from wsm.plan.plan import Plan, make_plan
from wsm.plan.time import Ceiling, pass_times
from wsm.settings import Settings

LAYER_MB = 1711.3088
RATES = {
    name: Ceiling(rate, rate, "", 1.0, "")
    for name, rate in {"ssd": 7000.0, "h2d": 25000.0, "h2d_with_ssd": 25000.0, "hbm": 1e6, "matmul": 150.0}.items()
}


def plan_of(batch: int = 1, **settings: object) -> Plan:
    return make_plan(inputs_for(H70B, Settings(**settings), RunShape(batch, 2016, 32, batch * 2016)))  # type: ignore[arg-type]


# -- the cost of an advice


def test_two_layers_fewer_on_the_gpu_cost_two_reads_of_the_drive() -> None:
    times = pass_times(plan_of(gpu_cached_layers=4), plan_of(gpu_cached_layers=2), RATES)
    assert times is not None
    assert times.change_ms == pytest.approx(2 * LAYER_MB / 7000 * 1e3, rel=1e-3)
    assert not times.at_least
    said = cost_of(plan_of(gpu_cached_layers=4), plan_of(gpu_cached_layers=2), RATES)
    assert "its predicted cost: a decode pass of 10756.80 ms instead of 10267.85 ms (+4.8 %)" in said
    assert "+3422.6 MB from the SSD and +3422.6 MB over the link" in said


def test_without_rates_the_cost_is_told_in_bytes_and_the_time_called_unknown() -> None:
    said = cost_of(plan_of(gpu_cached_layers=4), plan_of(gpu_cached_layers=2), {})
    assert "not known in time yet" in said
    assert " ms" not in said
    assert "+3422.6 MB from the SSD" in said


def test_a_rate_that_only_one_of_both_needs_is_not_passed_over() -> None:
    """From stream to mixed the drive comes in: with the link's rate alone mixed would look free."""
    link_alone = {name: ceiling for name, ceiling in RATES.items() if name != "ssd"}
    assert pass_times(plan_of(mode="stream"), plan_of(mode="mixed"), link_alone) is None


def test_a_smaller_batch_is_told_in_time_a_token() -> None:
    said = cost_of(plan_of(batch=32), plan_of(batch=16), RATES)
    assert "for 16 rows instead of 32" in said
    assert f"{10267.85 / 16:.2f} ms a token instead of {10267.85 / 32:.2f} ms" in said


def test_where_arithmetic_decides_the_cost_is_a_bound() -> None:
    slow = {**RATES, "matmul": Ceiling(0.01, 0.01, "", 1.0, "")}
    times = pass_times(plan_of(), plan_of(gpu_cached_layers=2), slow)
    assert times is not None
    assert times.at_least
    assert "a decode pass of at least" in cost_of(plan_of(), plan_of(gpu_cached_layers=2), slow)


def test_a_run_that_does_not_fit_tells_the_cost_on_the_line_after_the_advice() -> None:
    plan = plan_of(gpu_mem_gb=15.0)
    for ceilings, said in ((RATES, "its predicted cost: a decode pass of"), ({}, "its cost is not known in time yet")):
        with pytest.raises(DoesNotFit) as raised:
            check_fits(plan, ceilings)
        first, second, *budget = str(raised.value).splitlines()
        assert first.endswith("it fits with --embedding cpu")
        assert second.startswith(said)
        assert budget[0].startswith("GPU memory")


def test_a_device_that_runs_out_all_the_same_is_advised_to_take_less_than_it_took() -> None:
    plan = plan_of()
    assert plan.fits
    first, cost, *budget = str(ran_out(plan, "CUDA out of memory", RATES)).splitlines()
    assert "CUDA out of memory" in first
    assert "it fits with --embedding cpu" in first
    assert "instead of 10267.85 ms" in cost
    assert any(line.strip().startswith("weights resident, 4 layers") for line in budget)


def test_a_device_that_runs_out_is_advised_what_frees_memory_within_the_same_budget() -> None:
    plan = plan_of(mode="stream", gpu_mem_gb=17.0)
    assert not plan.kv.below
    first = str(ran_out(plan, "CUDA out of memory", {})).splitlines()[0]
    assert first.endswith("it fits with --embedding cpu")
    after = plan_of(mode="stream", gpu_mem_gb=17.0, embedding="cpu")
    assert after.gpu_bytes <= 0.95 * plan.gpu_bytes


def test_where_kv_fills_the_budget_a_smaller_budget_is_advised() -> None:
    plan = plan_of(batch=32, gpu_mem_gb=24.0)
    assert plan.fits
    assert plan.kv.below
    first = str(ran_out(plan, "CUDA out of memory", {})).splitlines()[0]
    advised = first.split("it fits with --gpu-mem-gb ")[1]
    after = plan_of(batch=32, gpu_mem_gb=float(advised))
    assert after.fits
    assert after.gpu_bytes <= 0.95 * plan.gpu_bytes


# -- what each flag would buy


def bought(plan: Plan) -> dict[str, float]:
    """ms a pass by flag."""
    return {step.flag: step.times.change_ms for step in steps(plan, RATES) if step.times is not None}


def test_one_layer_more_on_the_gpu_or_in_cpu_memory_saves_its_read() -> None:
    found = bought(plan_of())
    layer_ms = LAYER_MB / 7000 * 1e3
    assert found["--gpu-cached-layers 5"] == pytest.approx(-layer_ms, rel=1e-3)
    assert found["--cpu-cache-layers 41"] == pytest.approx(-layer_ms, rel=1e-3)
    assert found["--prefetch-distance 5"] == pytest.approx(-layer_ms, rel=1e-3)
    assert found["--mode stream"] == pytest.approx(76 * LAYER_MB / 25 - 10267.85, rel=1e-3)
    assert found["--batch-size 2"] == pytest.approx(0)


def test_memory_that_a_step_takes_or_frees_is_told_and_whether_it_fits() -> None:
    plan = make_plan(inputs_for(H70B, Settings(gpu_mem_gb=17), hardware=ROOMY))
    by_flag = {step.flag: step for step in steps(plan, RATES)}
    assert not by_flag["--gpu-cached-layers 5"].after.fits
    assert by_flag["--embedding cpu"].after.gpu_bytes < plan.gpu_bytes - 2_000_000_000
    assert by_flag["--group-prefetch-depth 2"].after.gpu_bytes < plan.gpu_bytes
    text = what_each_flag_buys(plan, RATES)
    line = next(line for line in text.splitlines() if "--gpu-cached-layers 5" in line)
    assert line.endswith("  does not fit; 80 parts of KV more in CPU memory")


def test_the_link_s_bytes_of_a_step_and_of_an_advice_have_those_of_kv() -> None:
    """32 rows of 2 048 tokens: a layer on the GPU drives out more bytes of KV than it spares."""
    settings = Settings(mode="stream", gpu_mem_gb=36.0, gpu_cached_layers=4)
    plan = make_plan(inputs_for(H70B, settings, RunShape(32, 2016, 32, 32 * 2016)))
    step = next(step for step in steps(plan, RATES) if step.flag == "--gpu-cached-layers 5")
    more = step.after.kv.layers_below - plan.kv.layers_below
    kv_bytes = step.after.bytes_per_pass["kv_h2d"] - plan.bytes_per_pass["kv_h2d"]
    assert (more > 0, kv_bytes > 0) == (True, True)
    moved = f"{kv_bytes / 1e6 - LAYER_MB:+.1f}"
    line = next(line for line in what_each_flag_buys(plan, RATES).splitlines() if step.flag in line)
    assert line.split()[5] == moved
    assert re.search(r"  \d+ parts of KV more in CPU memory$", line)
    assert f"{moved} MB over the link" in cost_of(plan, step.after, RATES)


def test_a_step_down_to_one_slot_says_what_its_prediction_does_not_count() -> None:
    said = "with one slot the drive waits for copies, which is not counted: --auto keeps 2"
    for now, told in ((3, False), (2, True)):
        text = what_each_flag_buys(plan_of(prefetch_distance=now), RATES)
        line = next(line for line in text.splitlines() if f"--prefetch-distance {now - 1}" in line)
        assert line.endswith(f"  {said}") == told


def test_a_step_beside_auto_says_what_auto_then_chooses() -> None:
    """Twice the rows have twice the KV, for which layers leave the GPU."""
    inputs = inputs_for(H70B, Settings(mode="stream", gpu_mem_gb=40.0), RunShape(16, 2016, 32, 16 * 2016))
    plan = make_plan(choose_settings(inputs))
    [batch] = [step for step in steps(plan, RATES) if step.flag == "--batch-size 32"]
    chosen = batch.after.inputs.settings.gpu_cached_layers
    assert chosen < plan.inputs.settings.gpu_cached_layers
    assert batch.beside[-1] == f"--auto then chooses --gpu-cached-layers {chosen}"
    [resident] = [step for step in steps(plan, RATES) if step.flag.startswith("--gpu-cached-layers")]
    assert not any("--auto" in said for said in resident.beside)


def test_a_batch_makes_each_token_cheaper() -> None:
    line = next(line for line in what_each_flag_buys(plan_of(), RATES).splitlines() if "--batch-size 2" in line)
    assert f"{-10267.85 / 2:+.2f}" in line


def test_without_rates_the_steps_are_told_in_bytes() -> None:
    text = what_each_flag_buys(plan_of(), {})
    assert text.splitlines()[0] == (
        "what each flag would buy, not known in time yet: rates of the drive and the link are missing, which a run of "
        "Llama-3.1-70B with --mode mixed measures here, and keeps where they vary by at most 25 %"
    )
    line = next(line for line in text.splitlines() if "--gpu-cached-layers 5" in line)
    assert line.split()[2:6] == ["-", "-", "-1711.3", "-1711.3"]


@pytest.mark.parametrize(("mode", "flags"), [("full", {"--batch-size"}), ("preload", {"--batch-size", "--embedding"})])
def test_a_mode_offers_only_flags_that_change_something_in_it(mode: str, flags: set[str]) -> None:
    assert {step.flag.split()[0] for step in steps(plan_of(mode=mode), RATES)} == flags


def test_a_step_that_changes_nothing_is_left_out() -> None:
    """One layer of CPU memory is the pool alone: a shorter read-ahead than the clipped one is the same plan."""
    plan = make_plan(inputs_for(TINY, Settings(cpu_cache_layers=1, prefetch_distance=2)))
    assert not [step for step in steps(plan, RATES) if step.flag.startswith("--prefetch-distance")]


# -- how sure it is


def varied(spread_pct: float) -> dict[str, Ceiling]:
    """The drive's rate with this spread around its median."""
    best = 7000.0 * (1 + spread_pct / 200)
    return {**RATES, "ssd": Ceiling(best, 7000.0, "", spread_pct, "")}


def test_the_spread_of_its_rates_stands_beside_every_prediction() -> None:
    before, after = plan_of(), plan_of(gpu_cached_layers=2)
    for said in (
        describe(before, varied(8.0)),
        cost_of(before, after, varied(8.0)),
        what_each_flag_buys(before, varied(8.0)),
    ):
        assert "(of rates that varied by 8 %)" in said
        assert "10267.85 ms" in said


def test_of_a_rate_that_varied_by_more_than_a_quarter_an_interval_is_predicted() -> None:
    """A median of 10 267.85 ms at -20 and +20 % of the rate."""
    said = describe(plan_of(), varied(40.0))
    assert "decode: predicted 8556.54 to 12834.82 ms a pass, 0.07791 to 0.1169 tokens a second" in said
    assert "decode: at least 8556.54 to 12834.82 ms a pass" in said
    assert "of rates that varied by 40 %" in said
    assert "10267.85" not in said
    cost = cost_of(plan_of(), plan_of(gpu_cached_layers=2), varied(40.0))
    assert "instead of 8556.54 to 12834.82 ms (+4.8 %)" in cost


def test_one_slot_a_kind_is_predicted_to_be_slower() -> None:
    one = plan_of(mode="stream", group_prefetch_depth=1, aggressive_gpu_prefetch=0)
    times = pass_times(plan_of(mode="stream"), one, RATES)
    assert one.placement.gpu_slots == 1
    assert times is not None
    assert times.after.ms == pytest.approx(1.07 * times.before.ms)
