"""Rates over the link, in GB/s: plain copies, torch's gather, and the kernel with several sizes.

On one GPU, some seconds: python tests/gpu/gather_rates.py
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wsm.engine.arena import PageLockedArena
from wsm.engine.device import PIECE_BYTES, open_device
from wsm.kv import gather_kernel
from wsm.kv.gather import Gather, gather

ROWS, HEADS, BLOCKS, K = 128, 8, 8, 4


def main() -> None:
    for block_bytes in (256 * 2 * 256, 256 * 2 * 136):
        measure(block_bytes)


def measure(block_bytes: int) -> None:
    device = open_device(torch.device("cuda"))
    nbytes = ROWS * HEADS * BLOCKS * block_bytes
    arena = PageLockedArena(nbytes, device)
    host = arena.take(nbytes)
    home = device.mapped(host).view(torch.int64).view(ROWS, HEADS * BLOCKS, -1)
    wanted = torch.rand(ROWS, HEADS, BLOCKS, device="cuda").argsort(dim=-1)[..., :K].contiguous()
    window = torch.empty(ROWS, HEADS * K, home.shape[-1], dtype=torch.int64, device="cuda")
    flat = window.view(-1).view(torch.uint8)
    together = max(1, PIECE_BYTES // window[0].nbytes)

    def copies() -> None:
        for at in range(0, flat.nbytes, PIECE_BYTES):
            part = slice(at, min(at + PIECE_BYTES, flat.nbytes))
            flat[part].copy_(host[part], non_blocking=True)

    def pieces(by: Gather) -> None:
        for row in range(0, ROWS, together):
            part = slice(row, row + together)
            by(home[part], wanted[part], window[part])

    print(f"blocks of {block_bytes >> 10} KiB: copies {rate(copies, flat.nbytes):.1f}", end=", ")
    print(f"torch's gather {rate(lambda: pieces(gather), flat.nbytes):.1f}")
    for programs in (8, 16, 32, 64, 128):
        for tile in (4 << 10, 8 << 10, 16 << 10, 32 << 10):
            gather_kernel.PROGRAMS, gather_kernel.TILE_BYTES = programs, tile
            found = rate(lambda: pieces(gather_kernel.gather), flat.nbytes)
            print(f"  kernel, {programs:3} programs, tiles of {tile >> 10:2} KiB: {found:.1f}")
    arena.close()


def rate(work: Callable[[], None], nbytes: int) -> float:
    """GB/s, the median of 5."""
    seconds = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return nbytes / statistics.median(seconds[1:]) / 1e9


if __name__ == "__main__":
    main()
