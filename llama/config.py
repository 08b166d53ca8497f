"""ModelConfig: the shape of a LLaMA, from params.json, from config.json, or by a known model's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnusableInput(ValueError):
    """A flag, variable, prompt, checkpoint or manifest that cannot be used (exit code 2)."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the original context.

    ``linear`` divides every frequency by ``factor``; ``llama3`` divides the low ones only (Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise UnusableInput(f"RoPE scaling of type {self.kind!r} is not supported; linear and llama3 are")
        if self.factor <= 0 or self.high_freq_factor <= self.low_freq_factor:
            raise UnusableInput(f"RoPE scaling with impossible factors: {self}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about a LLaMA that its weights' shapes and its arithmetic depend on."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 8192
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_position"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnusableInput(f"{self.name}: {field} must be a whole number above 0, not {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise UnusableInput(f"{self.name}: {self.n_heads} heads cannot share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise UnusableInput(f"{self.name}: head_dim must be even for RoPE, not {self.head_dim}")
        if not (self.norm_eps > 0 and self.rope_theta > 0):
            raise UnusableInput(f"{self.name}: norm_eps and rope_theta must be above 0")

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], name: str, *, vocab_size: int | None = None) -> ModelConfig:
        """From Meta's ``params.json``; ``vocab_size`` (from the embedding) counts where the file gives none.

        Raises:
            UnusableInput: for a missing field, or a model that is not a plain LLaMA.
        """
        for field in ("quantization_args", "lora_args", "moe_args", "vision_chunk_size"):
            if params.get(field):
                raise UnusableInput(
                    f"{name}: params.json has {field}: only plain LLaMA text models in float weights run here"
                )
        dim, n_heads = _need(params, "dim", name), _need(params, "n_heads", name)
        vocab = params.get("vocab_size", -1)
        if vocab is None or int(vocab) <= 0:
            vocab = vocab_size
        if vocab is None:
            raise UnusableInput(f"{name}: params.json gives no vocab_size and no embedding was found to take it from")
        scaling = None
        if params.get("use_scaled_rope"):
            scaling = RopeScaling("llama3", float(params.get("rope_scaling_factor", 8.0)))
        head_dim = params.get("head_dim") or dim // n_heads
        return cls(
            name=name,
            dim=dim,
            n_layers=_need(params, "n_layers", name),
            n_heads=n_heads,
            n_kv_heads=int(params.get("n_kv_heads") or n_heads),
            head_dim=int(head_dim),
            ffn_dim=_meta_ffn_dim(dim, int(params.get("multiple_of", 256)), params.get("ffn_dim_multiplier")),
            vocab_size=int(vocab),
            norm_eps=float(params.get("norm_eps", 1e-5)),
            rope_theta=float(params.get("rope_theta", 10000.0)),
            rope_scaling=scaling,
            max_position=131072 if scaling else 8192,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str) -> ModelConfig:
        """From a Hugging Face ``config.json`` of ``LlamaForCausalLM``.

        Raises:
            UnusableInput: for a missing field, another architecture, or a feature that does not run here, by name.
        """
        _refuse_hf(config, name)
        dim, n_heads = _need(config, "hidden_size", name), _need(config, "num_attention_heads", name)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        max_position = int(config.get("max_position_embeddings", 2048))
        return cls(
            name=name,
            dim=dim,
            n_layers=_need(config, "num_hidden_layers", name),
            n_heads=n_heads,
            n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
            head_dim=int(config.get("head_dim") or dim // n_heads),
            ffn_dim=_need(config, "intermediate_size", name),
            vocab_size=_need(config, "vocab_size", name),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_hf_rope_scaling(rope, max_position, name),
            max_position=max_position,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, for a manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_json`."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise UnusableInput(f"a model description has unknown fields: {', '.join(unknown)}")
        values = dict(fields)
        try:
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            return cls(**values)
        except TypeError as error:
            raise UnusableInput(f"a model description lacks fields: {error}") from error


def _need(fields: Mapping[str, Any], field: str, name: str) -> int:
    value = fields.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = "is missing" if value is None else f"must be a whole number above 0, not {value!r}"
        raise UnusableInput(f"{name}: field {field} {said}; take the file from the original checkpoint again")
    return value


def _meta_ffn_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: two thirds of 4·dim, times the multiplier, rounded up to ``multiple_of``."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _refuse_hf(config: Mapping[str, Any], name: str) -> None:
    architectures = config.get("architectures") or []
    if (architectures and architectures != ["LlamaForCausalLM"]) or config.get("model_type", "llama") != "llama":
        found = ", ".join(architectures) or config.get("model_type")
        raise UnusableInput(f"{name}: architecture {found} does not run here; LlamaForCausalLM does")
    for field in ("attention_bias", "mlp_bias", "quantization_config", "sliding_window", "num_local_experts"):
        if config.get(field):
            raise UnusableInput(
                f"{name}: config.json sets {field}, which does not run here; plain LLaMA float weights do"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise UnusableInput(f"{name}: activation {config['hidden_act']!r} does not run here; silu does")


def _hf_rope_scaling(rope: Mapping[str, Any], max_position: int, name: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UnusableInput(f"{name}: RoPE scaling of type {kind!r} does not run here; linear and llama3 do")
    try:
        return RopeScaling(
            kind,
            float(rope["factor"]),
            float(rope.get("low_freq_factor", 1.0)),
            float(rope.get("high_freq_factor", 4.0)),
            int(rope.get("original_max_position_embeddings") or max_position),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableInput(f"{name}: RoPE scaling is incomplete: {error}") from error


def _llama3(name: str, dim: int, layers: int, heads: int, ffn: int, **more: Any) -> ModelConfig:
    fields: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256, "head_dim": dim // heads, **more}
    return ModelConfig(name=name, dim=dim, n_layers=layers, n_heads=heads, ffn_dim=ffn, **fields)


def _llama2(name: str, dim: int, layers: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(
        name, dim, layers, heads, kv_heads, dim // heads, ffn, 32000, rope_theta=10000.0, max_position=4096
    )


_SCALED_8: dict[str, Any] = {"rope_scaling": RopeScaling("llama3", 8.0), "max_position": 131072}
_SCALED_32: dict[str, Any] = {
    "rope_scaling": RopeScaling("llama3", 32.0),
    "max_position": 131072,
    "tied_embeddings": True,
}

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _llama2("Llama-2-7B", 4096, 32, 32, 32, 11008),
        _llama2("Llama-2-13B", 5120, 40, 40, 40, 13824),
        _llama2("Llama-2-70B", 8192, 80, 64, 8, 28672),
        _llama3("Llama-3-8B", 4096, 32, 32, 14336),
        _llama3("Llama-3-70B", 8192, 80, 64, 28672),
        _llama3("Llama-3.1-8B", 4096, 32, 32, 14336, **_SCALED_8),
        _llama3("Llama-3.1-70B", 8192, 80, 64, 28672, **_SCALED_8),
        _llama3("Llama-3.1-405B", 16384, 126, 128, 53248, **_SCALED_8),
        _llama3("Llama-3.2-1B", 2048, 16, 32, 8192, **_SCALED_32),
        _llama3("Llama-3.2-3B", 3072, 28, 24, 8192, **_SCALED_32),
        _llama3("Llama-3.3-70B", 8192, 80, 64, 28672, **_SCALED_8),
    )
}
"""Shapes of published models, for ``--synthetic``."""
