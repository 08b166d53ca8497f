"""The kernels of node attention where there is no GPU: python without_a_gpu.py interpret | 80 | 86 | 89 | 90

``interpret`` (with TRITON_INTERPRET=1) compares them with the attention in torch; a number compiles them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from llama.nodes import kernels
from llama.nodes.attention import attend_by_hand
from tests.llama.nodes.cases import GEOMETRIES, Case, permuted
from wsm.layout.kv import KV_BLOCK_TOKENS

POINTERS = {"window": "*i64", "prefix": "*i64", "tops": "*fp32", "sums": "*fp32", "parts": "*fp32"}


def compile_for(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for n_heads, n_kv_heads, head_dim in GEOMETRIES:
        for dtype, torch_dtype in ((tl.bfloat16, torch.bfloat16), (tl.float32, torch.float32)):
            n_rep = n_heads // n_kv_heads
            dims = max(16, triton.next_power_of_2(head_dim))
            sizes = {"N_REP": n_rep, "REPS": max(16, triton.next_power_of_2(n_rep)), "HEAD_DIM": head_dim, "DIMS": dims}
            split = sizes | {"TILE": kernels.tile(dims, torch_dtype), "BLOCK": KV_BLOCK_TOKENS}
            for kernel, constants in ((kernels.split_kernel, split), (kernels.join_kernel, sizes)):
                types = POINTERS | dict.fromkeys(("q", "keys", "values", "out"), f"*{dtype}") | {"scale": "fp32"}
                signature = {
                    arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names
                }
                source = ASTSource(
                    kernel, signature, {(kernel.arg_names.index(arg),): given for arg, given in constants.items()}
                )
                made = triton.compile(
                    source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS}
                )
                assert made.asm["cubin"]
                assert made.metadata.shared <= 99 << 10, "what a program may have of an RTX card's shared memory"


def interpret() -> None:
    for geometry in ((9, 3, 64), (4, 2, 24), (8, 1, 128)):
        case = Case.random(*geometry, torch.float32)
        found = kernels.attend(*case)
        torch.testing.assert_close(found, attend_by_hand(*case), rtol=1e-4, atol=1e-5)
        for other, places in permuted(case):
            assert torch.equal(kernels.attend(*other), places(found)), geometry


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
