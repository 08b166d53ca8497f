"""The gathering kernel where there is no GPU: python gather_without_a_gpu.py interpret | 80 | 86 | 89 | 90

``interpret`` (with TRITON_INTERPRET=1) compares it with torch; a number compiles it for that compute capability.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.without_gpu import compiled
from wsm.kv import gather_kernel
from wsm.kv.gather import gather


def interpret() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, heads, blocks, k, words in ((3, 2, 8, 4, 640), (1, 1, 5, 2, 2048), (2, 3, 7, 3, 4352), (2, 2, 3, 2, 24)):
        for dtype in (torch.int64, torch.uint8):
            home = torch.randint(0, 256, (rows, heads * blocks, words), generator=generator).to(dtype)
            wanted = torch.randint(0, blocks, (rows, heads, k), generator=generator)
            expected, found = (torch.full((rows, heads * k, words), 7, dtype=dtype) for _ in range(2))
            gather(home, wanted, expected)
            gather_kernel.gather(home, wanted, found)
            assert torch.equal(found, expected), (rows, heads, blocks, k, words, dtype)
            head = home.view(rows, heads, blocks, words)
            for row, of, place in ((0, 0, 0), (rows - 1, heads - 1, k - 1)):
                chosen = head[row, of, wanted[row, of, place]]
                assert torch.equal(expected.view(rows, heads, k, words)[row, of, place], chosen)


def compile_for(capability: int) -> None:
    """Blocks of 128 KiB, and of 68 KiB as int8 has them; in vectors of 16 bytes."""
    kernel = gather_kernel.gather_kernel
    types = dict.fromkeys(("home", "wanted", "window"), "*i64")
    for words in (16384, 8704):
        constants = {"WORDS": words, "TILE": gather_kernel.TILE_BYTES // 8}
        made = compiled(kernel, capability, types, constants, range(3), num_warps=gather_kernel.WARPS)
        assert "ld.global.v2.b64" in made.asm["ptx"]
        assert "st.global.v2.b64" in made.asm["ptx"]


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
