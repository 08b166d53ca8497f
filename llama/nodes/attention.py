"""Attention of nodes: each over its row's KV, so that its bits depend on nothing else.

Not on where the node stands among others, on what they are, on other rows, or on keys that it does not attend to. Its
scores are over all columns of the row, of which the whole blocks before the root's count, and over its window, whose
keys stand in the order of their positions. So keys are summed in the same order in a chain, in a tree and without.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama.nodes.tree import NodeBatch
from wsm.formats.backend import kernels_for
from wsm.layout.groups import round_up
from wsm.plan.inputs import ALIKE_ROWS


def attend_nodes(q: Tensor, keys: Tensor, values: Tensor, batch: NodeBatch) -> Tensor:
    """What nodes attend to, ``[B, M, n_heads, head_dim]``, the shape of ``q``.

    ``keys`` and ``values`` are ``[B, n_kv_heads, columns, head_dim]`` of the same dtype; the nodes' own are in them.
    """
    if kernels_for(q) is not None:
        from llama.nodes import kernels  # Triton is not everywhere

        return kernels.attend(q, keys, values, batch)
    return attend_by_hand(q, keys, values, batch)


def attend_by_hand(q: Tensor, keys: Tensor, values: Tensor, batch: NodeBatch) -> Tensor:
    """The same in torch alone, in float32."""
    q = q.unflatten(2, (keys.shape[1], -1))  # [B, M, n_kv_heads, n_rep, head_dim]
    out = torch.empty_like(q)
    beyond = torch.arange(keys.shape[2], device=q.device) >= batch.prefix.unsqueeze(1)  # [B, columns]
    for row, into in enumerate(out):
        wide = q[row].float() / math.sqrt(q.shape[-1])
        for head in range(keys.shape[1]):
            attended = _one_head(
                wide[:, head], keys[row, head].float(), values[row, head].float(), beyond[row], batch.window[row]
            )
            into[:, head] = attended
    return out.flatten(2, 3)


def _one_head(q: Tensor, keys: Tensor, values: Tensor, beyond: Tensor, window: Tensor) -> Tensor:
    """Of one row and KV head: ``q [M, n_rep, head_dim]``, ``keys`` and ``values [columns, head_dim]``."""
    nodes, n_rep, head_dim = q.shape
    in_block = window.clamp(min=0)
    near = torch.bmm(q, keys[in_block].transpose(1, 2)).masked_fill_((window < 0).unsqueeze(1), -math.inf)
    rows = torch.nn.functional.pad(q.flatten(0, 1), (0, 0, 0, round_up(nodes * n_rep, ALIKE_ROWS) - nodes * n_rep))
    far = (rows @ keys.t())[: nodes * n_rep].unflatten(0, (nodes, n_rep)).masked_fill_(beyond, -math.inf)
    weights = torch.cat((far, near), dim=-1).softmax(-1)
    before, inside = weights.split((far.shape[-1], near.shape[-1]), dim=-1)
    # What is masked counts nothing times its value, and nothing times NaN is NaN.
    values_before = values.masked_fill(beyond.unsqueeze(1), 0.0)
    rows = torch.nn.functional.pad(before.flatten(0, 1), (0, 0, 0, len(rows) - nodes * n_rep))
    out = (rows @ values_before)[: nodes * n_rep].view(nodes, n_rep, head_dim)
    return out + torch.bmm(inside.contiguous(), values[in_block])
