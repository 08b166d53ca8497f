"""Which tensors a LLaMA has: their names and shapes, in Meta's terms."""

from __future__ import annotations

from typing import NamedTuple

from wsm.layout.groups import GroupId, Kind, TensorSpec
from wsm.layout.model import ModelShape

EMBEDDING = "tok_embeddings"
QKV = ("wq", "wk", "wv")
"""Stored one behind the other, so that they are one product of one matrix."""


BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
"""The matrices that are cut by columns where a model is cut in shards or ranks; all others are cut by rows."""


class Cut(NamedTuple):
    """A part of a matrix: ``rows`` and ``columns`` from ``row`` and ``column`` on. A vector is a matrix of one row."""

    row: int
    column: int
    rows: int
    columns: int


def tensor_specs(shape: ModelShape, kind: Kind | None) -> tuple[TensorSpec, ...]:
    """The tensors of a group of ``kind`` in the order in which they are stored.

    None is for the globals: embedding, final norm and, unless it is tied to the embedding, the head.
    """
    dim, q_dim, kv_dim = shape.dim, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    if kind is None:
        head = () if shape.tied_embeddings else (TensorSpec("output", (shape.vocab_size, dim)),)
        return TensorSpec(EMBEDDING, (shape.vocab_size, dim)), TensorSpec("norm", (dim,)), *head
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
        TensorSpec("w1", (shape.ffn_dim, dim)),
        TensorSpec("w2", (dim, shape.ffn_dim)),
        TensorSpec("w3", (shape.ffn_dim, dim)),
    )


_PREFIX = {"wq": "attention.", "wk": "attention.", "wv": "attention.", "wo": "attention."} | dict.fromkeys(
    ("w1", "w2", "w3"), "feed_forward."
)


def full_name(group: GroupId | None, short: str) -> str:
    """Meta's name of a tensor: ``layers.3.attention.wq.weight``; ``group`` is None for the globals."""
    if group is None:
        return f"{short}.weight"
    return f"layers.{group.layer}.{_PREFIX.get(short, '')}{short}.weight"
