"""Rotary embeddings: every field in every spelling gives transformers' table far beyond the original context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.config import ModelConfig
from llama.model import rotary_table
from llama.rope import ambiguous_rope
from wsm.errors import UnusableInput

POSITIONS = 4096
"""The models below were made for 512, or for 64."""
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def without(rope: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in rope.items() if name not in fields}


AS_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta outside": {"rope_theta": 500000.0},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "theta inside the old key": {"rope_scaling": {**LINEAR, "rope_theta": 500000.0}},
    "theta inside beats outside": {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "theta outside of another's": {"rope_theta": 500000.0, "rope_parameters": LINEAR},
    "theta alone inside": {"rope_parameters": {"rope_theta": 500}},
    "whole numbers": {"rope_theta": 500000, "rope_scaling": {**LINEAR, "factor": 2}},
    "null": {"rope_scaling": None, "rope_parameters": None},
    "empty": {"rope_scaling": {}, "rope_parameters": {}},
    "default": {"rope_scaling": {"rope_type": "default"}},
    "default takes no factor": {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
    "no type takes no factor": {"rope_scaling": {"factor": 4.0}},
    "linear": {"rope_scaling": LINEAR},
    "linear, old spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new key": {"rope_parameters": LINEAR},
    "linear, new key, old spelling": {"rope_parameters": {"type": "linear", "factor": 4.0}},
    "the new spelling beats the old": {"rope_scaling": {"type": "dynamic", **LINEAR}},
    "linear below 1": {"rope_scaling": {**LINEAR, "factor": 0.5}},
    "linear knows no original context": {"rope_scaling": {**LINEAR, "original_max_position_embeddings": 64}},
    "linear knows no attention factor": {"rope_scaling": {**LINEAR, "attention_factor": 2.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0},
    "llama3, old spelling": {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_theta": 500000.0},
    "llama3, new key": {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "rope_theta": 500000.0}},
    "llama3, other factors": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2, "high_freq_factor": 3}
    },
    "llama3, equal factors": {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
    "llama3, original context outside": {
        "rope_scaling": {"rope_type": "llama3", **without(LLAMA3, "original_max_position_embeddings")},
        "original_max_position_embeddings": 64,
    },
    "llama3, original context outside beats inside": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "original_max_position_embeddings": 256,
    },
    "llama3, original context outside beats inside the new key": {
        "rope_parameters": {"rope_type": "llama3", **LLAMA3},
        "original_max_position_embeddings": 256,
    },
    "llama3, no original context": {
        "rope_scaling": {"rope_type": "llama3", **without(LLAMA3, "original_max_position_embeddings")}
    },
    "linear, original context outside": {"rope_scaling": LINEAR, "original_max_position_embeddings": 64},
    "both keys: the old one": {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
    "both keys: the theta of the new one is lost": {
        "rope_scaling": LINEAR,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "both keys, theta outside": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_theta": 500000.0,
    },
    "both keys: an empty old one": {"rope_scaling": {}, "rope_parameters": LINEAR},
    "whole heads": {"partial_rotary_factor": 1.0, "rope_scaling": {**LINEAR, "partial_rotary_factor": 1}},
    "head_dim by division": {"head_dim": None, "rope_scaling": LINEAR},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic' does not run here"),
    "yarn": ({"rope_scaling": YARN}, "type 'yarn' does not run here"),
    "yarn, new key": ({"rope_parameters": YARN}, "type 'yarn' does not run here"),
    "longrope": ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "type 'longrope' does not run here"),
    "su": ({"rope_scaling": {"type": "su"}}, "type 'su' does not run here"),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "type 'mrope' does not run here"),
    "proportional": ({"rope_parameters": {"rope_type": "proportional"}}, "type 'proportional' does not run here"),
    "a type that is no text": ({"rope_parameters": {"rope_type": ["linear"]}}, "does not run here"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "sets partial_rotary_factor"),
    "part of a head inside": ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "field factor is missing"),
    "no low factor": (
        {"rope_scaling": {"rope_type": "llama3", **without(LLAMA3, "low_freq_factor")}},
        "field low_freq_factor is missing",
    ),
    "no high factor": (
        {"rope_scaling": {"rope_type": "llama3", **without(LLAMA3, "high_freq_factor")}},
        "field high_freq_factor is missing",
    ),
    "a factor below 0": ({"rope_scaling": {**LINEAR, "factor": -1}}, "factor must be a number above 0"),
    "a factor as text": ({"rope_scaling": {**LINEAR, "factor": "4"}}, "factor must be a number above 0, not '4'"),
    "factors the wrong way": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}},
        "impossible factors",
    ),
    "no object": ({"rope_scaling": "linear"}, r"field rope_scaling must be an object, not 'linear'"),
    "per kind of layer": (
        {"rope_parameters": {"full_attention": LINEAR}, "layer_types": ["full_attention"]},
        "per kind of layer (full_attention)",
    ),
}


def transformers_table(config: LlamaConfig) -> Tensor:
    """complex64 ``[POSITIONS, head_dim / 2]``."""
    positions = torch.arange(POSITIONS).unsqueeze(0)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    half = cos.shape[-1] // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half])


def our_table(config: ModelConfig) -> Tensor:
    return rotary_table(config, POSITIONS, torch.device("cpu"))


@pytest.mark.parametrize("case", AS_TRANSFORMERS)
def test_config_json_gives_the_table_of_transformers(case: str, tmp_path: Path) -> None:
    fields = {**BASE, **AS_TRANSFORMERS[case]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = transformers_table(AutoConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(our_table(ModelConfig.from_hf(fields, "m")), theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_run_is_refused_by_name(case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(UnusableInput) as caught:
        ModelConfig.from_hf({**BASE, **changes}, "m")
    assert said in str(caught.value)


def test_two_descriptions_are_warned_of_where_they_differ() -> None:
    both = AS_TRANSFORMERS["both keys: the theta of the new one is lost"]
    said = ambiguous_rope(both, "m/config.json")
    assert said is not None
    assert said.startswith("m/config.json has both rope_scaling and rope_parameters: rope_scaling counts")
    assert ambiguous_rope({"rope_scaling": LINEAR, "rope_parameters": dict(LINEAR)}, "f") is None
    assert ambiguous_rope({"rope_scaling": None, "rope_parameters": LINEAR}, "f") is None


# Meta's params.json against what the Hugging Face release of the same model says.

PARAMS: dict[str, Any] = {"n_layers": 2, "n_kv_heads": 8, "vocab_size": 300, "rope_theta": 500000.0}
SCALED = {**PARAMS, "use_scaled_rope": True}
SHAPES = {
    "3.1 8B": (4096, 32, 8.0),
    "3.1 70B": (8192, 64, 8.0),
    "3.1 405B": (16384, 128, 8.0),
    "3.2 1B": (2048, 32, 32.0),
    "3.2 3B": (3072, 24, 32.0),
}


def released(factor: float, head_dim: int = 64, theta: float = 500000.0, **changes: Any) -> LlamaConfig:
    rope = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192, "factor": factor}
    return LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters={**rope, "rope_theta": theta, **changes}
    )


@pytest.mark.parametrize("model", SHAPES)
def test_published_models_have_the_factor_of_their_hugging_face_release(model: str) -> None:
    """3.2 1B and 3B ship ``use_scaled_rope`` and no factor, as 3.1 does, but were trained with another."""
    dim, heads, factor = SHAPES[model]
    config = ModelConfig.from_meta({**SCALED, "dim": dim, "n_heads": heads}, "m")
    theirs = transformers_table(released(factor, dim // heads))
    torch.testing.assert_close(our_table(config), theirs, atol=2e-3, rtol=0)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.original_max_position) == (factor, 8192)


@pytest.mark.parametrize(
    ("params", "theirs"),
    [
        ({"rope_scaling_factor": 16.0}, {"factor": 16.0}),
        ({"rope_scaling_factor": 16, "rope_high_freq_factor": 1}, {"factor": 16.0, "high_freq_factor": 1.0}),
        ({"rope_high_freq_factor": 2.0}, {"factor": 32.0, "high_freq_factor": 2.0}),
        ({"rope_scaling_factor": None}, {"factor": 32.0}),
        ({"rope_theta": 1000.0}, {"factor": 32.0, "theta": 1000.0}),
        ({"rope_theta": None}, {"factor": 32.0}),
    ],
)
def test_params_that_name_their_factors_are_followed(params: dict[str, Any], theirs: dict[str, Any]) -> None:
    config = ModelConfig.from_meta({**SCALED, "dim": 2048, "n_heads": 32, **params}, "m")
    torch.testing.assert_close(our_table(config), transformers_table(released(**theirs)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("unscaled", [{}, {"use_scaled_rope": False}, {"rope_scaling_factor": 8.0}])
def test_without_use_scaled_rope_nothing_is_scaled(unscaled: dict[str, Any]) -> None:
    config = ModelConfig.from_meta({**PARAMS, "dim": 2048, "n_heads": 32, **unscaled}, "m")
    plain = LlamaConfig(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    torch.testing.assert_close(our_table(config), transformers_table(plain), atol=2e-3, rtol=0)


def test_a_scaled_model_of_an_unknown_shape_has_to_name_its_factor() -> None:
    unknown = {**SCALED, "dim": 1024, "n_heads": 16}
    with pytest.raises(UnusableInput, match=r'no rope_scaling_factor.*add "rope_scaling_factor" \(8 for .*32 from'):
        ModelConfig.from_meta(unknown, "m")
    assert ModelConfig.from_meta({**unknown, "rope_scaling_factor": 8}, "m").rope_scaling is not None
    with pytest.raises(UnusableInput, match="use_scaled_rope must be true or false"):
        ModelConfig.from_meta({**unknown, "use_scaled_rope": "true"}, "m")
