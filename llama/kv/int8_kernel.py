"""Reading 8-bit KV in Triton: one pass over the bytes. Imported only where Triton works on the CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RECORDS, WARPS = 64, 4
"""Of a program: some 9 kB of heads of 128 values."""
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["parts", "records", "head_records"])
def read_kernel(
    values, scales, out, parts, records, head_records,
    DIM: tl.constexpr, WIDTH: tl.constexpr, RECORD: tl.constexpr, RECORDS: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """The first ``records`` of each head's ``head_records``; ``values`` (int8) and ``scales`` are the same bytes."""
    head = (tl.program_id(0) // parts).to(tl.int64)
    record = (tl.program_id(0) % parts) * RECORDS + tl.arange(0, RECORDS)
    dim, known = tl.arange(0, WIDTH), record < records
    at = head * head_records + record
    inside = known[:, None] & (dim < DIM)[None, :]
    value = tl.load(values + (at * RECORD)[:, None] + dim[None, :], mask=inside, other=0)
    scale = tl.load(scales + at * (RECORD // 4) + DIM // 4, mask=known, other=0)
    found = (value.to(tl.float32) * scale[:, None]).to(TO)
    tl.store(out + ((head * records + record) * DIM)[:, None] + dim[None, :], found, mask=inside)


def read_(window: Tensor, tokens: int, out: Tensor) -> None:
    """Fill ``out [..., tokens, 2, head_dim]`` from a contiguous ``window``, uint8 ``[..., more tokens, 2, record]``."""
    dim, record = out.shape[-1], window.shape[-1]
    records, head_records = 2 * tokens, 2 * window.shape[-3]
    heads = window.numel() // (head_records * record)
    parts = triton.cdiv(records, RECORDS)
    read_kernel[(heads * parts,)](
        window.view(torch.int8), window.view(torch.float32), out, parts, records, head_records,
        DIM=dim, WIDTH=triton.next_power_of_2(dim), RECORD=record, RECORDS=RECORDS, TO=_TYPES[out.dtype],
        num_warps=WARPS,
    )  # fmt: skip
