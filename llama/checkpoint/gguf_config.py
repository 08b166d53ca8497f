"""A model's shape from a GGUF file's metadata: what changes a number is read, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama.config import ModelConfig
from llama.fields import Fields
from llama.rope import Rope, RopeScaling
from wsm.errors import UnusableInput

ARCHITECTURE = "llama"
_READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.freq_base"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear", "tensor_data_layout"),
)
"""Behind ``llama.``: what is read here, or tells nothing that the tensors do not."""
_FOREIGN = (
    *("expert_count", "expert_used_count", "attention.sliding_window", "attention.scale", "attention.clamp_kqv"),
    *("attention.max_alibi_bias", "use_parallel_residual", "final_logit_softcapping", "attn_logit_softcapping"),
    "rope.scaling.yarn_log_multiplier",
)
_FACTORS = ("logit_scale", "residual_scale", "embedding_scale", "rope.scaling.attn_factor")
"""What would change a result, but for 0 or, of factors, 1."""


def gguf_config(
    metadata: Mapping[str, Any],
    file: str,
    name: str,
    *,
    vocab_size: int | None,
    tied: bool,
    rope_factors: Sequence[float] | None,
) -> ModelConfig:
    """From ``general.*`` and ``llama.*``; ``vocab_size`` (of the embedding) counts where the metadata gives none.

    ``rope_factors``: of the tensor ``rope_freqs.weight``, where there is one. UnusableInput for another architecture,
    a missing field, or what does not run here.
    """
    _refuse_foreign(metadata, file)
    fields = Fields({key.removeprefix("llama."): value for key, value in metadata.items()}, f"{file}: metadata")
    dim, heads = fields.whole("embedding_length"), fields.whole("attention.head_count")
    head_dim = fields.whole("attention.key_length", dim // heads)
    for field in ("attention.value_length", "rope.dimension_count"):
        if (found := fields.whole(field, head_dim)) != head_dim:
            raise UnusableInput(
                f"{file}: llama.{field} is {found}, the heads are {head_dim} wide; only heads that are rotated whole, "
                "with keys as wide as values, run here"
            )
    rope = _rope(fields, rope_factors)
    return ModelConfig(
        name=name,
        dim=dim,
        n_layers=fields.whole("block_count"),
        n_heads=heads,
        n_kv_heads=fields.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=fields.whole("feed_forward_length"),
        vocab_size=fields.whole("vocab_size", vocab_size),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        max_position=fields.whole("context_length"),
        tied_embeddings=tied,
    )


def unknown_fields(metadata: Mapping[str, Any], file: str) -> str | None:
    """The warning where the metadata says something of the model that is not known here."""
    unknown = [key for key in metadata if key.startswith("llama.") and key.removeprefix("llama.") not in _READ]
    if not (unknown := [key for key in unknown if key.removeprefix("llama.") not in (*_FOREIGN, *_FACTORS)]):
        return None
    return f"{file}: {', '.join(unknown)[:200]} is not known here and has no effect"


def refuse_named(metadata: Mapping[str, Any], file: str) -> None:
    """UnusableInput where the metadata names what does not run here; a part of a split model may name nothing."""
    if "general.architecture" in metadata:
        _refuse_foreign(metadata, file)


def _refuse_foreign(metadata: Mapping[str, Any], file: str) -> None:
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        raise UnusableInput(f"{file} holds no model but a {kind!r:.40}; merge an adapter into its base model first")
    if architecture != ARCHITECTURE:
        named = f"architecture {architecture!r:.40}" if architecture is not None else "a model without an architecture"
        raise UnusableInput(f"{file} holds {named}, which does not run here; {ARCHITECTURE!r} does")
    if metadata.get("llama.expert_count") not in (None, 0):
        raise UnusableInput(f"{file} holds a mixture of experts (llama.expert_count), which does not run here")
    if metadata.get("llama.attention.causal") not in (None, True):
        raise UnusableInput(f"{file}: llama.attention.causal is not set: only causal models run here")
    for field in (*_FOREIGN, *_FACTORS):
        if metadata.get(f"llama.{field}") not in (None, 0, 1 if field in _FACTORS else 0):
            raise UnusableInput(f"{file} sets llama.{field}, which no plain LLaMA has, and which does not run here")


def _rope(fields: Fields, factors: Sequence[float] | None) -> Rope:
    """As llama.cpp has it: one factor for all frequencies, also where no type is named, or a tensor with a divisor for
    each."""
    theta = fields.number("rope.freq_base", 10000.0)
    kind = fields.values.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise UnusableInput(
            f"{fields.file}: RoPE scaling of type {kind!r:.40} does not run here; none, linear and the factors of the "
            "tensor rope_freqs.weight do"
        )
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    linear = kind == "linear" and factor != 1.0
    if factors is None:
        return Rope(theta, RopeScaling("linear", factor) if linear else None)
    if linear:
        raise UnusableInput(f"{fields.file} scales RoPE twice, by llama.rope.scaling and by rope_freqs.weight")
    return Rope(theta, RopeScaling("factors", 1.0, factors=tuple(factors)))
