"""Weight formats in a plan: bytes at rest, scratch, how often matrices are decoded, and the rate of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.plans import H70B, ROOMY, TINY, inputs_for
from wsm.formats import registry
from wsm.layout.groups import GroupId, decoded_layout
from wsm.plan.by_format import by_format, shown_by_format
from wsm.plan.decoding import decoding_extra_bytes
from wsm.plan.hardware import GIB, MIB
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.memory import MemoryKind
from wsm.plan.plan import Plan, make_plan
from wsm.plan.time import Ceiling, pass_work, predicted_floor, predicted_pass_ms
from wsm.settings import Settings
from wsm.store.layout import planned_layouts

BF16 = torch.bfloat16
LAYER_BYTES = 1_711_308_800
MATRIX_BYTES = 2 * 8192 * 28672
"""A layer of the 70B shape in bf16, norms and all; and its largest matrix."""


def inputs_in(name: str | None, config: Any = H70B, **more: Any) -> PlanInputs:
    found = inputs_for(config, **more)
    weight_format = registry.get(name) if name is not None else None
    return replace(found, layouts=planned_layouts(config, BF16, weight_format, most=False))


def nbytes_of(plan: Plan, kind: MemoryKind) -> int:
    return sum(line.nbytes for line in plan.gpu_lines if line.kind == kind)


def ceiling(value: float, unit: str = "MBps") -> Ceiling:
    return Ceiling(value, value, unit, 1.0, "")


@pytest.mark.parametrize(("name", "share"), [("exact", 0.75), ("fp8", 0.5), ("int8", 0.508), ("int4", 0.262)])
def test_a_pass_moves_the_bytes_at_rest(name: str, share: float) -> None:
    settings = Settings(mode="stream", gpu_cached_layers=4)
    plain, plan = make_plan(inputs_in(None, settings=settings)), make_plan(inputs_in(name, settings=settings))
    for way in ("weight_h2d", "hbm_read"):
        assert plan.bytes_per_pass[way] < plain.bytes_per_pass[way]
    assert plan.bytes_per_pass["weight_h2d"] / plain.bytes_per_pass["weight_h2d"] == pytest.approx(share, abs=0.002)
    assert plan.bytes_per_pass["weight_h2d"] == plan.inputs.layers_bytes(plan.placement.residency.cpu)
    assert plan.page_locked_bytes < plain.page_locked_bytes


def test_scratch_holds_the_largest_product_and_with_many_chunks_a_whole_group() -> None:
    settings = Settings(mode="stream")
    few = make_plan(inputs_in("int4", settings=settings, shape=RunShape(1, 2016, 32, 2016)))
    assert few.chunks <= 4
    assert 0 <= nbytes_of(few, MemoryKind.SCRATCH) - MATRIX_BYTES <= 4096
    many = make_plan(inputs_in("int4", settings=settings, shape=RunShape(8, 2016, 32, 8 * 2016)))
    assert many.chunks > 4
    assert 0 <= nbytes_of(many, MemoryKind.SCRATCH) - 3 * MATRIX_BYTES <= 4096
    matrices = 80 * (LAYER_BYTES - 2 * 2 * 8192)
    # Of an attn group all matrices fit into the scratch of one large product; an ffn group's do not.
    attn = 80 * 2 * 8192 * (8192 + 1024 + 1024 + 8192)
    assert few.decoded_bytes == {"prefill": attn + few.chunks * (matrices - attn), "decode": 0}
    assert many.decoded_bytes["prefill"] == matrices


@pytest.mark.parametrize(
    ("rows", "on_gpu", "decoded"), [(1, True, False), (16, True, False), (17, True, True), (1, False, True)]
)
def test_few_rows_on_a_gpu_that_is_not_here_take_int4_as_it_lies(rows: int, on_gpu: bool, decoded: bool) -> None:
    """Whatever Triton does where the plan is made: an H100 was measured so, with 0.44 GiB less scratch, too."""
    hardware = ROOMY if on_gpu else replace(ROOMY, device="cpu", gpu_total_bytes=None, gpu_available_bytes=None)
    shape = RunShape(rows, 128, 8, rows * 128)
    plan = make_plan(inputs_in("int4", settings=Settings(mode="stream"), shape=shape, hardware=hardware))
    assert (plan.decoded_bytes["decode"] > 0) == decoded
    assert decoding_extra_bytes(plan.inputs) == 0


def test_without_room_for_a_whole_group_it_is_decoded_once_a_chunk() -> None:
    settings, shape = Settings(mode="stream", gpu_mem_gb=64), RunShape(8, 2016, 32, 8 * 2016)
    roomy = make_plan(inputs_in("int4", settings=settings, shape=shape))
    tight = replace(settings, gpu_mem_gb=(roomy.gpu_bytes - MIB) / GIB)
    plan = make_plan(inputs_in("int4", settings=tight, shape=shape, chunk_tokens=roomy.chunk_tokens))
    assert plan.decoding.scratch_bytes < roomy.decoding.scratch_bytes
    assert plan.decoded_bytes["prefill"] > roomy.decoded_bytes["prefill"]
    assert plan.kv.gpu == roomy.kv.gpu


@pytest.mark.parametrize("mode", ["full", "preload"])
def test_exact_is_decoded_as_it_is_loaded_where_that_fits(mode: str) -> None:
    plain, exact = (make_plan(inputs_in(name, settings=Settings(mode=mode))) for name in (None, "exact"))
    assert exact.decoding.at_load
    assert exact.placement.decoded
    assert exact.decoded_bytes == {"prefill": 0, "decode": 0}
    assert nbytes_of(exact, MemoryKind.WEIGHTS) == nbytes_of(plain, MemoryKind.WEIGHTS)
    assert exact.bytes_per_pass["hbm_read"] == plain.bytes_per_pass["hbm_read"]
    tight = Settings(mode=mode, gpu_mem_gb=120)
    assert not make_plan(inputs_in(None, settings=tight)).fits
    plan = make_plan(inputs_in("exact", settings=tight))
    assert plan.fits
    assert not plan.decoding.at_load
    assert not make_plan(inputs_in("int4", settings=Settings(mode=mode))).decoding.at_load


def test_chunks_and_waves_never_depend_on_the_format() -> None:
    for shape in (RunShape(1, 2016, 32, 2016), RunShape(32, 2016, 32, 32 * 2016)):
        for mode in ("stream", "preload"):
            plans = [
                make_plan(inputs_in(n, settings=Settings(mode=mode), shape=shape)) for n in (None, *registry.NAMES)
            ]
            assert len({(plan.chunk_tokens, plan.wave_rows, plan.kv.layout.stretch_rows) for plan in plans}) == 1


def test_images_of_their_own_size_count_each_by_itself_and_slots_by_the_largest() -> None:
    inputs = inputs_in("int4", TINY, settings=Settings(mode="mixed", gpu_cached_layers=2, cpu_cache_layers=4))
    larger = GroupId(5, "ffn")
    grown = replace(inputs.layouts[larger], nbytes=inputs.layouts[larger].nbytes + 8192)
    uneven = make_plan(replace(inputs, layouts={**inputs.layouts, larger: grown}))
    even = make_plan(inputs)
    assert uneven.inputs.slot_bytes() == even.inputs.slot_bytes() + 8192
    assert uneven.bytes_per_pass["hbm_read"] - even.bytes_per_pass["hbm_read"] == 8192
    in_gpu = larger.layer in uneven.placement.residency.gpu
    assert nbytes_of(uneven, MemoryKind.WEIGHTS) - nbytes_of(even, MemoryKind.WEIGHTS) == 8192 * in_gpu
    slots = uneven.placement.gpu_slots
    assert nbytes_of(uneven, MemoryKind.POOLS) - nbytes_of(even, MemoryKind.POOLS) == 8192 * slots


def test_decoding_is_a_ceiling_of_its_own() -> None:
    plan = make_plan(inputs_in("fp8", settings=Settings(mode="stream", gpu_cached_layers=4)))
    rates = {"h2d": ceiling(50e3), "hbm": ceiling(3e6), "matmul": ceiling(700.0, "TFLOPs")}
    assert pass_work(plan)["decode"].decoded_bytes == plan.decoded_bytes["decode"] > 0
    slow, fast = {**rates, "weight_decode": ceiling(50e3)}, {**rates, "weight_decode": ceiling(2e6)}
    floor = predicted_floor(plan, {name: rate.value for name, rate in slow.items()})["decode"]
    assert floor.bound_by == "weight_decode"
    assert floor.ms == pytest.approx(plan.decoded_bytes["decode"] / 50e6)
    assert predicted_floor(plan, {name: rate.value for name, rate in fast.items()})["decode"].bound_by == "h2d"
    assert predicted_pass_ms(plan, slow)["decode"] is None  # the link waits: nothing that was measured says how long
    estimate = predicted_pass_ms(plan, fast)["decode"]
    assert estimate is not None
    assert estimate.ms == pytest.approx(plan.bytes_per_pass["weight_h2d"] / 50e6, rel=0.01)


def test_the_table_of_formats_counts_decoding_only_where_it_was_measured() -> None:
    plans = {name: make_plan(inputs_in(name, settings=Settings(mode="stream"))) for name in ("exact", "fp8")}
    rates = {"h2d": ceiling(50e3), "hbm": ceiling(3e6), "weight_decode": ceiling(50e3)}
    exact, fp8 = by_format(plans, rates, "fp8")
    assert fp8.at_least
    assert not exact.at_least
    assert exact.decode_pass is not None
    assert exact.tokens_per_s == pytest.approx(1e3 / exact.decode_pass.ms)
    rows = shown_by_format([exact, fp8]).splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["exact", "fp8"]
    assert "at least" in rows[3]


def test_rates_that_vary_give_the_table_of_formats_an_interval() -> None:
    plans = {"int4": make_plan(inputs_in("int4", settings=Settings(mode="stream")))}
    [found] = by_format(plans, {"h2d": Ceiling(60e3, 40e3, "MBps", 100.0, "")}, "int4")
    assert found.decode_pass is not None
    assert (found.pass_ms, found.tokens_per_s) == (None, None)
    low, high = found.decode_pass[1:]
    row = shown_by_format([found]).splitlines()[-1]
    assert f"{low:.2f} to {high:.2f}  {1e3 / high:.4g} to {1e3 / low:.4g}" in row


def test_a_decoded_image_is_the_plain_one() -> None:
    plain, encoded = (planned_layouts(H70B, BF16, form, most=False) for form in (None, registry.get("int4")))
    for group in (GroupId(0, "attn"), GroupId(3, "ffn")):
        assert decoded_layout(encoded[group]) == plain[group]
