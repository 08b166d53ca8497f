"""The gathering kernel where there is no GPU: python gather_without_a_gpu.py interpret | 80 | 86 | 89 | 90

``interpret`` (with TRITON_INTERPRET=1) compares it with torch; a number compiles it for that compute capability.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

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
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = gather_kernel.gather_kernel
    signature = {"home": "*i64", "wanted": "*i64", "window": "*i64", "pieces": "i32", "k": "i32", "blocks": "i32"}
    for words in (16384, 8704):
        constants = {"WORDS": words, "TILE": gather_kernel.TILE_BYTES // 8}
        names = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): given for name, given in constants.items()}
        aligned = {(place,): [["tt.divisibility", 16]] for place in range(3)}
        made = triton.compile(
            ASTSource(kernel, names, places, attrs=aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": gather_kernel.WARPS},
        )
        assert made.asm["cubin"]
        assert "ld.global.v2.b64" in made.asm["ptx"]
        assert "st.global.v2.b64" in made.asm["ptx"]


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
