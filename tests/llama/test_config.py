"""Configurations: Meta's and Hugging Face's files give the published shapes; what does not run is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama.config import MOST_LAYERS, PRESETS, ModelConfig
from llama.rope import RopeScaling
from wsm.errors import UnusableInput

# params.json of the released models, as Meta ships them.
LLAMA3 = {"norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256, "n_kv_heads": 8}
LLAMA31 = {**LLAMA3, "use_scaled_rope": True}
META_PARAMS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1},
    "Llama-2-13B": {
        "dim": 5120,
        "multiple_of": 256,
        "n_heads": 40,
        "n_layers": 40,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "Llama-2-70B": {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    },
    "Llama-3-8B": {
        **LLAMA3,
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
    },
    "Llama-3-70B": {
        **LLAMA3,
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
    "Llama-3.1-8B": {
        **LLAMA31,
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
    },
    "Llama-3.1-70B": {
        **LLAMA31,
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
    "Llama-3.1-405B": {
        **LLAMA31,
        "dim": 16384,
        "n_layers": 126,
        "n_heads": 128,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.2,
    },
    "Llama-3.2-1B": {
        **LLAMA31,
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.5,
    },
    "Llama-3.2-3B": {
        **LLAMA31,
        "dim": 3072,
        "n_layers": 28,
        "n_heads": 24,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.0,
    },
}
FFN_DIMS = {
    "Llama-2-7B": 11008,
    "Llama-2-13B": 13824,
    "Llama-2-70B": 28672,
    "Llama-3-8B": 14336,
    "Llama-3.1-70B": 28672,
    "Llama-3.1-405B": 53248,
    "Llama-3.2-1B": 8192,
    "Llama-3.2-3B": 8192,
}

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


@pytest.mark.parametrize("name", META_PARAMS)
def test_meta_params_give_the_preset(name: str) -> None:
    config = ModelConfig.from_meta(META_PARAMS[name], name, vocab_size=32000)
    # Tying is not in params.json: the checkpoint finds out whether it holds a head.
    assert dataclasses.replace(config, tied_embeddings=PRESETS[name].tied_embeddings) == PRESETS[name]


@pytest.mark.parametrize("name", FFN_DIMS)
def test_ffn_dim_is_the_published_one(name: str) -> None:
    assert ModelConfig.from_meta(META_PARAMS[name], name, vocab_size=32000).ffn_dim == FFN_DIMS[name]


def test_hf_config_gives_the_preset() -> None:
    assert ModelConfig.from_hf(HF, "Llama-3.2-1B") == PRESETS["Llama-3.2-1B"]


def test_absent_hf_fields_take_transformers_defaults() -> None:
    optional = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")
    config = ModelConfig.from_hf({key: value for key, value in HF.items() if key not in optional}, "m")
    assert (config.n_kv_heads, config.head_dim, config.norm_eps, config.rope_theta) == (32, 64, 1e-6, 10000.0)
    assert config.rope_scaling is None
    assert not config.tied_embeddings


def test_metas_empty_vision_fields_are_a_text_models() -> None:
    params = {**META_PARAMS["Llama-3-8B"], "vision_chunk_size": -1, "use_qk_norm": False, "moe_args": None}
    assert ModelConfig.from_meta(params, "Llama-3-8B") == PRESETS["Llama-3-8B"]


@pytest.mark.parametrize("layers", [MOST_LAYERS + 1, 10**30, 10**400])
def test_more_layers_than_any_model_has_are_refused_before_they_are_counted(layers: int) -> None:
    with pytest.raises(UnusableInput, match=r"layers must be at most .*: no model has more"):
        ModelConfig.from_hf({**HF, "num_hidden_layers": layers}, "m")
    with pytest.raises(UnusableInput, match=r"layers must be at most .*: no model has more"):
        ModelConfig.from_meta({**META_PARAMS["Llama-3-8B"], "n_layers": layers}, "m")


@pytest.mark.parametrize("vocab", [{}, {"vocab_size": -1}, {"vocab_size": None}])
def test_vocab_size_comes_from_the_embedding_where_params_gives_none(vocab: dict[str, Any]) -> None:
    params = {key: value for key, value in META_PARAMS["Llama-3-8B"].items() if key != "vocab_size"} | vocab
    assert ModelConfig.from_meta(params, "m", vocab_size=777).vocab_size == 777
    with pytest.raises(UnusableInput, match="gives no vocab_size"):
        ModelConfig.from_meta(params, "m")


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads"])
def test_a_field_missing_in_params_is_named_with_its_file(field: str) -> None:
    params = {key: value for key, value in META_PARAMS["Llama-3-8B"].items() if key != field}
    with pytest.raises(UnusableInput, match=rf"^my-model/params\.json: field {field} is missing"):
        ModelConfig.from_meta(params, "my-model")


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_field_missing_in_config_is_named_with_its_file(field: str) -> None:
    config = {key: value for key, value in HF.items() if key != field}
    with pytest.raises(UnusableInput, match=rf"^my-model/config\.json: field {field} is missing"):
        ModelConfig.from_hf(config, "my-model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM does not run here"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification does not run here"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' does not run here; 'llama' does"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' does not run here; 'llama' does"),
        ({"model_type": ["x" * 9] * 99}, r"model_type \['xxxxxxxxx', .{46} does not run here; 'llama' does"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names, not 'LlamaForCausalLM'"),
        ({"architectures": ["Llama" * 99]}, "architecture (Llama){12} does not run here; LlamaForCausalLM does"),
        ({"hidden_act": "gelu" * 99}, "activation '(gelu){14}gel does not run here; silu does"),
        ({"architectures": None, "model_type": None}, "neither architectures nor model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "sets quantization: a model quantised for MLX"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"hidden_size": 10**30}, "hidden_size must be at most"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": "2048"}, "hidden_size must be a whole number"),
        ({"num_key_value_heads": 7}, "7 KV heads"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": True}, "rope_theta must be a number above 0"),
    ],
)
def test_hf_configs_that_do_not_run_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnusableInput, match=said):
        ModelConfig.from_hf({**HF, **changes}, "m")


@pytest.mark.parametrize("field", ["quantization_args", "lora_args", "moe_args", "vision_args", "nope_layer_interval"])
def test_meta_params_that_do_not_run_are_refused_by_name(field: str) -> None:
    with pytest.raises(UnusableInput, match=field):
        ModelConfig.from_meta({**META_PARAMS["Llama-3.2-1B"], field: {"group_size": 32}}, "m")


JSON_VALUES = st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=5) | st.just([1])


@given(st.sampled_from(sorted(HF)), JSON_VALUES)
def test_any_value_in_config_json_gives_a_model_or_a_sentence(field: str, value: Any) -> None:
    with contextlib.suppress(UnusableInput):
        ModelConfig.from_hf({**HF, field: value}, "m")


@given(st.sampled_from(sorted(META_PARAMS["Llama-3.2-1B"])), JSON_VALUES)
@example("ffn_dim_multiplier", 1e308)
@example("rope_theta", 10**400)
def test_any_value_in_params_json_gives_a_model_or_a_sentence(field: str, value: Any) -> None:
    with contextlib.suppress(UnusableInput):
        ModelConfig.from_meta({**META_PARAMS["Llama-3.2-1B"], field: value}, "m", vocab_size=1)


POSITIVE = st.integers(1, 10**6)
FACTORS = st.floats(1e-6, 1e9)
SCALINGS = st.builds(
    RopeScaling,
    st.sampled_from(["linear", "llama3"]),
    FACTORS,
    st.floats(0.1, 1),
    st.floats(2, 100),
    original_max_position=POSITIVE,
)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 16))
    return ModelConfig(
        name=draw(st.text(max_size=10)),
        dim=draw(POSITIVE),
        n_layers=draw(st.integers(1, MOST_LAYERS)),
        n_heads=kv_heads * draw(st.integers(1, 16)),
        n_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        ffn_dim=draw(POSITIVE),
        vocab_size=draw(POSITIVE),
        norm_eps=draw(FACTORS),
        rope_theta=draw(FACTORS),
        rope_scaling=draw(st.none() | SCALINGS),
        max_position=draw(POSITIVE),
        tied_embeddings=draw(st.booleans()),
    )


@given(configs())
def test_a_config_survives_json_exactly(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_a_description_without_a_field_is_refused(field: str) -> None:
    described = PRESETS["Llama-3.1-8B"].to_json()
    del described[field]
    with pytest.raises(UnusableInput, match=f"lacks fields: {field}"):
        ModelConfig.from_json(described)


def test_a_description_with_foreign_fields_is_refused() -> None:
    described = PRESETS["Llama-3.1-8B"].to_json()
    with pytest.raises(UnusableInput, match="unknown fields: experts"):
        ModelConfig.from_json({**described, "experts": 8})
    with pytest.raises(UnusableInput, match="lacks fields: factor"):
        ModelConfig.from_json({**described, "rope_scaling": {"kind": "linear"}})
    with pytest.raises(UnusableInput, match="rope_scaling"):
        ModelConfig.from_json({**described, "rope_scaling": 3})
