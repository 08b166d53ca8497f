"""Which tensors a LLaMA has: their names, shapes and groups, in Meta's terms."""

from __future__ import annotations

from typing import Literal, NamedTuple

from llama.config import ModelConfig

Kind = Literal["attn", "ffn"]
KINDS: tuple[Kind, ...] = ("attn", "ffn")


EMBEDDING = "tok_embeddings"
QKV = ("wq", "wk", "wv")
"""Stored one behind the other, so that they are one product of one matrix."""


BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
"""The matrices that are cut by columns where a model is cut in shards or ranks; all others are cut by rows."""


class Cut(NamedTuple):
    """A stretch of a matrix: ``length`` rows (axis 0) or columns (axis 1) from ``start`` on."""

    axis: int
    start: int
    length: int


class GroupId(NamedTuple):
    """The attn or the ffn weights of one layer, norm included: what is stored, moved and evicted as one."""

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"L{self.layer}.{self.kind}"


class TensorSpec(NamedTuple):
    """A tensor's short name inside its group, and its shape."""

    name: str
    shape: tuple[int, ...]


def group_specs(config: ModelConfig, kind: Kind) -> tuple[TensorSpec, ...]:
    """The tensors of a group of ``kind``, in the order in which they are stored."""
    dim, q_dim, kv_dim = config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if kind == "attn":
        return (
            TensorSpec("attention_norm", (dim,)),
            TensorSpec("wq", (q_dim, dim)),
            TensorSpec("wk", (kv_dim, dim)),
            TensorSpec("wv", (kv_dim, dim)),
            TensorSpec("wo", (dim, q_dim)),
        )
    return (
        TensorSpec("ffn_norm", (dim,)),
        TensorSpec("w1", (config.ffn_dim, dim)),
        TensorSpec("w2", (dim, config.ffn_dim)),
        TensorSpec("w3", (config.ffn_dim, dim)),
    )


def global_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Embedding, final norm and, unless it is tied to the embedding, the head."""
    embedding = TensorSpec(EMBEDDING, (config.vocab_size, config.dim))
    norm = TensorSpec("norm", (config.dim,))
    if config.tied_embeddings:
        return (embedding, norm)
    return (embedding, norm, TensorSpec("output", (config.vocab_size, config.dim)))


_PREFIX = {"wq": "attention.", "wk": "attention.", "wv": "attention.", "wo": "attention."} | dict.fromkeys(
    ("w1", "w2", "w3"), "feed_forward."
)


def full_name(group: GroupId | None, short: str) -> str:
    """Meta's name of a tensor: ``layers.3.attention.wq.weight``; ``group`` is None for the globals."""
    if group is None:
        return f"{short}.weight"
    return f"layers.{group.layer}.{_PREFIX.get(short, '')}{short}.weight"


def pass_order(n_layers: int) -> list[GroupId]:
    """The order in which a pass uses the groups: attn 0, ffn 0, attn 1, …"""
    return [GroupId(layer, kind) for layer in range(n_layers) for kind in KINDS]
