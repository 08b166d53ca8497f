"""The kernel that reads 8-bit KV where there is no GPU: python int8_without_a_gpu.py interpret | 80 | 86 | 89 | 90

``interpret`` (with TRITON_INTERPRET=1) compares it with torch, bit by bit; not in bfloat16, which the interpreter
rounds otherwise than a GPU. A number compiles it for that compute capability.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from llama.kv import int8_kernel
from llama.kv.format import kv_format
from tests.without_gpu import compiled


def interpret() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, tokens, dim in (((3, 2, 256), 256, 128), ((2, 3, 256), 70, 24), ((2, 512), 33, 64), ((1, 1, 8), 1, 8)):
        for dtype in (torch.float32, torch.float16):
            form = kv_format("int8", dtype, dim)
            window = torch.zeros(*shape, 2, form.record_bytes, dtype=torch.uint8)
            rows = window if window.dim() == 5 else window.unsqueeze(0)
            for row in rows:
                new = torch.randn(shape[-1], 2, shape[-2], dim, generator=generator).to(dtype)
                form.write_span_(row, 0, new)
            expected = torch.stack(form.read(window, tokens), dim=-2)
            found = torch.full_like(expected, 7.0)
            int8_kernel.read_(window, tokens, found)
            assert torch.equal(found, expected), (shape, tokens, dim, dtype)


def compile_for(capability: int) -> None:
    for to in (tl.bfloat16, tl.float16, tl.float32):
        types = {"values": "*i8", "scales": "*fp32", "out": f"*{to}"}
        constants = {"DIM": 128, "WIDTH": 128, "RECORD": 136, "RECORDS": int8_kernel.RECORDS, "TO": to}
        compiled(int8_kernel.read_kernel, capability, types, constants, range(3), num_warps=int8_kernel.WARPS)


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
