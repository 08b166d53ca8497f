"""Where KV is: the bytes of its units, and which of them are in which tier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from typing import NamedTuple, TypeVar

KV_BLOCK_TOKENS = 256
"""Room for KV is taken, and KV is chosen, in blocks of so many tokens."""
WINDOWS = 3
"""Units on the device at once: one is computed with, one drains or waits, one is filled."""
COPY_BYTES = 1 << 20
"""What the link moves while the host queues one copy, some 20 us: 256 copies of 66 KB took 5 ms instead of 0.3."""

_Key = TypeVar("_Key")


class Unit(NamedTuple):
    """The KV of one layer and one stretch of rows: what is moved, kept and attended as one."""

    layer: int
    stretch: int


class Run(NamedTuple):
    """Neighbouring bytes of a unit."""

    offset: int
    nbytes: int


def runs_of(keys: Iterable[_Key], end: int = 0) -> Iterator[tuple[_Key, int, int]]:
    """Each key that comes once or more in a row, the number of the first and of what follows; counted from ``end``."""
    for key, run in groupby(keys):
        begin, end = end, end + sum(1 for _ in run)
        yield key, begin, end


@lru_cache(maxsize=16)
def _units(n_layers: int, stretches: int) -> tuple[Unit, ...]:
    return tuple(map(Unit._make, product(range(n_layers), range(stretches))))


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A unit is ``uint8 [rows, n_kv_heads, tokens, 2, record_bytes]``; ``tokens`` are whole blocks."""

    n_layers: int
    batch: int
    stretch_rows: int
    n_kv_heads: int
    tokens: int
    record_bytes: int

    @property
    def stretches(self) -> int:
        return -(-self.batch // self.stretch_rows)

    def rows_of(self, stretch: int) -> range:
        first = stretch * self.stretch_rows
        return range(first, min(first + self.stretch_rows, self.batch))

    def units(self) -> tuple[Unit, ...]:
        """All of them, in the order of a pass."""
        return _units(self.n_layers, self.stretches)

    def rows_in(self, units: Sequence[Unit]) -> int:
        """Rows of all these units together; only a layer's last stretch may be a short one."""
        last = self.stretches - 1
        missing = self.stretches * self.stretch_rows - self.batch
        return len(units) * self.stretch_rows - missing * sum(unit.stretch == last for unit in units)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.tokens // KV_BLOCK_TOKENS

    @property
    def token_bytes(self) -> int:
        """Bytes of one head and token."""
        return 2 * self.record_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one head's block."""
        return KV_BLOCK_TOKENS * self.token_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of a row."""
        return self.tokens * self.token_bytes

    @property
    def row_bytes(self) -> int:
        return self.n_kv_heads * self.head_bytes

    @property
    def window_bytes(self) -> int:
        """Bytes of the largest unit."""
        return min(self.batch, self.stretch_rows) * self.row_bytes

    def unit_bytes(self, unit: Unit) -> int:
        return len(self.rows_of(unit.stretch)) * self.row_bytes

    def shape(self, rows: int, tokens: int | None = None) -> tuple[int, int, int, int, int]:
        return rows, self.n_kv_heads, tokens or self.tokens, 2, self.record_bytes

    def bounds_shape(self, rows: int, head_dim: int) -> tuple[int, int, int, int, int]:
        """Of what the choice of blocks keeps of some rows: each block's smallest key and its largest."""
        return 2, rows, self.n_kv_heads, self.blocks, head_dim

    def runs(self, lengths: Sequence[int], worth: float = 0.8) -> list[Run]:
        """The bytes of a unit that hold its rows' first ``lengths`` tokens, as few runs.

        Neighbouring rows that are at least ``worth`` full go as one run, their empty ends included, and so do rows of
        heads so short that a copy of each takes longer than all of their bytes. A row of 0 tokens is left out.
        """
        runs: list[Run] = []
        for row, length in enumerate(lengths):
            start = row * self.row_bytes
            if length and (length >= worth * self.tokens or self.head_bytes < COPY_BYTES):
                if runs and runs[-1].offset + runs[-1].nbytes == start:
                    runs[-1] = Run(runs[-1].offset, runs[-1].nbytes + self.row_bytes)
                else:
                    runs.append(Run(start, self.row_bytes))
            elif length:
                heads = range(start, start + self.row_bytes, self.head_bytes)
                runs += [Run(head, length * self.token_bytes) for head in heads]
        return runs


@dataclass(frozen=True, slots=True)
class KVPlacement:
    """Which units are below the device, and in which tier: ``cpu`` (page-locked) or ``disk`` (``--kv-device``)."""

    layout: KVLayout
    cpu: tuple[Unit, ...] = ()
    disk: tuple[Unit, ...] = ()

    @property
    def below(self) -> tuple[Unit, ...]:
        """Units that are not on the device."""
        return *self.cpu, *self.disk

    @property
    def layers_below(self) -> int:
        """How many layers have KV that is not on the device."""
        return len({unit.layer for unit in self.below})

    @property
    def gpu(self) -> tuple[Unit, ...]:
        elsewhere = frozenset(self.below)
        return tuple(unit for unit in self.layout.units() if unit not in elsewhere)

    @property
    def gpu_bytes(self) -> int:
        return self.layout.n_layers * self.layout.batch * self.layout.row_bytes - self.bytes_of(self.below)

    def bytes_of(self, units: Sequence[Unit]) -> int:
        return self.layout.rows_in(units) * self.layout.row_bytes
