"""Directories that are quantised already run in every mode, and give what the same weights give in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from bench_infer import command_line
from llama.llm import LLaMA
from tests.quantised import (
    FLOAT8_ROWS,
    METHODS,
    compressed_config,
    float8_directory,
    mixed_directory,
    quantised_directory,
)
from tests.ranks import answers as ranks_answers
from tests.ranks import started
from tests.tiny import hf_directory, hf_model

PROMPTS = [list(range(5, 45)), [7, 8, 9]]
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "cpu_cache_layers": 2, "prefetch_distance": 1, "warmup_layers": 1}
FLOAT8: dict[str, tuple[dict[str, Any], bool, str, str]] = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, False, "weight_scale", "fp8-tensor"),
    "fp8, inverse": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, False, "weight_scale_inv", "fp8-tensor"),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, True, "weight_scale", "fp8"),
    "float-quantized": (
        compressed_config(FLOAT8_ROWS, "float-quantized", kv_cache_scheme={"num_bits": 8}), True, "weight_scale", "fp8"
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


def test_a_model_may_mix_formats_and_plain_matrices(tmp_path: Path) -> None:
    model = mixed_directory(tmp_path / "model")
    assert_runs_as(model, tmp_path / "model", "fp8+int4-g32-sym+int8-row", tmp_path / "cache")


def test_ranks_share_a_quantised_model(tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 3}
    model = quantised_directory(tmp_path / "model", METHODS["awq"], **shape)
    (tmp_path / "answers").mkdir()
    arguments = ([tmp_path / "model"], tmp_path / "cache", tmp_path / "answers", 2)
    with started(tmp_path / "said", 2, ranks_answers, lambda rank: arguments) as ranks:
        assert ranks.codes(180) == [0, 0], (tmp_path / "said" / "err0").read_text()
    found = [torch.load(tmp_path / "answers" / f"answers-2-{rank}.pt") for rank in range(2)]
    for mode in ("full", "preload", "stream", "mixed"):
        assert all(torch.equal(of["model " + mode]["logits"], found[0]["model full"]["logits"]) for of in found)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits
    difference = (found[0]["model full"]["logits"] - expected).abs().max()
    assert difference <= 0.05 * expected.abs().max()


def test_another_description_of_the_same_codes_is_packed_anew(tmp_path: Path) -> None:
    """GPTQ's two versions differ by 1 in every zero, and in nothing that a format's name tells."""
    quantised_directory(tmp_path / "model", METHODS["gptq"])
    first = answers(tmp_path / "model", "mixed", tmp_path / "cache")[1]
    content = json.loads((tmp_path / "model/config.json").read_text())
    content["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    second = answers(tmp_path / "model", "mixed", tmp_path / "cache")[1]
    assert not torch.equal(second, first)
    assert torch.equal(second, answers(tmp_path / "model", "full", tmp_path / "other")[1])


def test_a_store_of_imported_codes_is_exact_also_without_the_checkpoint(tmp_path: Path) -> None:
    quantised_directory(tmp_path / "model", METHODS["packed, asymmetric"])
    store, out = ["--manifest", str(tmp_path / "s.json")], tmp_path / "r.json"
    pack = ["pack", "--checkpoints", str(tmp_path / "model"), "--to", str(tmp_path / "s.wsm"), *store]
    assert command_line([*pack, "--quiet"]) == 0
    (tmp_path / "empty").mkdir()
    for place in ("model", "empty"):
        run = ["--checkpoints", str(tmp_path / place), *store, "--prompt-len", "4", "--max-new-tokens", "2"]
        assert command_line([*run, "--device", "cpu", "--no-probe", "--out-json", str(out)]) == 0
        weights = json.loads(out.read_text())["weights"]
        assert (weights["weight_format"], weights["exact"]) == ("int4-g32", True)
    # The same name, and not the same weights: these are encoded.
    plain = hf_directory(tmp_path / "plain", hf_model())
    pack[2] = str(plain)
    assert command_line([*pack, "--weight-format", "int4-g32", "--yes", "--quiet"]) == 0
    run = ["--checkpoints", str(plain), *store, "--prompt-len", "4", "--max-new-tokens", "2"]
    assert command_line([*run, "--device", "cpu", "--no-probe", "--out-json", str(out)]) == 0
    assert json.loads(out.read_text())["weights"]["exact"] is False


def test_another_weight_format_beside_a_quantised_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised_directory(tmp_path / "model", METHODS["awq"])
    flags = ["--checkpoints", str(tmp_path / "model"), "--weight-format", "int8", "--prompt-len", "4"]
    assert command_line([*flags, "--device", "cpu", "--cache-dir", str(tmp_path)]) == 2
    assert "is quantised already, in int4-g32-float16, and runs as it is" in capsys.readouterr().err
