"""What is advised beside ``--auto``, of shapes without files, and where a mend packs the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llama.config import ModelConfig
from tests.plans import H70B, ROOMY, TINY, inputs_for
from tests.wsm.plan.test_advice import follow, machines, shapes, small_models
from tests.wsm.plan.test_cost import RATES
from wsm.errors import DoesNotFit
from wsm.plan.advice import check_fits, ran_out
from wsm.plan.hardware import GIB, Hardware
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.levers import as_asked, changed_flags, choose_settings, steps
from wsm.plan.plan import Plan, make_plan
from wsm.plan.search import most_layers, smallest_change
from wsm.plan.time import Ceiling, predicted_pass_ms
from wsm.settings import Settings

EIGHT_LAYERS = replace(H70B, n_layers=8)


def auto(batch: int = 1, tokens: int = 217, **settings: Any) -> Plan:
    inputs = inputs_for(EIGHT_LAYERS, Settings(**settings), RunShape(batch, tokens, 32, batch * tokens))
    return make_plan(choose_settings(inputs))


def refused(plan: Plan) -> list[str]:
    with pytest.raises(DoesNotFit) as raised:
        check_fits(plan, RATES, told=True)
    return str(raised.value).splitlines()


def test_the_cost_told_beside_auto_is_that_of_the_command_advised() -> None:
    plan, mended = (auto(mode=mode, gpu_mem_gb=12, cpu_mem_gb=8) for mode in ("stream", "mixed"))
    first, cost = refused(plan)
    assert first.endswith("it fits with --mode mixed beside --auto")
    before, after = (predicted_pass_ms(each, RATES)["decode"] for each in (plan, mended))
    assert before is not None
    assert after is not None
    assert f"a decode pass of {after.shown()} instead of {before.shown()}" in cost
    assert f"+{mended.bytes_per_pass['ssd_read'] / 1e6:.1f} MB from the SSD" in cost
    assert mended.bytes_per_pass["ssd_read"] < 0.7 * plan.bytes_per_pass["weight_h2d"]


@given(config=small_models, mode=st.sampled_from(["mixed", "stream", "preload"]), shape=shapes, hardware=machines)
@hypothesis_settings(max_examples=30, deadline=None)
def test_following_the_advice_beside_auto_fits_and_what_fits_by_hand_is_found(
    config: ModelConfig, mode: str, shape: RunShape, hardware: Hardware
) -> None:
    asked = inputs_for(config, Settings(mode=mode), shape, hardware)
    chosen = choose_settings(asked)
    assert as_asked(chosen) == asked
    if make_plan(chosen).fits:
        return
    fitting = smallest_change(chosen)
    if fitting is None:
        assert smallest_change(asked) is None
        return
    if fitting.asked is None:
        followed = follow(asked, changed_flags(asked, fitting))
    else:
        flags = changed_flags(chosen, fitting)
        assert flags
        assert {flag.split()[0] for flag in flags} <= {"--mode", "--batch-size"}
        followed = choose_settings(follow(asked, flags))
    assert followed.settings == fitting.settings
    assert make_plan(followed).fits


def test_where_auto_finds_nothing_it_is_given_up_and_named() -> None:
    """It keeps two slots a kind; one is less."""
    one_slot = Settings(mode="mixed", gpu_cached_layers=0, cpu_cache_layers=1, group_prefetch_depth=1, embedding="cpu")
    least = make_plan(inputs_for(EIGHT_LAYERS, replace(one_slot, aggressive_gpu_prefetch=1), RunShape(1, 217, 32, 217)))
    plan = auto(mode="mixed", gpu_mem_gb=least.gpu_bytes / GIB + 0.1, aggressive_gpu_prefetch=1)
    first = refused(plan)[0]
    assert "it fits without --auto, with --embedding cpu " in first
    assert "--group-prefetch-depth 1" in first
    first = refused(auto(mode="mixed", gpu_mem_gb=1.0))[0]
    assert "no change of flags suffices: even without --auto --embedding cpu --gpu-cached-layers 0 " in first


def test_fewer_rows_are_advised_beside_auto_where_they_keep_the_mode() -> None:
    plans = (auto(64, 2016, mode="stream", gpu_mem_gb=12, cpu_mem_gb=quarters / 4) for quarters in range(60, 0, -1))
    plan = next(plan for plan in plans if not plan.fits)
    fitting = smallest_change(plan.inputs, {**RATES, "ssd": Ceiling(100.0, 100.0, "MBps", 0.0, "")})
    assert fitting is not None
    [flag] = changed_flags(plan.inputs, fitting)
    assert flag.startswith("--batch-size ")


def test_a_device_that_runs_out_is_advised_a_budget_which_auto_then_fills() -> None:
    plan = auto(mode="stream", gpu_mem_gb=12)
    first, cost, *_ = str(ran_out(plan, "CUDA out of memory", RATES)).splitlines()
    assert first.endswith(" beside --auto")
    budget = float(first.split("it fits with --gpu-mem-gb ")[1].split()[0])
    after = auto(mode="stream", gpu_mem_gb=budget)
    assert after.gpu_bytes <= 0.95 * plan.gpu_bytes
    predicted = predicted_pass_ms(after, RATES)["decode"]
    assert predicted is not None
    assert f"a decode pass of {predicted.shown()} instead" in cost


def test_a_step_beside_auto_is_what_auto_then_chooses() -> None:
    plan = auto(mode="mixed", gpu_mem_gb=12, cpu_mem_gb=8)
    by_flag = {step.flag: step.after for step in steps(plan, RATES)}
    for flag, after in (
        ("--mode stream", auto(mode="stream", gpu_mem_gb=12, cpu_mem_gb=8)),
        ("--batch-size 2", auto(2, mode="mixed", gpu_mem_gb=12, cpu_mem_gb=8)),
    ):
        assert by_flag[flag].inputs.settings == after.inputs.settings
        assert by_flag[flag].gpu_bytes == after.gpu_bytes


# -- shapes, and what is packed


def of_shape(inputs: PlanInputs) -> PlanInputs:
    return replace(inputs, synthetic="Tiny", packed_into="/there")


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("mode", ["mixed", "stream", "preload"])
def test_the_most_layers_that_fit_are_offered_for_a_shape(mode: str, chosen: bool) -> None:
    config = replace(TINY, n_layers=12, dim=512, ffn_dim=8192)
    whole = inputs_for(config, Settings(mode=mode), hardware=ROOMY)
    needed = make_plan(whole)
    hardware = Hardware("cuda:0", 80 * GIB, needed.gpu_bytes * 3 // 4, 0, max(needed.cpu_bytes * 3 // 4, 1 << 20))
    inputs = of_shape(replace(whole, hardware=hardware))

    def fits(layers: int) -> bool:
        fewer = inputs_for(replace(config, n_layers=layers), Settings(mode=mode), hardware=hardware)
        return make_plan(choose_settings(fewer) if chosen else fewer).fits

    plan = make_plan(choose_settings(inputs) if chosen else inputs)
    most = max(layers for layers in range(13) if layers == 0 or fits(layers))
    assert most_layers(plan.inputs) == most
    if not plan.fits and most:
        offered = f"or fewer layers, with all other flags as they are: --synthetic Tiny:layers={most}"
        assert offered in refused(plan)
        assert not [line for line in refused(make_plan(replace(plan.inputs, synthetic=None))) if "layers=" in line]


def test_a_mend_that_packs_the_model_says_how_much_and_where() -> None:
    plan = auto(mode="stream", gpu_mem_gb=12, cpu_mem_gb=8)
    packed = make_plan(replace(plan.inputs, packed_into="/there"))
    nbytes = sum(layout.nbytes for layout in plan.inputs.layouts.values())
    said = f"--mode mixed reads a packed file: the first run writes {nbytes / 1e9:.2f} GB into /there (--cache-dir "
    assert [line for line in refused(packed) if line.startswith(said)]
    assert not [line for line in refused(plan) if "packed" in line]
    reading = make_plan(replace(inputs_for(EIGHT_LAYERS, Settings(cpu_mem_gb=4)), packed_into="/there"))
    assert not [line for line in refused(reading) if "packed" in line]
