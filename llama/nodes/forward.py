"""A pass over nodes: several tokens a row, each with the bits that it would have in any other tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.fused.ops import gate_, rotate_
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.names import QKV
from llama.nodes.attention import attend_nodes
from llama.nodes.tree import NodeBatch
from llama.products import Acquire, Products, Residual
from wsm import stop
from wsm.layout.groups import GroupId, round_up
from wsm.plan.inputs import ALIKE_ROWS


class _Stretch(NamedTuple):
    """The nodes of the rows whose KV is one window."""

    number: int
    rows: slice
    batch: NodeBatch  # of these rows
    places: Tensor  # int64 [B * M]: rows of the window
    columns: Tensor  # int64 [B * M]


def node_logits(model: Transformer, batch: NodeBatch, kv: KVCache) -> Tensor:
    """float32 ``[B, M, vocab]`` after every node; the KV of the first B rows gets theirs, and does not grow by it.

    All nodes are computed at once. The host never waits for the device in it, and nothing is uploaded.
    """
    rows, nodes = batch.tokens.shape
    kv.begin_nodes(rows, nodes)
    h = node_layers(model, batch, kv, model.groups.acquire)
    return model.head(h, h.shape[0])[: rows * nodes].view(rows, nodes, -1)


def node_layers(model: Transformer, batch: NodeBatch, kv: KVCache, acquire: Acquire) -> Tensor:
    """The residual behind the last layer, ``[B * M, dim]``, then rows that only fill up a multiple."""
    count = batch.tokens.numel()
    padding = (0, round_up(count, ALIKE_ROWS) - count)
    h = Residual(model.embed(F.pad(batch.tokens.flatten(), padding)))
    freqs_cis = model.freqs_cis[F.pad(batch.positions.flatten(), padding)].unsqueeze(1)
    stretches = _stretches(batch, kv)
    for layer in range(model.config.n_layers):
        stop.check()
        with acquire(GroupId(layer, "attn")) as w:
            _attention_(model, h, w, freqs_cis, stretches, kv, layer)
        stop.check()
        with acquire(GroupId(layer, "ffn")) as w:
            _feed_forward_(h, w)
    return h.settled()


def _stretches(batch: NodeBatch, kv: KVCache) -> list[_Stretch]:
    rows, nodes = batch.tokens.shape
    found = []
    for number in range(-(-rows // kv.layout.stretch_rows)):
        own = kv.layout.rows_of(number)
        part = slice(own.start, min(own.stop, rows))
        inside = NodeBatch(*(tensor[part] for tensor in batch))
        places = torch.arange(part.stop - part.start, device=batch.tokens.device).repeat_interleave(nodes)
        found.append(_Stretch(number, part, inside, places, inside.columns.flatten()))
    return found


def _attention_(
    model: Transformer,
    h: Residual,
    w: Products,
    freqs_cis: Tensor,
    stretches: list[_Stretch],
    kv: KVCache,
    layer: int,
) -> None:
    """Add the nodes' attention to their residual; their keys and values go into the cache."""
    config = model.config
    heads = w.linear(w.norm(h, "attention_norm"), *QKV).unflatten(1, (-1, config.head_dim))
    outs = []
    for stretch in stretches:
        nodes = stretch.batch.tokens.shape[1]
        part = slice(stretch.rows.start * nodes, stretch.rows.stop * nodes)
        window, own = kv.enter(layer, stretch.number).data, heads[part]
        _rotate_and_write_(kv, window, stretch, own, config.n_heads, freqs_cis[part])
        keys, values = kv.record.read(window[: stretch.rows.stop - stretch.rows.start], kv.tokens)
        q = own[:, : config.n_heads].unflatten(0, (-1, nodes))
        outs.append(attend_nodes(q, keys, values, stretch.batch).flatten(0, 1).flatten(1))
        kv.leave(layer, stretch.number)
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if len(out) < len(heads):
        out = F.pad(out, (0, 0, 0, len(heads) - len(out)))
    w.add_linear_(h, out, "wo")


def _rotate_and_write_(
    kv: KVCache, window: Tensor, stretch: _Stretch, heads: Tensor, n_heads: int, freqs_cis: Tensor
) -> None:
    """Rotate queries and keys of ``heads [n, n_heads + 2 * n_kv_heads, head_dim]``; keys and values are written."""
    if heads.device.type != "cpu":
        kv.record.rotate_and_write_(window, stretch.places, stretch.columns, heads, n_heads, freqs_cis)
        return
    rotated = n_heads + window.shape[1]
    _row_by_row(lambda own, turns: rotate_(own, rotated, turns), heads, freqs_cis)
    kv.record.write_(window, stretch.places, stretch.columns, heads[:, n_heads:].unflatten(1, (2, -1)))


def _feed_forward_(h: Residual, w: Products) -> None:
    """Add the feed-forward block to the nodes' residual."""
    x = w.norm(h, "ffn_norm")
    gate = w.linear(x, "w1")  # [n, ffn_dim]
    _row_by_row(gate_, gate, w.linear(x, "w3"))
    w.add_linear_(h, gate, "w2")


def _row_by_row(change_: Callable[..., object], *tensors: Tensor) -> None:
    """Change the first of tensors ``[n, ...]`` in place.

    On the CPU row by row: what is left over at the end of a thread's share is computed by other instructions, which
    round exponentials and complex products otherwise. Sums, norms and softmax do not depend on the place.
    """
    if tensors[0].device.type != "cpu":
        change_(*tensors)
        return
    for row in range(tensors[0].shape[0]):
        change_(*(tensor[row : row + 1] for tensor in tensors))
