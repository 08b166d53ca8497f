"""Every layer has one place, residents are spread evenly, and what is clipped is said."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.plans import placements
from wsm.plan.placement import place, spread
from wsm.settings import Settings


@given(n_layers=st.integers(1, 32), chosen=placements)
def test_every_layer_has_exactly_one_tier(n_layers: int, chosen: dict[str, Any]) -> None:
    residency = place(n_layers, Settings(**chosen)).residency
    assert sorted(residency.gpu + residency.cpu + residency.ssd) == list(range(n_layers))
    assert all(list(tier) == sorted(tier) for tier in (residency.gpu, residency.cpu, residency.ssd))


@given(n_layers=st.integers(1, 32), chosen=placements)
def test_layers_read_a_pass_are_what_design_section_9_says(n_layers: int, chosen: dict[str, Any]) -> None:
    settings = Settings(**{**chosen, "mode": "mixed"})
    plan = place(n_layers, settings)
    on_gpu = min(settings.gpu_cached_layers, n_layers)
    rest = n_layers - on_gpu
    cached = min(max(1, settings.cpu_cache_layers), rest)
    ahead = min(max(1, settings.prefetch_distance), cached)
    by_rule = rest if settings.cpu_evict == "fifo" else rest - (cached - ahead)
    assert plan.ssd_layers_a_pass == (0 if cached >= rest else by_rule)
    assert plan.cpu_layers == cached
    assert plan.read_ahead_layers <= max(plan.cpu_slots, 0)
    assert (plan.cpu_slots >= 1) == bool(plan.residency.ssd)


@given(n_layers=st.integers(1, 32), chosen=placements)
def test_pools_have_the_slots_of_the_formula(n_layers: int, chosen: dict[str, Any]) -> None:
    settings = Settings(**chosen)
    plan = place(n_layers, settings)
    depth = max(settings.group_prefetch_depth, settings.aggressive_gpu_prefetch)
    streamed = plan.residency.streamed_layers
    assert plan.gpu_slots == min(depth // 2 + 1, settings.gpu_max_groups // 2, streamed)
    assert plan.gpu_slots * 2 <= settings.gpu_max_groups
    assert (plan.gpu_slots >= 1) == (streamed > 0)


@given(n_layers=st.integers(1, 32), chosen=placements)
def test_staged_layers_are_held_by_residents_and_slots(n_layers: int, chosen: dict[str, Any]) -> None:
    settings = Settings(**chosen)
    plan = place(n_layers, settings)
    staged = range(plan.staged_layers)
    assert sum(layer not in plan.residency.gpu for layer in staged) <= plan.gpu_slots
    if settings.mode in ("mixed", "stream"):
        assert plan.staged_layers <= settings.warmup_layers


def gaps(chosen: tuple[int, ...], among: list[int]) -> set[int]:
    """Distances between neighbours on the cycle of ``among``."""
    places = [among.index(layer) for layer in chosen]
    return {(after - before) % len(among) for before, after in zip(places, [*places[1:], places[0]], strict=True)}


@given(n_layers=st.integers(1, 128), gpu=st.integers(2, 128), cpu=st.integers(2, 128))
def test_residents_are_spread_evenly_over_the_cycle(n_layers: int, gpu: int, cpu: int) -> None:
    residency = place(n_layers, Settings(gpu_cached_layers=gpu, cpu_cache_layers=cpu, prefetch_distance=1)).residency
    rest = [layer for layer in range(n_layers) if layer not in residency.gpu]
    for chosen, among in ((residency.gpu, list(range(n_layers))), (residency.cpu, rest)):
        if len(chosen) > 1:
            assert max(gaps(chosen, among)) - min(gaps(chosen, among)) <= 1


@given(n=st.integers(1, 200), data=st.data())
def test_spread_takes_as_many_as_asked_and_none_twice(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    chosen = spread(range(n), count)
    assert len(set(chosen)) == count
    assert list(chosen) == sorted(chosen)


def test_what_is_clipped_is_said() -> None:
    notes = place(8, Settings(gpu_cached_layers=9, warmup_layers=20)).notes
    assert notes == (
        "--gpu-cached-layers 9 clipped to 8",
        "--warmup-layers 20 clipped to 8, what residents and slots hold",
    )
    notes = place(8, Settings(gpu_cached_layers=1, cpu_cache_layers=3, warmup_layers=1)).notes
    assert notes == ("--prefetch-distance 6 clipped to 3, the layers of CPU memory",)


def test_warm_up_layers_that_nobody_asked_for_are_clipped_without_a_word() -> None:
    assert place(80, Settings()).staged_layers == 3
    assert place(80, Settings()).notes == ()
    assert place(80, Settings(warmup_layers=5)).notes == (
        "--warmup-layers 5 clipped to 3, what residents and slots hold",
    )
