"""The KV cache: on the compute device, or, stretch of rows by stretch of rows, in tiers below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llama.batch import Segment
from llama.config import ModelConfig
from llama.kv.format import KVFormat, kv_format
from llama.kv.select import BlockBounds, select_blocks
from wsm.kv.tiers import KVTiers, word_of
from wsm.layout.groups import round_up
from wsm.layout.kv import KV_BLOCK_TOKENS, KVLayout
from wsm.words import counted


def attended_tokens(length: int, room: int) -> int:
    """Positions that a decode step attends over where the longest row has ``length``: whole blocks, at most ``room``.

    Beyond 2 048 tokens the steps grow with the length, and stay few: at most an eighth of the positions is masked.
    """
    step = max(KV_BLOCK_TOKENS, 1 << max(0, length.bit_length() - 4))
    return min(-(-length // step) * step, room)


class KVWindow(NamedTuple):
    """The KV of one layer and one stretch of rows, on the device.

    ``data`` is ``uint8 [rows, n_kv_heads, tokens, 2, record]``: keys and values as their format has them. Where
    ``compact``, it holds chosen blocks alone, the newest one last.
    """

    data: Tensor
    compact: bool = False


class Rows(NamedTuple):
    """One new token each of neighbouring rows: attended as one batch over ``tokens`` positions of each.

    They are as many as :func:`attended_tokens` says, whatever the rows' lengths are: the shapes change seldom, and
    a captured graph serves many passes.
    """

    first: int  # row of the window
    places: Tensor  # int64 [n]: rows of the window
    positions: Tensor  # int64 [n]: where in its row of the window each token goes
    tokens: int
    mask: Tensor  # [n, 1, 1, tokens], added to the scores: 0 for a position that the row has, else -inf


@dataclass(slots=True)
class _Entered:
    """A window in use that the tier wants back, and what the pass has put into it; by row, what its last token asks."""

    window: KVWindow
    bounds: BlockBounds | None
    fresh: list[Tensor] = field(default_factory=list)
    queries: dict[int, Tensor] = field(default_factory=dict)
    positions: dict[int, Tensor] = field(default_factory=dict)


class KVCache:
    """Keys and values of every layer and row.

    Args:
        batch: rows.
        tokens: the most a row may hold; rounded up to whole blocks.
        record: how keys and values are stored; as the model computes them unless given.
        stretch_rows: rows whose KV is moved and attended together; all of them unless given.
        tier: has the stretches that are not on the device; None: all are.
        topk: blocks per row that a decode step may bring from below the device; 0 for all.

    ``lengths`` are the tokens that each row holds in every layer, kept on the host; ``passes`` counts those begun.
    ``spoilt``: what it holds may not be finite, so it is cleared before it is used again.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        record: KVFormat | None = None,
        stretch_rows: int | None = None,
        tier: KVTiers | None = None,
        topk: int = 0,
    ) -> None:
        self.record, self.tier = record or kv_format("auto", dtype, config.head_dim), tier
        self.batch, self.tokens = batch, round_up(tokens, KV_BLOCK_TOKENS)
        stretch_rows = min(batch, stretch_rows or batch)
        self.layout = layout = KVLayout(
            config.n_layers, batch, stretch_rows, config.n_kv_heads, self.tokens, self.record.record_bytes
        )
        self.topk = topk if 0 < topk < layout.blocks and tier is not None else 0
        self.lengths = [0] * batch
        self.passes = 0
        self.spoilt = False
        self._decoding = False
        self._entered: dict[tuple[int, int], _Entered] = {}
        self._device = device
        here = [unit for unit in layout.units() if tier is None or not tier.holds(*unit)]
        # Zeros, not whatever was there: a masked place counts nothing times its value, and nothing times NaN is NaN.
        self._data = torch.zeros(layout.shape(layout.rows_in(here)), dtype=torch.uint8, device=device)
        parts = self._data.split([len(layout.rows_of(stretch)) for _, stretch in here])
        self._windows: dict[tuple[int, int], KVWindow] = dict(zip(here, map(KVWindow, parts), strict=True))
        self._bounds: dict[tuple[int, int], BlockBounds] = {
            unit: BlockBounds(layout.bounds_shape(len(layout.rows_of(unit.stretch)), config.head_dim), dtype, device)
            for unit in layout.units()
            if self.topk and unit not in self._windows
        }

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the tier's windows."""
        return self._data.nbytes + sum(bounds.data.nbytes for bounds in self._bounds.values())

    # -- a pass

    def begin(self, segments: Sequence[Segment]) -> None:
        """A pass over ``segments`` begins; ValueError unless each goes on where its row ends, and fits."""
        for segment in segments:
            if segment.start_pos != self.lengths[segment.row] or segment.end_pos > self.tokens:
                raise ValueError(
                    f"row {segment.row} of the KV cache holds {self.lengths[segment.row]} of {self.tokens} tokens; "
                    f"a pass cannot add positions {segment.start_pos} to {segment.end_pos}"
                )
        self.passes += 1
        if self.tier is not None:
            after = list(self.lengths)
            for segment in segments:
                after[segment.row] = segment.end_pos
            used = dict.fromkeys(segment.row // self.layout.stretch_rows for segment in segments)
            self._decoding = all(segment.length == 1 for segment in segments)
            self.tier.schedule.begin(list(used), self.lengths, after, self.topk if self._decoding else 0)

    def begin_nodes(self, rows: int, nodes: int) -> None:
        """A pass over so many nodes of each of the first ``rows`` begins; ValueError where a row has no room for them.

        Their keys and values go behind the row's tokens, and a row grows by :meth:`keep_nodes` and :meth:`grow` alone.
        """
        if self.tier is not None:
            raise ValueError("nodes are computed where all KV is on the device")
        longest = max(self.lengths[:rows])
        if longest + nodes > self.tokens:
            raise ValueError(
                f"a row of the KV cache holds {longest} of {self.tokens} tokens: no room for {counted(nodes, 'node')}"
            )
        self.passes += 1

    def keep_nodes(self, starts: Tensor, path: Tensor, counts: Tensor) -> None:
        """Move keys and values of accepted nodes to their positions, in all layers at once; nothing is uploaded.

        Args:
            starts: int64 ``[B]``: where the trees' roots stand in the first B rows.
            path: int64 ``[B, n]``: the nodes that become positions ``start``, ``start + 1``, … of their row.
            counts: int64 ``[B]``: how many of them do; the others stay where they are.
        """
        places = torch.arange(path.shape[1], device=path.device)
        begins = starts.unsqueeze(1)
        kept = torch.where(places < counts.unsqueeze(1), path, places)
        rows = torch.arange(path.shape[0], device=path.device).unsqueeze(1)
        # Every layer has its rows one after the other, however they are cut into stretches.
        words = self._data.view(word_of(self.record.record_bytes)).unflatten(0, (-1, self.batch))
        moved = words[:, rows, :, begins + kept]  # a copy: a node may stand where another one goes
        words[:, rows, :, begins + places] = moved

    def grow(self, counts: Sequence[int]) -> None:
        """Count the nodes that :meth:`keep_nodes` has moved in the first rows."""
        for row, count in enumerate(counts):
            self.lengths[row] += count

    def compact(self, stretch: int) -> bool:
        """Whether the coming decode step of a stretch brings chosen blocks alone from below the device."""
        longest = max(self.lengths[row] for row in self.layout.rows_of(stretch))
        return self.topk > 0 and longest // KV_BLOCK_TOKENS >= self.topk

    def enter(self, layer: int, stretch: int) -> KVWindow:
        """The KV of a layer and a stretch of rows, to be read and appended to until it is left."""
        unit = layer, stretch
        if self.tier is None or unit in self._windows:
            return self._windows[unit]
        if unit not in self._entered:
            self._entered[unit] = _Entered(KVWindow(*self.tier.enter(layer, stretch)), self._bounds.get(unit))
        return self._entered[unit].window

    def leave(self, layer: int, stretch: int) -> None:
        """All that this pass computes with a layer's stretch is queued."""
        new = self._entered.pop((layer, stretch), None)
        if new is None or self.tier is None:
            return
        fresh = torch.cat(new.fresh) if self._decoding else None
        self.tier.leave(layer, stretch, fresh, self._chosen(new))

    def _chosen(self, new: _Entered) -> Tensor | None:
        """Blocks to bring at the next step, int64 ``[n, n_kv_heads, k]``; None where none are chosen."""
        if new.bounds is None:
            return None
        queries, positions = torch.cat(list(new.queries.values())), torch.cat(list(new.positions.values()))
        rows = torch.arange(min(new.queries), min(new.queries) + len(queries), device=self._device)
        newest = ((positions + 1) // KV_BLOCK_TOKENS).clamp(max=self.layout.blocks - 1)  # a full row ends here
        return select_blocks(queries, new.bounds, rows, newest, self.topk)

    def wrote_span(
        self, layer: int, stretch: int, segment: Segment, key: Tensor, query: Tensor, position: Tensor
    ) -> None:
        """A segment's keys, ``key [n, n_kv_heads, head_dim]``, and values are in the window of its stretch.

        ``query [1, n_heads, head_dim]`` and ``position`` (int64 ``[1]`` on the device) are its last token's.
        """
        new = self._entered.get((layer, stretch))
        if new is not None and new.bounds is not None:
            row = segment.row - self.layout.rows_of(stretch).start
            new.bounds.add_span(row, segment.start_pos, key)
            new.queries[row], new.positions[row] = query.clone(), position

    def wrote_tokens(
        self, layer: int, stretch: int, rows: Rows, positions: Tensor, keys: Tensor, queries: Tensor
    ) -> None:
        """One new token per row is in the window of a stretch; ``positions`` int64 ``[n]`` are those in the whole row.

        ``keys`` are ``[n, n_kv_heads, head_dim]``, ``queries`` ``[n, n_heads, head_dim]``.
        """
        new = self._entered.get((layer, stretch))
        if new is None:
            return
        words = new.window.data.view(word_of(self.record.record_bytes))
        new.fresh.append(words[rows.places, :, rows.positions].view(torch.uint8))
        if new.bounds is not None:
            new.bounds.add_tokens(rows.places, positions, keys)
            # Row by row: a later chunk may go on with the last of them.
            new.queries.update(enumerate(queries.clone().split(1), rows.first))
            new.positions.update(enumerate(positions.split(1), rows.first))

    def extend(self, segments: Sequence[Segment]) -> None:
        """Count the tokens that a pass has added in every layer."""
        for segment in segments:
            self.lengths[segment.row] = segment.end_pos

    def end_row(self, row: int) -> None:
        """A row's KV will not be asked for again."""
        if self.tier is not None:
            self.tier.schedule.end_row(row)

    def reset(self) -> None:
        """Empty every row."""
        self.lengths = [0] * self.batch
        self._entered.clear()
        for bounds in self._bounds.values():
            bounds.reset()
        if self.tier is not None:
            self.tier.schedule.reset()
        if self.spoilt:  # a masked place counts nothing times its value
            self._data.zero_()
            if self.tier is not None:
                self.tier.clear()
            self.spoilt = False
