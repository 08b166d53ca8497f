"""The planner: every layer has one place, what is printed suffices, and following the advice always fits."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from llama.checkpoint import synthetic_checkpoint
from llama.checkpoint.names import GroupId, pass_order
from llama.config import PRESETS, ModelConfig
from llama.generation import GenerationOptions, generate
from llama.kv_cache import KVCache, kv_bytes
from llama.model import Transformer
from llama.weights import TensorWeights
from wsm.advice import changed_flags, check_fits, least_memory, smallest_change
from wsm.budget import GIB, CgroupMemory, Hardware, Work, activation_bytes, cgroup_memory, cpu_available
from wsm.errors import DoesNotFit
from wsm.forecast import predicted_floor
from wsm.groups import GroupLayout, globals_layout, group_layout
from wsm.placement import place, spread
from wsm.plan import PlanInputs, RunShape, make_plan
from wsm.plan_text import describe
from wsm.settings import Settings

H70B = PRESETS["Llama-3.1-70B"]
TINY = ModelConfig("tiny", 64, 8, 4, 2, 16, 160, 300)
ROOMY = Hardware("cuda:0", 192 * GIB, 192 * GIB, GIB // 2, 512 * GIB)


def layouts_of(config: ModelConfig, dtype: torch.dtype) -> dict[GroupId | None, GroupLayout]:
    layouts: dict[GroupId | None, GroupLayout] = {None: globals_layout(config, dtype)}
    layouts.update({group: group_layout(config, group.kind, dtype) for group in pass_order(config.n_layers)})
    return layouts


def inputs_for(
    config: ModelConfig = H70B,
    settings: Settings | None = None,
    shape: RunShape | None = None,
    hardware: Hardware = ROOMY,
    **more: Any,
) -> PlanInputs:
    dtype = torch.bfloat16
    shape = shape or RunShape(1, 2016, 32, 2016)
    return PlanInputs(config, dtype, layouts_of(config, dtype), settings or Settings(), shape, hardware, **more)


# -- placement

placements = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["mixed", "stream", "preload", "full"]),
        "gpu_cached_layers": st.integers(0, 40),
        "cpu_cache_layers": st.integers(0, 40),
        "prefetch_distance": st.integers(0, 12),
        "group_prefetch_depth": st.integers(0, 14),
        "warmup_layers": st.integers(0, 40),
        "cpu_evict": st.sampled_from(["belady", "fifo"]),
        "aggressive_gpu_prefetch": st.integers(0, 6),
        "gpu_max_groups": st.integers(2, 12),
    }
)


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
    notes = place(8, Settings(cpu_cache_layers=0, prefetch_distance=0, warmup_layers=1)).notes
    assert [note.split(":")[0] for note in notes] == [
        "--cpu-cache-layers 0 raised to 1",
        "--prefetch-distance 0 raised to 1",
    ]


# -- the 70B model at the guide's flags


def test_the_guides_70b_configuration_takes_what_the_design_says() -> None:
    plan = make_plan(inputs_for())
    assert len(plan.placement.residency.gpu) == 4
    assert plan.placement.cpu_layers == 40
    assert plan.placement.ssd_layers_a_pass == 42
    assert (plan.placement.gpu_slots, plan.placement.cpu_slots, plan.kv_tokens) == (3, 6, 2048)
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
    line = next(line for line in plan.gpu_lines if line.name.startswith("KV"))
    assert line.nbytes == kv_bytes(TINY, batch, prompt + new, torch.bfloat16)


def test_on_the_cpu_both_tiers_share_one_budget() -> None:
    plan = make_plan(inputs_for(TINY, hardware=Hardware("cpu", None, None, 0, GIB), chunk_tokens=256))
    assert plan.gpu_budget_bytes is None
    assert plan.cpu_bytes == sum(line.nbytes for line in (*plan.gpu_lines, *plan.cpu_lines))
    assert not any("CUDA" in line.name for line in plan.gpu_lines)
    short = make_plan(replace(plan.inputs, hardware=Hardware("cpu", None, None, 0, plan.cpu_bytes - 1)))
    assert short.cpu_short_bytes == 1


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
    assert (plan.chunk_tokens, plan.wave_rows, plan.waves) == (100, 3, 3)


def test_a_little_more_or_less_free_memory_chooses_the_same_portions() -> None:
    shape = RunShape(512, 2016, 32, 512 * 2016)
    chosen = {
        (plan.chunk_tokens, plan.wave_rows)
        for free in (20.1, 22.9, 23.7, 30.0)
        if (plan := make_plan(inputs_for(shape=shape, hardware=Hardware("cpu", None, None, 0, int(free * GIB)))))
    }
    assert len(chosen) == 1


def peak_bytes(config: ModelConfig, prompts: list[list[int]], chunk_tokens: int) -> int:
    """The most memory that generating 2 tokens a row takes beside weights and KV, as the allocator sees it."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    longest = max(map(len, prompts)) + 2
    weights = TensorWeights(_Seeded(config), device, dtype)  # type: ignore[arg-type]
    kv = KVCache(config, len(prompts), longest, device, dtype)
    options = GenerationOptions(2, 0.6, 0.9, 0, frozenset(), True, chunk_tokens, len(prompts))
    model = Transformer(config, weights, device, longest)
    generate(model, kv, prompts, options)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        generate(model, kv, prompts, options)
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


class _Seeded:
    """Small random weights of any shape."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("lengths", "chunk_tokens", "vocab"),
    [
        ([768], 1024, 500),
        ([900, 300, 700], 512, 500),
        ([16] * 48, 16, 500),
        ([32] * 4, 64, 60_000),
        ([24] * 40, 2048, 30_000),
    ],
)
def test_activations_are_bounded_and_not_by_far(lengths: list[int], chunk_tokens: int, vocab: int) -> None:
    config = ModelConfig("m", 512, 2, 8, 2, 64, 1536, vocab)
    prompts = [[1 + i % 400 for i in range(length)] for length in lengths]
    peak = peak_bytes(config, prompts, chunk_tokens)
    work = Work(chunk_tokens, sum(lengths), len(lengths), max(lengths), 1024, 2, False)
    bound = activation_bytes(config, work)
    assert peak <= bound <= 1.5 * peak + (1 << 20), (peak, bound)


def test_synthetic_layouts_are_those_of_the_checkpoint() -> None:
    checkpoint = synthetic_checkpoint("Llama-3.2-1B:layers=2", seed=0, dtype=torch.bfloat16)
    inputs = inputs_for(checkpoint.config, Settings(mode="full"))
    weights = sum(layout.nbytes for layout in inputs.layouts.values())
    plan = make_plan(inputs)
    assert sum(line.nbytes for line in plan.gpu_lines[:3]) == weights
    assert plan.bytes_per_pass == {"ssd_read": 0, "weight_h2d": 0, "hbm_read": pytest.approx(weights, rel=1e-4)}


# -- limits of this machine


def write_cgroup(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_cgroup_v2_limit_counts_the_page_cache_as_free(tmp_path: Path) -> None:
    root, own = tmp_path / "fs", tmp_path / "own"
    own.write_text("0::/a/b\n")
    stat = "anon 5\ninactive_file 300\nactive_file 100\n"
    write_cgroup(root / "a" / "b", memory__max="max\n", memory__current="50\n")
    write_cgroup(root / "a", memory__max="1000\n", memory__current="700\n", memory__stat=stat)
    write_cgroup(root, memory__max="2000\n", memory__current="900\n")
    assert cgroup_memory(root, own) == CgroupMemory(1000, 700)


def test_cgroup_v1_limit_is_read_and_none_is_none(tmp_path: Path) -> None:
    root, own = tmp_path / "fs", tmp_path / "own"
    own.write_text("7:cpu,memory:/job\n1:name=systemd:/x\n")
    directory = root / "memory" / "job"
    write_cgroup(directory, memory__limit_in_bytes="5000", memory__usage_in_bytes="1500")
    write_cgroup(directory, memory__stat="total_inactive_file 500\n")
    assert cgroup_memory(root, own) == CgroupMemory(5000, 4000)
    write_cgroup(directory, memory__limit_in_bytes=str((1 << 63) - 4096))
    assert cgroup_memory(root, own) is None
    assert cgroup_memory(tmp_path / "nowhere", tmp_path / "nothing") is None


def test_cpu_budget_leaves_4_gib_or_5_percent() -> None:
    assert cpu_available(20 * GIB, 24 * GIB, None) == 16 * GIB
    assert cpu_available(400 * GIB, 500 * GIB, None) == 375 * GIB
    assert cpu_available(400 * GIB, 500 * GIB, CgroupMemory(64 * GIB, 50 * GIB)) == 46 * GIB
    assert cpu_available(GIB, 2 * GIB, None) == 0


# -- advice

machines = st.builds(
    lambda gpu, cpu: Hardware("cuda:0", 80 * GIB, gpu, 0, cpu) if gpu else Hardware("cpu", None, None, 0, cpu),
    st.one_of(st.none(), st.integers(100 << 20, 260 << 20)),
    st.integers(0, 40 << 20),
)
small_models = st.builds(lambda layers: replace(TINY, n_layers=layers, dim=128, ffn_dim=2048), st.integers(1, 14))
shapes = st.builds(lambda b, p, n: RunShape(b, p, n, b * p), st.integers(1, 24), st.integers(1, 700), st.integers(1, 9))


@given(config=small_models, chosen=placements, shape=shapes, hardware=machines)
@hypothesis_settings(max_examples=150, deadline=None)
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
        if flag != "--mode":
            one_more = [text if text != left_out else f"{flag} {int(value) + 1}" for text in flags]
            assert not make_plan(follow(inputs, one_more)).fits


def follow(inputs: PlanInputs, flags: list[str]) -> PlanInputs:
    """What the user's next run would plan from."""
    for text in flags:
        flag, value = text.split()
        field = flag.removeprefix("--").replace("-", "_")
        if field == "batch_size":
            inputs = replace(inputs, shape=inputs.shape.with_batch(int(value)))
        else:
            changes: dict[str, Any] = {field: value if field == "mode" else int(value)}
            inputs = replace(inputs, settings=replace(inputs.settings, **changes))
    return inputs


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
        (Settings(gpu_mem_gb=15), 1, ["--gpu-cached-layers 2"]),
        (Settings(gpu_mem_gb=9.5), 1, ["--gpu-cached-layers 0", "--group-prefetch-depth 3"]),
        (Settings(gpu_mem_gb=20), 32, ["--gpu-cached-layers 0", "--group-prefetch-depth 3", "--batch-size 18"]),
        (Settings(cpu_mem_gb=32), 1, ["--cpu-cache-layers 20"]),
        (Settings(mode="stream", cpu_mem_gb=100), 1, ["--mode mixed"]),
        (Settings(mode="preload", gpu_mem_gb=24), 1, ["--mode stream"]),
        (Settings(mode="full", gpu_mem_gb=24, cpu_mem_gb=100), 1, ["--mode mixed"]),
        (Settings(mode="full", gpu_mem_gb=150), 512, ["--batch-size 26"]),
    ],
)
def test_the_advice_for_70b(settings: Settings, batch: int, advised: list[str]) -> None:
    inputs = inputs_for(settings=settings, shape=RunShape(batch, 2016, 32, batch * 2016))
    with pytest.raises(DoesNotFit) as raised:
        check_fits(make_plan(inputs))
    fitting = smallest_change(inputs)
    assert fitting is not None
    assert changed_flags(inputs, fitting) == advised
    assert f"it fits with {' '.join(advised)}\n" in str(raised.value)


def test_a_depth_below_the_aggressive_prefetch_is_never_advised() -> None:
    inputs = inputs_for(settings=Settings(gpu_mem_gb=9.5, aggressive_gpu_prefetch=4))
    with pytest.raises(DoesNotFit, match="no setting of these flags fits"):
        check_fits(make_plan(inputs))


def test_what_does_not_fit_is_told_line_by_line() -> None:
    with pytest.raises(DoesNotFit) as raised:
        check_fits(make_plan(inputs_for(settings=Settings(gpu_mem_gb=5))))
    first, *table = str(raised.value).splitlines()
    assert first.startswith("the run does not fit: it takes 16.")
    assert "no setting of these flags fits: the least that would do is 8." in first
    assert "of GPU memory and 5.51 GiB of CPU memory" in first
    names = [line.strip().split("  ")[0] for line in table]
    for name in ("GPU memory", "weights resident, 4 layers", "pools, 3 slots a kind", "KV, 1 x 2048 tokens", "budget"):
        assert name in names
    assert len({len(line) for line in table[: names.index("budget") + 1]}) == 1


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
    text = describe(make_plan(inputs_for()), CEILINGS)
    for part in (
        "Llama-3.1-70B, mode mixed: 80 layers of 1711.3 MB",
        "GPU  4 layers, 6.375 GiB: 10, 30, 50, 70",
        "CPU  34 layers",
        "SSD  42 layers",
        "3 GPU slots and 6 CPU slots a kind",
        "note: --warmup-layers 4 clipped to 3",
        "allocator slack",
        "71875.0 MB from the SSD",
        "decode: at least 10267.85 ms a pass, bound by the SSD",
    ):
        assert part in text
    assert "at least" not in describe(make_plan(inputs_for()))
