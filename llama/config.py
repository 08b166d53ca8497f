"""ModelConfig: the shape of a LLaMA, from params.json, from config.json, or by a known model's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llama import names
from llama.fields import Fields, number, whole
from llama.rope import RopeScaling, hf_rope, meta_rope
from wsm.errors import UnusableInput

MOST_LAYERS = 10_000
"""No model has a hundredth of them; more would take all memory before a file could disprove them."""


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
        for field in ("dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_position"):
            whole(getattr(self, field), f"{self.name}: {field}")
        whole(self.n_layers, f"{self.name}: n_layers", MOST_LAYERS)
        if self.n_heads % self.n_kv_heads:
            raise UnusableInput(f"{self.name}: {self.n_heads} heads cannot share {self.n_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise UnusableInput(f"{self.name}: head_dim must be even for RoPE, not {self.head_dim}")
        if self.rope_scaling is not None and len(self.rope_scaling.factors) not in (0, self.head_dim // 2):
            raise UnusableInput(
                f"{self.name}: {len(self.rope_scaling.factors)} factors of RoPE for {self.head_dim // 2} frequencies"
            )
        for field in ("norm_eps", "rope_theta"):
            number(getattr(self, field), f"{self.name}: {field}")

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], name: str, *, vocab_size: int | None = None) -> ModelConfig:
        """From Meta's ``params.json``; ``vocab_size`` (from the embedding) counts where the file gives none.

        UnusableInput for a missing field, or a model that is not a plain LLaMA.
        """
        fields = Fields(params, f"{name}/params.json")
        for field in _META_FOREIGN:
            if params.get(field) not in (None, False, 0, -1, {}, []):
                raise UnusableInput(
                    f"{fields.file} sets {field}: quantised, LoRA, mixture-of-experts, vision and Llama 4 models do "
                    "not run here; take the plain text model in bfloat16"
                )
        dim, n_heads = fields.whole("dim"), fields.whole("n_heads")
        vocab = vocab_size if params.get("vocab_size") in (None, -1) else params["vocab_size"]
        if vocab is None:
            raise UnusableInput(f"{fields.file} gives no vocab_size and no embedding was found to take it from")
        rope = meta_rope(fields)
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
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            max_position=131072 if rope.scaling else unscaled,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str) -> ModelConfig:
        """From a Hugging Face ``config.json`` of ``LlamaForCausalLM``.

        UnusableInput for a missing field, another architecture, or a feature that does not run here, by name.
        """
        fields = Fields(config, f"{name}/config.json")
        _refuse_hf(fields)
        dim, n_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
        max_position = fields.whole("max_position_embeddings", 2048)
        rope = hf_rope(fields, max_position)
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
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            max_position=max_position,
            tied_embeddings=fields.flag("tie_word_embeddings"),
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

    def with_layers(self, count: int) -> ModelConfig:
        return dataclasses.replace(self, n_layers=count)

    def to_json(self) -> dict[str, Any]:
        """All fields, for a manifest; ``factors`` of RoPE only where there are any, as older versions have it."""
        fields = dataclasses.asdict(self)
        if self.rope_scaling is not None and not self.rope_scaling.factors:
            del fields["rope_scaling"]["factors"]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_json`; UnusableInput for a missing or foreign field, or values of no LLaMA."""
        _same_fields(cls, fields)
        scaling = fields["rope_scaling"]
        if scaling is None:
            return cls(**fields)
        if not isinstance(scaling, Mapping):
            raise UnusableInput(f"a model description has a rope_scaling that is no object: {scaling!r:.60}")
        scaling = {"factors": (), **scaling}
        _same_fields(RopeScaling, scaling)
        if not isinstance(scaling["factors"], list | tuple):
            raise UnusableInput(f"a model description has factors of RoPE that are no list: {scaling['factors']!r:.60}")
        scaling["factors"] = tuple(scaling["factors"])
        return cls(**{**fields, "rope_scaling": RopeScaling(**scaling)})


def _same_fields(cls: type[ModelConfig] | type[RopeScaling], found: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(found) - known):
        raise UnusableInput(f"a model description has unknown fields: {', '.join(unknown)}")
    if missing := sorted(known - set(found)):
        raise UnusableInput(f"a model description lacks fields: {', '.join(missing)}")


_SHARED = {"n_heads": "heads", "n_kv_heads": "KV heads", "ffn_dim": "feed-forward width", "vocab_size": "vocabulary"}
"""What ranks share evenly."""
_META_FOREIGN = (
    *("quantization_args", "lora_args", "moe_args", "vision_chunk_size", "vision_args"),
    *("nope_layer_interval", "use_qk_norm", "attention_chunk_size", "attn_temperature_tuning"),
)


def _meta_ffn_dim(dim: int, multiple_of: int, multiplier: float) -> int:
    """Meta's rule: two thirds of 4·dim, times the multiplier, rounded up to ``multiple_of``."""
    hidden = int(multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _refuse_hf(fields: Fields) -> None:
    config = fields.values
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures is not None and not isinstance(architectures, list):
        raise UnusableInput(f"{fields.file}: field architectures must be a list of names, not {architectures!r:.60}")
    if architectures not in (None, [], ["LlamaForCausalLM"]):
        named = ", ".join(map(str, architectures))
        raise UnusableInput(f"{fields.file}: architecture {named:.60} does not run here; LlamaForCausalLM does")
    if model_type not in (None, "llama"):
        raise UnusableInput(f"{fields.file}: model_type {model_type!r:.60} does not run here; 'llama' does")
    if not architectures and not model_type:
        raise UnusableInput(f"{fields.file} names neither architectures nor model_type: it is no model's config.json")
    if config.get("quantization"):
        raise UnusableInput(
            f"{fields.file} sets quantization: a model quantised for MLX, which does not run here; take the same model "
            "in bfloat16 or float16 weights, or quantised by AWQ, GPTQ, compressed-tensors or fp8"
        )
    features = "attention_bias mlp_bias sliding_window"
    experts = "num_local_experts num_experts n_routed_experts"
    for field in (*features.split(), *experts.split()):
        if config.get(field):
            raise UnusableInput(
                f"{fields.file} sets {field}, which does not run here; plain LLaMA models in float weights do"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise UnusableInput(f"{fields.file}: activation {config['hidden_act']!r:.60} does not run here; silu does")


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
