"""Which KV blocks a decode step fetches: those whose keys may score highest against the query (``--topk-blk``).

After Quest (Tang et al. 2024): for every block and KV head the elementwise smallest and largest key are kept. No key of
the block can have a larger product with a query q than ``sum_d max(q_d * min_d, q_d * max_d)``. Nothing here makes the
host wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsm.layout.kv import KV_BLOCK_TOKENS


class BlockBounds:
    """The elementwise smallest and largest key of every block of one unit (one layer, some rows).

    ``data`` is of the layout's ``bounds_shape``, ``[2, rows, n_kv_heads, blocks, head_dim]``, in the model dtype,
    smallest before largest; a block without keys has +inf and -inf there.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.empty(*shape, dtype=dtype, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget every key."""
        self.data[0] = math.inf
        self.data[1] = -math.inf

    def add_span(self, row: int, begin: int, keys: Tensor) -> None:
        """Take in one row's ``keys`` ``[n, n_kv_heads, head_dim]`` of the positions from ``begin`` on.

        At most three steps, however long: up to a block's border, whole blocks, the rest.
        """
        done, end = 0, keys.shape[0]
        while done < end:
            first, inside = divmod(begin + done, KV_BLOCK_TOKENS)
            blocks = 1 if inside else max(1, (end - done) // KV_BLOCK_TOKENS)
            take = min(blocks * KV_BLOCK_TOKENS - inside, end - done)
            part = keys[done : done + take].unflatten(0, (blocks, -1))  # [blocks, tokens, n_kv_heads, head_dim]
            low, high = self.data[:, row, :, first : first + blocks].unbind(0)
            torch.minimum(low, part.amin(dim=1).transpose(0, 1), out=low)
            torch.maximum(high, part.amax(dim=1).transpose(0, 1), out=high)
            done += take

    def add_tokens(self, rows: Tensor, positions: Tensor, keys: Tensor) -> None:
        """Take in one token each of ``rows``, none twice, with ``keys`` ``[n, n_kv_heads, head_dim]``."""
        blocks = positions // KV_BLOCK_TOKENS
        low, high = self.data.unbind(0)
        low[rows, :, blocks] = torch.minimum(low[rows, :, blocks], keys)
        high[rows, :, blocks] = torch.maximum(high[rows, :, blocks], keys)


def block_scores(queries: Tensor, bounds: BlockBounds, rows: Tensor) -> Tensor:
    """The most that the keys of a block can score, summed over the query heads of a KV head.

    ``max(q * min, q * max)`` is ``q * max`` for a q above 0 and ``q * min`` below: so the query heads are added up
    before they meet the bounds. ``queries`` are ``[n, n_heads, head_dim]``, of the unit's ``rows`` (int64 ``[n]``); the
    scores are float32 ``[n, n_kv_heads, blocks]``, meaningless for a block without keys.
    """
    grouped = queries.float().unflatten(1, (bounds.data.shape[2], -1))  # [n, n_kv_heads, n_rep, head_dim]
    signed = torch.stack((grouped.clamp(max=0).sum(dim=2), grouped.clamp(min=0).sum(dim=2)))
    # A product and a sum, no matmul: float32 whatever matmuls may be allowed to do.
    return (bounds.data[:, rows] * signed.unsqueeze(3)).sum(dim=(0, -1))


def select_blocks(queries: Tensor, bounds: BlockBounds, rows: Tensor, newest: Tensor, k: int) -> Tensor:
    """The ``k`` blocks (at least 2) that each row's next step attends over, by KV head; int64 ``[n, n_kv_heads, k]``.

    Slot 0 is block 0 and the last slot is ``newest``; between them stand, ascending, the k - 2 blocks of
    1 .. newest - 1 that score highest, of equal ones the lower. A row with no more than k blocks has block 0, 1, … in
    its first ``newest`` slots and 0 in those that are left before the last: the caller masks them.

    Args:
        queries: ``[n, n_heads, head_dim]``.
        rows: int64 ``[n]``, of the unit that the bounds are of.
        newest: int64 ``[n]``, the block that the row's next token goes into.
    """
    if k < 2:
        raise ValueError(f"a step needs the first and the newest block, not {k} blocks")
    scores = block_scores(queries, bounds, rows)
    none = scores.shape[-1]  # stands for no block: above all of them: it sorts behind them
    block = torch.arange(none, device=scores.device)
    candidates = (block > 0) & (block < newest.unsqueeze(1))  # [n, blocks]
    # Finite: a candidate stands before the others whatever its score.
    scores = scores.nan_to_num().masked_fill(~candidates.unsqueeze(1), -math.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : k - 2]
    exists = block[: k - 2] < newest.unsqueeze(1) - 1  # [n, <= k - 2]
    best = best.masked_fill(~exists.unsqueeze(1), none).sort(dim=-1).values
    middle = F.pad(best.masked_fill(best == none, 0), (0, k - 2 - best.shape[-1]))
    last = newest[:, None, None].expand(-1, middle.shape[1], 1)
    return torch.cat((torch.zeros_like(last), middle, last), dim=-1)
