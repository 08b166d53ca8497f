"""On a CUDA device: a weight format gives the same bits in every mode, by graphs too, and memory stays the plan's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.llm import LLaMA
from wsm.formats import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
MODEL = "Llama-3.2-1B:layers=4"
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "cpu_cache_layers": 2, "prefetch_distance": 1}
MODES = ("full", "preload", "stream", "mixed")


def answer(cache: Path, mode: str, weight_format: str, rows: int) -> tuple[list[list[int]], Tensor]:
    """Tokens of ``rows`` prompts of several lengths, and the logits of one."""
    config = {**PLACES, "cache_dir": cache, "synthetic": MODEL, "weight_format": weight_format}
    prompts = [list(range(5, 25 + 3 * row)) for row in range(rows)]
    with LLaMA.build(None, mode=mode, mode_config=config, device="cuda", max_seq_len=256, max_batch_size=rows) as llm:
        tokens = llm.generate(prompts, max_new_tokens=8, temperature=0.0, ignore_eos=True).tokens
        return tokens, llm.logits([prompts[0]]).cpu()


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("weight_format", registry.ALL)
def test_every_mode_gives_the_same_bits_for_few_rows_and_for_many(
    weight_format: str, rows: int, tmp_path: Path
) -> None:
    """16 rows and fewer are multiplied as they lie in int4 and int8, more are decoded first."""
    found = {mode: answer(tmp_path, mode, weight_format, rows) for mode in MODES}
    for mode in MODES:
        assert found[mode][0] == found["full"][0], mode
        assert torch.equal(found[mode][1], found["full"][1]), mode
    if registry.get(weight_format).exact:
        plain = answer(tmp_path, "stream", "auto", rows)
        assert found["stream"][0] == plain[0]
        assert torch.equal(found["stream"][1], plain[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight_format", ["exact", "int4"])
def test_a_run_takes_the_memory_of_its_plan(weight_format: str, mode: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    flags = ["--synthetic", MODEL, "--weight-format", weight_format, "--mode", mode, "--prompt-len", "500"]
    flags += ["--batch-size", "8", "--max-new-tokens", "4", "--temperature", "0", "--ignore-eos", "--no-probe"]
    flags += [word for name, value in PLACES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    # A process of its own: what others left in torch's allocator is no memory of this run.
    command = [sys.executable, "bench_infer.py", *flags, "--cache-dir", str(tmp_path), "--out-json", str(out)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=120)
    result = json.loads(out.read_text())
    memory, plan = result["memory"], result["plan"]
    assert memory["gpu_peak_reserved_bytes"] + memory["gpu_context_bytes"] <= plan["gpu_bytes"]
    assert memory["cpu_page_locked_peak_bytes"] == plan["cpu_page_locked_bytes"]
