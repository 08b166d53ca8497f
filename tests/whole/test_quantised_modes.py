"""Directories that are quantised already run in every mode, and give what the same weights give in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llama.llm import LLaMA
from tests.quantised import METHODS, compressed_config, float8_directory, quantised_directory

PROMPTS = [list(range(5, 45)), [7, 8, 9]]
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "cpu_cache_layers": 2, "prefetch_distance": 1, "warmup_layers": 1}
_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
FLOAT8: dict[str, tuple[dict[str, Any], bool, str, str]] = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, False, "weight_scale", "fp8-tensor"),
    "fp8, inverse": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, False, "weight_scale_inv", "fp8-tensor"),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, True, "weight_scale", "fp8"),
    "float-quantized": (
        compressed_config(_ROWS, "float-quantized", kv_cache_scheme={"num_bits": 8}), True, "weight_scale", "fp8"
    ),
}  # fmt: skip


def answers(directory: Path, mode: str, cache: Path, **config: Any) -> tuple[list[list[int]], Tensor, str]:
    config = {"cache_dir": cache, "dtype": "float32", **PLACES, **config}
    with LLaMA.build(directory, mode=mode, mode_config=config, device="cpu", max_seq_len=128, max_batch_size=2) as llm:
        tokens = llm.generate(PROMPTS, max_new_tokens=6, temperature=0.0, ignore_eos=True).tokens
        return tokens, llm.logits([PROMPTS[0]]), llm.inputs.format_name


def assert_runs_as(model: LlamaForCausalLM, directory: Path, form: str, cache: Path) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits
    tokens, logits, name = answers(directory, "full", cache)
    assert name == form
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for mode in ("preload", "stream", "mixed"):
        other, same, _ = answers(directory, mode, cache)
        assert other == tokens, mode
        assert torch.equal(same, logits), mode


@pytest.mark.parametrize("name", METHODS)
def test_integers_give_the_logits_of_their_dequantised_weights_in_every_mode(name: str, tmp_path: Path) -> None:
    model = quantised_directory(tmp_path / "model", METHODS[name])
    assert_runs_as(model, tmp_path / "model", METHODS[name].form, tmp_path / "cache")


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_gives_the_logits_of_its_dequantised_weights_in_every_mode(name: str, tmp_path: Path) -> None:
    config, per_row, part, form = FLOAT8[name]
    model = float8_directory(tmp_path / "model", config, per_row=per_row, part=part)
    assert_runs_as(model, tmp_path / "model", form, tmp_path / "cache")
