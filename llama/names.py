"""Which tensors a LLaMA has: their names and shapes, in Meta's terms."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import starmap
from typing import NamedTuple

from wsm.layout.groups import GroupId, Kind, TensorSpec
from wsm.layout.model import ModelShape

EMBEDDING = "tok_embeddings"
QKV = ("wq", "wk", "wv")
"""Stored one behind the other: one matrix, and one product with it."""
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
    shapes: dict[str, tuple[int, ...]]
    if kind is None:
        shapes = {EMBEDDING: (shape.vocab_size, dim), "norm": (dim,)}
        if not shape.tied_embeddings:
            shapes["output"] = (shape.vocab_size, dim)
    elif kind == "attn":
        shapes = {"attention_norm": (dim,), "wq": (q_dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim)}
        shapes["wo"] = (dim, q_dim)
    else:
        ffn_dim = shape.ffn_dim
        shapes = {"ffn_norm": (dim,), "w1": (ffn_dim, dim), "w2": (dim, ffn_dim), "w3": (ffn_dim, dim)}
    return tuple(starmap(TensorSpec, shapes.items()))


_PREFIX = dict.fromkeys((*QKV, "wo"), "attention.") | dict.fromkeys(("w1", "w2", "w3"), "feed_forward.")


def full_name(group: GroupId | None, short: str) -> str:
    """Meta's name of a tensor: ``layers.3.attention.wq.weight``; ``group`` is None for the globals."""
    if group is None:
        return f"{short}.weight"
    return f"layers.{group.layer}.{_PREFIX.get(short, '')}{short}.weight"


def renamed(name: str, names: Mapping[str, str], layers: str) -> str:
    """One of Meta's names as others write it: ``names`` has theirs, without prefix and ``.weight``, by Meta's."""
    short = name.removesuffix(".weight")
    if short in names:
        return f"{names[short]}.weight"
    _, layer, rest = short.split(".", 2)
    return f"{layers}.{layer}.{names[rest]}.weight"
