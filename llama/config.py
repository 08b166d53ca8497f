"""ModelConfig: the shape of a LLaMA, from params.json, from config.json, or by a known model's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from llama import names
from wsm.errors import UnusableInput


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
            raise UnusableInput(f"RoPE scaling of type {self.kind!r} does not run here; linear and llama3 do")
        factors = (self.factor, self.low_freq_factor, self.high_freq_factor)
        if not all(map(_is_positive, (*factors, self.original_max_position))) or factors[2] <= factors[1]:
            raise UnusableInput(f"RoPE scaling with impossible factors: {self}")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that a LLaMA's shapes and its arithmetic depend on; raises UnusableInput for sizes that make no LLaMA."""

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

    embedding: ClassVar[str] = names.EMBEDDING
    fused: ClassVar[tuple[str, ...]] = names.QKV
    specs = names.tensor_specs
    full_name = staticmethod(names.full_name)

    def __post_init__(self) -> None:
        for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_position"):
            _whole(getattr(self, field), f"{self.name}: {field}")
        if self.n_heads % self.n_kv_heads:
            raise UnusableInput(f"{self.name}: {self.n_heads} heads cannot share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise UnusableInput(f"{self.name}: head_dim must be even for RoPE, not {self.head_dim}")
        for field in ("norm_eps", "rope_theta"):
            _number(getattr(self, field), f"{self.name}: {field}")

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], name: str, *, vocab_size: int | None = None) -> ModelConfig:
        """From Meta's ``params.json``; ``vocab_size`` (from the embedding) counts where the file gives none.

        UnusableInput for a missing field, or a model that is not a plain LLaMA.
        """
        fields = _Fields(params, f"{name}/params.json")
        for field in ("quantization_args", "lora_args", "moe_args", "vision_chunk_size"):
            if params.get(field):
                raise UnusableInput(
                    f"{fields.file} sets {field}: quantised, LoRA, mixture-of-experts and vision models do not run "
                    "here; take the plain text model in bfloat16"
                )
        dim, n_heads = fields.whole("dim"), fields.whole("n_heads")
        vocab = vocab_size if params.get("vocab_size") in (None, -1) else params["vocab_size"]
        if vocab is None:
            raise UnusableInput(f"{fields.file} gives no vocab_size and no embedding was found to take it from")
        scaled = params.get("use_scaled_rope")
        scaling = RopeScaling("llama3", fields.number("rope_scaling_factor", 8.0)) if scaled else None
        # LLaMA 2 was trained on 4096 positions and names no rope_theta; LLaMA 3 on 8192 and does.
        unscaled = 8192 if params.get("rope_theta") else 4096
        return cls(
            name=name,
            dim=dim,
            n_layers=fields.whole("n_layers"),
            n_heads=n_heads,
            n_kv_heads=fields.whole("n_kv_heads", n_heads),
            head_dim=fields.whole("head_dim", dim // n_heads),
            ffn_dim=_meta_ffn_dim(dim, fields.whole("multiple_of", 256), fields.number("ffn_dim_multiplier", 1.0)),
            vocab_size=vocab,
            norm_eps=fields.number("norm_eps", 1e-5),
            rope_theta=fields.number("rope_theta", 10000.0),
            rope_scaling=scaling,
            max_position=131072 if scaling else unscaled,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str) -> ModelConfig:
        """From a Hugging Face ``config.json`` of ``LlamaForCausalLM``.

        UnusableInput for a missing field, another architecture, or a feature that does not run here, by name.
        """
        fields = _Fields(config, f"{name}/config.json")
        _refuse_hf(fields)
        dim, n_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
        max_position = fields.whole("max_position_embeddings", 2048)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise UnusableInput(f"{fields.file}: RoPE parameters must be an object, not {rope!r}")
        rope_fields = _Fields(rope, f"{fields.file} (RoPE)")
        return cls(
            name=name,
            dim=dim,
            n_layers=fields.whole("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=fields.whole("num_key_value_heads", n_heads),
            head_dim=fields.whole("head_dim", dim // n_heads),
            ffn_dim=fields.whole("intermediate_size"),
            vocab_size=fields.whole("vocab_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_fields.number("rope_theta", fields.number("rope_theta", 10000.0)),
            rope_scaling=_hf_rope_scaling(rope_fields, max_position),
            max_position=max_position,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    def share(self, ranks: int) -> ModelConfig:
        """The shape of one of ``ranks`` equal shares; UnusableInput, with the numbers that can be, if it has none."""
        counts = {field: getattr(self, field) for field in _SHARED}
        for field, count in counts.items():
            if count % ranks:
                divisors = range(1, min(counts.values()) + 1)
                possible = [str(n) for n in divisors if not any(count % n for count in counts.values())]
                raise UnusableInput(
                    f"{self.name} cannot be cut for {ranks} ranks, its {_SHARED[field]} being {count}: start it with "
                    f"torchrun --nproc-per-node {' or '.join(possible)}"
                )
        return dataclasses.replace(self, **{field: count // ranks for field, count in counts.items()})

    def to_json(self) -> dict[str, Any]:
        """All fields, for a manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_json`; UnusableInput for a missing or foreign field, or values of no LLaMA."""
        _same_fields(cls, fields)
        scaling = fields["rope_scaling"]
        if scaling is None:
            return cls(**fields)
        if not isinstance(scaling, Mapping):
            raise UnusableInput(f"a model description has a rope_scaling that is no object: {scaling!r}")
        _same_fields(RopeScaling, scaling)
        return cls(**{**fields, "rope_scaling": RopeScaling(**scaling)})


def _same_fields(cls: type[ModelConfig] | type[RopeScaling], found: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(found) - known):
        raise UnusableInput(f"a model description has unknown fields: {', '.join(unknown)}")
    if missing := sorted(known - set(found)):
        raise UnusableInput(f"a model description lacks fields: {', '.join(missing)}")


_SHARED = {"n_heads": "heads", "n_kv_heads": "KV heads", "ffn_dim": "feed-forward width", "vocab_size": "vocabulary"}
"""What ranks share evenly."""
_BEYOND_ANY_MODEL = 1e15  # so products of two fields stay finite


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _BEYOND_ANY_MODEL


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnusableInput(f"{what} must be a whole number above 0, not {value!r}")
    return value


def _number(value: Any, what: str) -> float:
    if not _is_positive(value):
        raise UnusableInput(f"{what} must be a number above 0, not {value!r}")
    return float(value)


class _Fields(NamedTuple):
    """Typed reading of a checkpoint's JSON; a field that is absent or null takes its default, if it has one."""

    values: Mapping[str, Any]
    file: str

    def whole(self, field: str, default: int | None = None) -> int:
        return _whole(self._value(field, default), f"{self.file}: field {field}")

    def number(self, field: str, default: float | None = None) -> float:
        return _number(self._value(field, default), f"{self.file}: field {field}")

    def _value(self, field: str, default: float | None) -> Any:
        value = self.values.get(field)
        value = default if value is None else value
        if value is None:
            raise UnusableInput(
                f"{self.file}: field {field} is missing; take the file from the original checkpoint again"
            )
        return value


def _meta_ffn_dim(dim: int, multiple_of: int, multiplier: float) -> int:
    """Meta's rule: two thirds of 4·dim, times the multiplier, rounded up to ``multiple_of``."""
    hidden = int(multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _refuse_hf(fields: _Fields) -> None:
    config = fields.values
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures not in (None, [], ["LlamaForCausalLM"]) or model_type not in (None, "llama"):
        named = architectures if isinstance(architectures, list) and architectures else [model_type]
        raise UnusableInput(
            f"{fields.file}: architecture {', '.join(map(str, named))} does not run here; LlamaForCausalLM does"
        )
    if not architectures and not model_type:
        raise UnusableInput(f"{fields.file} names neither architectures nor model_type: it is no model's config.json")
    features = "attention_bias mlp_bias quantization_config compression_config sliding_window"
    experts = "num_local_experts num_experts n_routed_experts"
    for field in (*features.split(), *experts.split()):
        if config.get(field):
            raise UnusableInput(
                f"{fields.file} sets {field}, which does not run here; plain LLaMA models in float weights do"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise UnusableInput(f"{fields.file}: activation {config['hidden_act']!r} does not run here; silu does")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnusableInput(f"{fields.file} sets partial_rotary_factor, which does not run here; full RoPE does")


def _hf_rope_scaling(rope: _Fields, max_position: int) -> RopeScaling | None:
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UnusableInput(f"{rope.file}: scaling of type {kind!r} does not run here; default, linear and llama3 do")
    return RopeScaling(
        kind,
        rope.number("factor"),
        rope.number("low_freq_factor", 1.0),
        rope.number("high_freq_factor", 4.0),
        rope.whole("original_max_position_embeddings", max_position),
    )


def _llama2(name: str, dim: int, layers: int, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    return ModelConfig(
        name, dim, layers, heads, kv_heads, dim // heads, ffn, 32000, rope_theta=10000.0, max_position=4096
    )


def _llama3(
    name: str, dim: int, layers: int, heads: int, ffn: int, factor: float = 0, tied: bool = False
) -> ModelConfig:
    """``factor``: of RoPE scaling; 0 for none."""
    config = ModelConfig(name, dim, layers, heads, 8, dim // heads, ffn, 128256, tied_embeddings=tied)
    scaling, longest = (RopeScaling("llama3", factor), 131072) if factor else (None, 8192)
    return dataclasses.replace(config, rope_scaling=scaling, max_position=longest)


PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        _llama2("Llama-2-7B", 4096, 32, 32, 32, 11008),
        _llama2("Llama-2-13B", 5120, 40, 40, 40, 13824),
        _llama2("Llama-2-70B", 8192, 80, 64, 8, 28672),
        _llama3("Llama-3-8B", 4096, 32, 32, 14336),
        _llama3("Llama-3-70B", 8192, 80, 64, 28672),
        _llama3("Llama-3.1-8B", 4096, 32, 32, 14336, factor=8),
        _llama3("Llama-3.1-70B", 8192, 80, 64, 28672, factor=8),
        _llama3("Llama-3.1-405B", 16384, 126, 128, 53248, factor=8),
        _llama3("Llama-3.2-1B", 2048, 16, 32, 8192, factor=32, tied=True),
        _llama3("Llama-3.2-3B", 3072, 28, 24, 8192, factor=32, tied=True),
        _llama3("Llama-3.3-70B", 8192, 80, 64, 28672, factor=8),
    )
}
"""Shapes of published models, for ``--synthetic``."""
