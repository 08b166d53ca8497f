"""The kernels of node attention where there is no GPU: python without_a_gpu.py interpret | 80 | 86 | 89 | 90

``interpret`` (with TRITON_INTERPRET=1) compares them with the attention in torch; a number compiles them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from llama.nodes import kernels
from llama.nodes.attention import attend_by_hand
from tests.llama.nodes.cases import Case, permuted
from tests.without_gpu import compiled
from wsm.layout.kv import KV_BLOCK_TOKENS

POINTERS = {"window": "*i64", "prefix": "*i64", "tops": "*fp32", "sums": "*fp32", "parts": "*fp32"}


def compile_for(capability: int) -> None:
    for (n_heads, n_kv_heads, head_dim), dtype in (((9, 3, 64), torch.float32), ((64, 8, 128), torch.bfloat16)):
        n_rep, dims = n_heads // n_kv_heads, head_dim
        sizes = {"N_REP": n_rep, "REPS": 16, "HEAD_DIM": head_dim, "DIMS": dims}
        split = sizes | {"TILE": kernels.tile(dims, dtype), "BLOCK": KV_BLOCK_TOKENS}
        element = "*fp32" if dtype == torch.float32 else "*bf16"
        types = POINTERS | dict.fromkeys(("q", "keys", "values", "out"), element) | {"scale": "fp32"}
        for kernel, constants in ((kernels.split_kernel, split), (kernels.join_kernel, sizes)):
            made = compiled(kernel, capability, types, constants, num_warps=kernels.WARPS)
            assert made.metadata.shared <= 99 << 10, "what a program may have of an RTX card's shared memory"


def interpret() -> None:
    for geometry in ((9, 3, 64), (4, 2, 24)):
        case = Case.random(*geometry, torch.float32)
        found = kernels.attend(*case)
        assert (found - attend_by_hand(*case)).abs().max() < 1e-5
    # Other places of the nodes, other columns of their keys, and NaN in what is masked.
    for other, places in list(permuted(case))[1::2]:
        assert torch.equal(kernels.attend(*other), places(found))


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
