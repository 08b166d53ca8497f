"""Chosen KV blocks, read by the GPU itself from page-locked CPU memory. Imported only where there is a CUDA device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS, TILE_BYTES, WARPS = 32, 16 << 10, 8
"""The link is full with some 150 kB of reads under way, and 32 programs have half a megabyte; the computation keeps
three quarters of the GPU, and most of what these take."""


@triton.jit(do_not_specialize=["pieces", "k", "blocks"])
def gather_kernel(home, wanted, window, pieces, k, blocks, WORDS: tl.constexpr, TILE: tl.constexpr):
    """``pieces`` blocks of WORDS words, tile after tile; ``home`` and ``window`` of words, ``wanted`` int64."""
    tiles: tl.constexpr = (WORDS + TILE - 1) // TILE
    lane = tl.max_contiguous(tl.arange(0, TILE), TILE)
    for job in range(tl.program_id(0), pieces * tiles, tl.num_programs(0)):
        piece = job // tiles
        at = (job % tiles) * TILE + lane
        source = (piece // k).to(tl.int64) * blocks + tl.load(wanted + piece)
        words = tl.load(home + source * WORDS + at, mask=at < WORDS, other=0)
        tl.store(window + piece.to(tl.int64) * WORDS + at, words, mask=at < WORDS)


def gather(home: Tensor, wanted: Tensor, window: Tensor) -> None:
    """As :func:`wsm.kv.gather.gather`, on the current stream, in one launch."""
    rows, heads, k = wanted.shape
    words = home.shape[-1]
    tile = triton.next_power_of_2(min(words, TILE_BYTES // home.element_size()))
    gather_kernel[(PROGRAMS,)](
        home, wanted, window, rows * heads * k, k, home.shape[1] // heads,
        WORDS=words, TILE=tile, num_warps=WARPS,
    )  # fmt: skip
