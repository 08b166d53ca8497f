"""Whatever is switched, the modes give the same bits; and a run takes the memory of its plan, not of its model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoint.hf import HFCheckpoint
from llama.llm import LLaMA
from tests.tiny import hf_directory, hf_model
from wsm.plan.memory import MemoryKind
from wsm.settings import WSM_PRESETS

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [list(range(5, 45)), [7, 8, 9]]
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "cpu_cache_layers": 2, "prefetch_distance": 1, "warmup_layers": 1}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"cpu_rolling_mode": False},
    {"cpu_evict": "fifo"},
    {"cpu_wrap_around": False},
    {"cpu_roll_sync": False},
    {"aggressive_gpu_prefetch": 6},
    {"gpu_max_groups": 2},
    {"skip_preload_wait": False},
    {"evict_finished": False},
    {"kv_throttle_threshold": 1},
    {"kv_throttle_ms": 0.0},
    {"balance_prefetch": False},
    {"balance_tol": 0},
    {"pair_ahead": 0},
    {"kind_ahead_cap": 0, "balance_prefetch": False},
    {"embedding": "cpu"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("model"), hf_model(num_hidden_layers=6))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def answers(directory: Path, mode: str, cache: Path, **config: Any) -> tuple[list[list[int]], Tensor]:
    config = {"cache_dir": cache, **PLACES, **config}
    with LLaMA.build(directory, mode=mode, mode_config=config, device="cpu", max_seq_len=128, max_batch_size=2) as llm:
        tokens = llm.generate(PROMPTS, max_new_tokens=6, temperature=0.0, ignore_eos=True).tokens
        return tokens, llm.logits([PROMPTS[0]])


@pytest.fixture(scope="module")
def full(directory: Path, cache: Path) -> tuple[list[list[int]], Tensor]:
    return answers(directory, "full", cache)


@pytest.mark.parametrize("wait", [True, False])
def test_skip_preload_wait_0_comes_back_with_every_resident_loaded(
    wait: bool, directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = HFCheckpoint.read_into

    def slow(self: HFCheckpoint, name: str, out: Tensor) -> None:
        time.sleep(0.05)
        read(self, name, out)

    monkeypatch.setattr(HFCheckpoint, "read_into", slow)
    config = {"cache_dir": cache, **PLACES, "skip_preload_wait": not wait}
    with LLaMA.build(directory, mode="stream", mode_config=config, device="cpu", max_seq_len=128) as llm:
        assert llm.manager is not None
        assert llm.manager.tiers.loaded() == wait


def test_every_variable_is_switched_here() -> None:
    named = {name for switch in SWITCHES for name in switch}
    assert {name.removeprefix("WSM_").lower() for name in WSM_PRESETS} <= named


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: ",".join(map(str, switch)) or "preset")
@pytest.mark.parametrize("mode", ["mixed", "stream", "preload"])
def test_no_switch_changes_a_bit(
    mode: str, switch: dict[str, Any], directory: Path, cache: Path, full: tuple[list[list[int]], Tensor]
) -> None:
    tokens, logits = answers(directory, mode, cache, **switch)
    assert tokens == full[0]
    assert torch.equal(logits, full[1])


def test_an_embedding_in_cpu_memory_leaves_the_gpu_and_is_planned_to_the_byte(directory: Path, cache: Path) -> None:
    config = {"cache_dir": cache, **PLACES}
    with LLaMA.build(directory, mode="stream", mode_config={**config, "embedding": "cpu"}, device="cpu") as llm:
        moved = next(line.nbytes for line in llm.plan.cpu_lines if line.kind == MemoryKind.GLOBALS)
        assert moved >= llm.plan.inputs.embedding_bytes > 0
        assert llm.manager is not None
        assert llm.manager.memory.page_locked_peak_bytes == llm.plan.page_locked_bytes
        on_gpu = llm.plan.gpu_bytes
    with LLaMA.build(directory, mode="stream", mode_config=config, device="cpu") as llm:
        assert llm.plan.gpu_bytes - on_gpu == pytest.approx(moved, abs=8192)


def test_a_mixed_run_takes_the_memory_of_its_plan_and_not_of_its_model(tmp_path: Path) -> None:
    """2.47 GB of weights in a plan of 1.67 GB; python and torch themselves take some 250 MiB."""
    out = tmp_path / "result.json"
    flags = "--synthetic Llama-3.2-1B --mode mixed --gpu-cached-layers 1 --cpu-cache-layers 2 --prefetch-distance 1"
    flags += " --group-prefetch-depth 2 --prompt-len 8 --max-new-tokens 2 --warmup-rounds 0 --device cpu --no-probe"
    command = [sys.executable, str(ROOT / "bench_infer.py"), *flags.split(), "--cache-dir", str(tmp_path)]
    subprocess.run([*command, "--out-json", str(out)], check=True, capture_output=True, timeout=300)
    result = json.loads(out.read_text())
    planned = result["plan"]["gpu_bytes"] + result["plan"]["cpu_page_locked_bytes"]
    assert planned + (512 << 20) < 2.4e9
    assert result["memory"]["rss_anon_bytes"] <= planned + (512 << 20)
