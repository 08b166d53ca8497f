"""The plan takes what the design says, and its floor is the slowest tier's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llama.checkpoint import synthetic_checkpoint
from llama.config import PRESETS
from llama.kv.cache import KVCache
from tests.plans import TINY, inputs_for
from wsm.plan.advice import describe
from wsm.plan.hardware import GIB, Hardware
from wsm.plan.inputs import RunShape
from wsm.plan.memory import MemoryKind
from wsm.plan.plan import make_plan
from wsm.plan.time import Ceiling, predicted_floor
from wsm.settings import Settings

# -- the 70B model at the guide's flags


def test_the_guides_70b_configuration_takes_what_the_design_says() -> None:
    plan = make_plan(inputs_for())
    assert len(plan.placement.residency.gpu) == 4
    assert plan.placement.cpu_layers == 40
    assert plan.placement.ssd_layers_a_pass == 42
    assert (plan.placement.gpu_slots, plan.placement.cpu_slots, plan.inputs.kv_tokens) == (3, 6, 2048)
    assert sum(line.nbytes for line in plan.gpu_lines[:4]) / GIB == pytest.approx(15.7, abs=0.05)
    assert plan.page_locked_bytes == 40 * plan.inputs.slot_bytes()
    assert plan.bytes_per_pass["ssd_read"] == 42 * plan.inputs.slot_bytes()
    assert plan.bytes_per_pass["weight_h2d"] == 76 * plan.inputs.slot_bytes()
    assert plan.fits


def test_a_layer_of_70b_has_the_bytes_of_the_design() -> None:
    inputs = inputs_for()
    assert inputs.kind_bytes("attn") / 1e6 == pytest.approx(302.0, abs=0.1)
    assert inputs.kind_bytes("ffn") / 1e6 == pytest.approx(1409.3, abs=0.1)
    assert inputs.kv_token_bytes == 320 * 1024


# -- memory


@given(batch=st.integers(1, 9), prompt=st.integers(1, 600), new=st.integers(1, 300))
def test_kv_is_what_the_cache_takes(batch: int, prompt: int, new: int) -> None:
    plan = make_plan(inputs_for(TINY, shape=RunShape(batch, prompt, new, batch * prompt)))
    line = next(line for line in plan.gpu_lines if line.kind == MemoryKind.KV)
    assert line.nbytes == KVCache(TINY, batch, prompt + new, torch.device("meta"), torch.bfloat16).nbytes


def test_on_the_cpu_both_tiers_share_one_budget() -> None:
    plan = make_plan(inputs_for(TINY, hardware=Hardware("cpu", None, None, 0, GIB), chunk_tokens=256))
    assert plan.gpu_budget_bytes is None
    assert plan.cpu_bytes == sum(line.nbytes for line in (*plan.gpu_lines, *plan.cpu_lines))
    assert not any(line.kind == MemoryKind.CONTEXT for line in plan.gpu_lines)
    short = make_plan(replace(plan.inputs, hardware=Hardware("cpu", None, None, 0, plan.cpu_bytes - 1)))
    assert not short.fits_cpu
    assert short.cpu_bytes - short.cpu_budget_bytes == 1


def test_budgets_are_what_the_flags_say_but_never_more_than_is_free() -> None:
    hardware = Hardware("cuda:0", 80 * GIB, 70 * GIB, GIB, 100 * GIB)
    plan = make_plan(inputs_for(settings=Settings(gpu_mem_gb=24, cpu_mem_gb=50), hardware=hardware))
    assert (plan.gpu_budget_bytes, plan.cpu_budget_bytes) == (24 * GIB, 50 * GIB)
    plan = make_plan(inputs_for(settings=Settings(gpu_mem_gb=75, cpu_mem_gb=200), hardware=hardware))
    assert (plan.gpu_budget_bytes, plan.cpu_budget_bytes) == (70 * GIB, 100 * GIB)
    assert "--gpu-mem-gb 75 clipped to 70.00, what is free" in plan.notes
    plan = make_plan(inputs_for(hardware=hardware))
    assert (plan.gpu_budget_bytes, plan.cpu_budget_bytes) == (70 * GIB, 100 * GIB)


@given(gib=st.floats(0.5, 200), batch=st.integers(1, 64), prompt=st.integers(1, 4096))
@hypothesis_settings(deadline=None, max_examples=30)
def test_chunks_and_waves_never_depend_on_the_mode(gib: float, batch: int, prompt: int) -> None:
    hardware = Hardware("cuda:0", 200 * GIB, int(gib * GIB), 0, 512 * GIB)
    shape = RunShape(batch, prompt, 32, batch * prompt)
    plans = [
        make_plan(inputs_for(PRESETS["Llama-3.1-8B"], Settings(mode=mode), shape, hardware))
        for mode in ("mixed", "stream", "preload", "full")
    ]
    assert len({(plan.chunk_tokens, plan.wave_rows) for plan in plans}) == 1
    assert plans[0].chunk_tokens in {2**power for power in range(4, 12)}
    assert 1 <= plans[0].wave_rows <= batch


def test_a_small_budget_makes_small_chunks_and_flags_beat_both() -> None:
    shape = RunShape(8, 512, 32, 8 * 512)
    small = Hardware("cuda:0", GIB, GIB, 0, GIB)
    plan = make_plan(inputs_for(shape=shape, hardware=small))
    assert plan.chunk_tokens < 2048
    assert plan.wave_rows == 8
    plan = make_plan(inputs_for(shape=shape, hardware=small, chunk_tokens=100, micro_batch=3))
    assert (plan.chunk_tokens, plan.kv.layout.stretch_rows, plan.wave_rows) == (100, 3, 8)


def test_a_little_more_or_less_free_memory_chooses_the_same_portions() -> None:
    shape = RunShape(512, 2016, 32, 512 * 2016)
    chosen = {
        (plan.chunk_tokens, plan.wave_rows)
        for free in (20.1, 22.9, 23.7, 30.0)
        if (plan := make_plan(inputs_for(shape=shape, hardware=Hardware("cpu", None, None, 0, int(free * GIB)))))
    }
    assert len(chosen) == 1


def test_synthetic_layouts_are_those_of_the_checkpoint() -> None:
    checkpoint = synthetic_checkpoint("Llama-3.2-1B:layers=2", seed=0, dtype=torch.bfloat16)
    inputs = inputs_for(checkpoint.config, Settings(mode="full"))
    weights = sum(layout.nbytes for layout in inputs.layouts.values())
    plan = make_plan(inputs)
    assert sum(line.nbytes for line in plan.gpu_lines[:3]) == weights
    assert plan.bytes_per_pass == {
        "ssd_read": 0,
        "weight_h2d": 0,
        "hbm_read": pytest.approx(weights, rel=1e-4),
        "kv_h2d": 0,
        "kv_read": 0,
    }


# -- the floor

CEILINGS = {"ssd": 7000.0, "h2d": 25000.0, "hbm": 1_000_000.0, "matmul": 150.0}


def test_the_floor_is_the_slowest_tier() -> None:
    plan = make_plan(inputs_for())
    floors = predicted_floor(plan, CEILINGS)
    moved = plan.bytes_per_pass
    assert floors["decode"].bound_by == "ssd"
    assert floors["decode"].ms == pytest.approx(moved["ssd_read"] / 7e9 * 1e3)
    assert floors["decode"].parts_ms["h2d"] == pytest.approx(moved["weight_h2d"] / 25e9 * 1e3)
    assert (floors["prefill"].passes, floors["decode"].passes) == (1, 31)
    stream = predicted_floor(make_plan(inputs_for(settings=Settings(mode="stream"))), CEILINGS)
    assert stream["decode"].bound_by == "h2d"
    full = predicted_floor(make_plan(inputs_for(settings=Settings(mode="full"))), CEILINGS)
    assert full["decode"].bound_by == "hbm"
    assert full["prefill"].bound_by == "compute"
    # 70.6e9 weights, 2 operations each for 2 016 tokens, on 150 TFLOPs; attention adds a few per cent.
    assert full["prefill"].ms == pytest.approx(2 * 69.5e9 * 2016 / 150e12 * 1e3, rel=0.05)


def test_an_unknown_ceiling_bounds_nothing() -> None:
    plan = make_plan(inputs_for())
    assert predicted_floor(plan, {}) == {}
    assert predicted_floor(plan, {"h2d": 25000.0})["decode"].bound_by == "h2d"


def test_kept_groups_move_nothing() -> None:
    settings = Settings(mode="stream", gpu_cached_layers=6, evict_finished=False)
    assert make_plan(inputs_for(TINY, settings)).bytes_per_pass["weight_h2d"] == 0


def test_the_plan_in_words_has_tiers_pools_budgets_and_the_floor() -> None:
    text = describe(
        make_plan(inputs_for()), {name: Ceiling(rate, rate, "", 1.0, "") for name, rate in CEILINGS.items()}
    )
    for part in (
        "Llama-3.1-70B, mode mixed: 80 layers of 1711.3 MB",
        "GPU  4 layers, 6.375 GiB: 10, 30, 50, 70",
        "CPU  34 layers",
        "SSD  42 layers",
        "3 GPU slots and 6 CPU slots a kind",
        "3 staged before the first pass",
        "allocator slack",
        "71875.0 MB from the SSD",
        "decode: at least 10267.85 ms a pass, bound by the SSD",
        "what each flag would buy: a decode pass is predicted to take 10267.85 ms now",
    ):
        assert part in text
    assert "at least" not in describe(make_plan(inputs_for()))
    assert "note:" not in text  # nothing was asked for that is not so
