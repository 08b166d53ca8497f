"""On a CUDA device: the modes are bit-equal, and what is moved and taken is what the plan says."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_infer import command_line as main
from llama.llm import LLaMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
MODEL = "Llama-3.2-1B:layers=8"
PROMPTS = [list(range(100, 164)), list(range(7, 30))]
PLACES: dict[str, Any] = {"gpu_cached_layers": 2, "cpu_cache_layers": 3, "prefetch_distance": 2}


def build(mode: str, cache: Path, rows: int = 2, tokens: int = 512, **config: Any) -> LLaMA:
    return LLaMA.build(
        None,
        mode=mode,
        mode_config={"synthetic": MODEL, "cache_dir": cache, **PLACES, **config},
        device="cuda",
        max_seq_len=tokens,
        max_batch_size=rows,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_all_modes_give_bit_equal_logits_and_the_same_tokens(temperature: float, cache: Path) -> None:
    with build("full", cache) as llm:
        tokens = llm.generate(PROMPTS, max_new_tokens=24, temperature=temperature, ignore_eos=True).tokens
        logits = llm.logits([PROMPTS[0]])
    for mode in ("preload", "stream", "mixed"):
        with build(mode, cache) as llm:
            assert llm.generate(PROMPTS, max_new_tokens=24, temperature=temperature, ignore_eos=True).tokens == tokens
            assert torch.equal(llm.logits([PROMPTS[0]]), logits), mode


def test_graphs_replay_the_bits_of_the_eager_pass_across_their_borders(cache: Path) -> None:
    """64 and 23 tokens, then 240 more: the first graph's positions are used up on the way."""
    with build("stream", cache) as llm:
        tokens = llm.generate(PROMPTS, max_new_tokens=240, temperature=0.0, ignore_eos=True).tokens
    for mode in ("full", "preload"):
        with build(mode, cache) as llm:
            assert llm.generate(PROMPTS, max_new_tokens=240, temperature=0.0, ignore_eos=True).tokens == tokens
            assert llm.graphs is not None
            assert sorted(llm.graphs.captured) == [(2, 256), (2, 512)]


def test_an_embedding_read_from_cpu_memory_changes_no_bit(cache: Path) -> None:
    """The 1B model's embedding is its head too; the 8B one's is not."""
    answers = []
    for where in ("gpu", "cpu"):
        with build("stream", cache, synthetic="Llama-3.1-8B:layers=2", embedding=where) as llm:
            tokens = llm.generate(PROMPTS, max_new_tokens=8, temperature=0.0, ignore_eos=True).tokens
            answers.append((tokens, llm.logits([PROMPTS[0]]).cpu(), llm.plan.inputs.embedding_on_cpu))
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])
    assert [on_cpu for _, _, on_cpu in answers] == [False, True]


def test_memory_that_cuda_will_not_page_lock_still_carries_the_weights(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build("stream", cache) as llm:
        tokens = llm.generate(PROMPTS, max_new_tokens=8, temperature=0.0, ignore_eos=True).tokens
    runtime = torch.cuda.cudart()

    def refuse(address: int, nbytes: int, flags: int) -> int:
        """A real refusal, which leaves its error with CUDA: the address of nothing."""
        return int(runtime.cudaHostRegister(0, nbytes, flags))

    refusing = types.SimpleNamespace(
        **{name: getattr(runtime, name) for name in dir(runtime) if name.startswith("cuda")}
    )
    refusing.cudaHostRegister = refuse
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with build("stream", cache) as llm:
        assert any("refused to page-lock" in warning for warning in llm.warnings)
        assert llm.generate(PROMPTS, max_new_tokens=8, temperature=0.0, ignore_eos=True).tokens == tokens


@pytest.mark.parametrize("mode", ["full", "stream", "mixed"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_kv_below_the_gpu_changes_no_bit(mode: str, kv_dtype: str, cache: Path) -> None:
    """Sixteen ragged rows of 300 tokens and more, moved three at a time; a part of the KV stays on the GPU."""
    prompts = [[(7 * row + place) % 5000 + 100 for place in range(300 + 100 * row)] for row in range(16)]
    same: dict[str, Any] = {"prefill_chunk_tokens": 512, "micro_batch": 3, "kv_dtype": kv_dtype}
    answers, budget = [], 60.0
    for _ in range(2):
        with build(mode, cache, rows=16, tokens=2048, gpu_mem_gb=budget, **same) as llm:
            tokens = llm.generate(prompts, max_new_tokens=12, temperature=0.0, ignore_eos=True).tokens
            answers.append((tokens, llm.logits([prompts[0]]).cpu()))
            below = len(llm.plan.kv.below)
            kv_bytes = llm.plan.kv.layout.batch * llm.plan.kv.layout.row_bytes * llm.config.n_layers
            budget = (llm.plan.gpu_bytes - 0.35 * kv_bytes) / 2**30  # the context may have grown
    assert 8 < below < 48
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize("mode", ["preload", "stream", "mixed"])
def test_page_locked_memory_is_what_the_plan_says(mode: str, cache: Path) -> None:
    with build(mode, cache) as llm:
        llm.generate(PROMPTS, max_new_tokens=4, temperature=0.0)
        assert llm.manager is not None
        planned = sum(line.nbytes for line in llm.plan.cpu_lines)
        assert llm.manager.memory.page_locked_peak_bytes <= planned * 1.01 + (64 << 20)
        assert planned <= llm.manager.memory.page_locked_peak_bytes * 1.01 + (64 << 20)


def test_a_closed_model_holds_no_memory_of_the_gpu(cache: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for mode in ("full", "stream", "mixed"):
        with build(mode, cache) as llm:
            llm.generate(PROMPTS, max_new_tokens=4, temperature=0.0)
            assert torch.cuda.memory_allocated() > before + (100 << 20)
        assert torch.cuda.memory_allocated() < before + (32 << 20), mode


def test_device_memory_stays_within_the_budget(cache: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with build("mixed", cache, gpu_mem_gb=4.0) as llm:
        llm.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
        taken = torch.cuda.max_memory_reserved() + llm.plan.inputs.hardware.gpu_context_bytes
    assert taken <= 4 * 2**30
    assert torch.empty(6 << 30, dtype=torch.uint8, device="cuda").nbytes == 6 << 30  # the budget went with the model


@pytest.mark.parametrize("mode", ["full", "stream"])
def test_decode_attention_of_many_long_rows_takes_what_was_planned(mode: str, cache: Path) -> None:
    """All rows attend over as many positions as the longest one has: the others are short, for a quick prefill."""
    prompts = [list(range(100, 108)) for _ in range(127)] + [[place % 5000 + 100 for place in range(4000)]]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with build(mode, cache, rows=128, tokens=4096) as llm:
        llm.generate(prompts, max_new_tokens=4, temperature=0.0, ignore_eos=True)
        taken = torch.cuda.max_memory_reserved() + llm.plan.inputs.hardware.gpu_context_bytes
        assert taken <= llm.plan.gpu_bytes


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("mode", ["stream", "mixed"])
def test_a_run_moves_the_bytes_that_were_planned_and_no_warning_says_otherwise(
    mode: str, depth: int, cache: Path, tmp_path: Path
) -> None:
    """Two slots a kind leave a copy under way when the last round ends: its record must not be asked too early."""
    out = tmp_path / "result.json"
    flags = ["--gpu-cached-layers", "2", "--cpu-cache-layers", "3", "--prefetch-distance", "2"]
    flags += ["--group-prefetch-depth", str(depth), "--prompt-len", "64", "--max-new-tokens", "6", "--ignore-eos"]
    flags += ["--repeats", "3", "--cache-dir", str(cache), "--out-json", str(out), "--trace", str(tmp_path / "t.json")]
    assert main(["--synthetic", MODEL, "--mode", mode, "--device", "cuda", *flags]) == 0
    result = json.loads(out.read_text())
    for phase in result["phases"].values():
        for tier in ("ssd_read", "weight_h2d"):
            assert phase["bytes"][tier] == result["plan"]["bytes_per_pass"][tier] * phase["passes"]
        assert phase["floor_ms"] > 0
        assert phase["busy_ms"]["h2d"] > 0
    assert not [warning for warning in result["warnings"] if "planned" in warning]
