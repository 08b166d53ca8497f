"""The Triton kernels where there is no GPU: python without_a_gpu.py interpret | 80 | 86 | 89 | 90

``interpret`` (with TRITON_INTERPRET=1) compares them with the reference on the CPU; bfloat16 only where it is moved as
bits, since the interpreter rounds it otherwise than a GPU. A number compiles them for that compute capability.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.without_gpu import compiled
from tests.wsm.formats.matrices import FORMATS, matrix, planes_of, random_blocks
from wsm.formats import backend, exact, fp8, gguf_blocks, gguf_kernels, integer, kernels, product_kernels
from wsm.formats.exact import Exact
from wsm.formats.format import MOST_ROWS
from wsm.formats.gguf_blocks import TYPES, BlockType
from wsm.formats.registry import get

PLACES = (kernels, product_kernels, gguf_kernels)
POINTERS = {
    "exact_kernel": {"signs": "*i16", "codes": "*u8", "base": "*u8", "out": "*i32"},
    "escapes_kernel": {"signs": "*u8", "counts": "*i32", "places": "*i16", "exponents": "*u8", "out": "*i16"},
    "int4_kernel": {"values": "*u8", "scales": "*bf16", "zeros": "*u8", "out": "*i32"},
    "bytes_kernel": {"values": "*u8", "scales": "*bf16", "zeros": "*u8", "out": "*bf16"},
    "blocks_kernel": {"blocks": "*i16"},
    "blocks_product_kernel": {"blocks": "*i16", "parts": "*fp32", "arrivals": "*i32"},
    "product_kernel": {"values": "*u8", "scales": "*bf16", "zeros": "*u8", "parts": "*fp32", "arrivals": "*i32"},
}


def compile_for(capability: int) -> None:
    """Each kernel with the constants of formats that have little in common."""

    def made(name: str, warps: int, stages: int = 3, pointers: dict[str, str] | None = None, **constants: Any) -> None:
        kernel = next(getattr(place, name) for place in PLACES if hasattr(place, name))
        types = POINTERS[name] | (pointers or {})
        compiled(kernel, capability, types, constants, num_warps=warps, num_stages=stages)

    for size in (9, 10, 11, 12, 17, 72, 88, 105):
        to = {9: tl.float16, 88: tl.float16, 10: tl.float32, 105: tl.float32}.get(size, tl.bfloat16)
        made("blocks_kernel", gguf_kernels.BLOCKS.warps, pointers={"out": "*i64" if to == tl.float32 else "*i32"},
             SIZE=size, TILE=gguf_kernels.BLOCKS.tile // (32 if size > 64 else 16), TO=to)  # fmt: skip
        tuning, to = gguf_kernels.PRODUCT, "fp16" if size % 2 else "bf16"
        made("blocks_product_kernel", tuning.warps, tuning.stages, {"x": f"*{to}", "out": f"*{to}"},
             SIZE=size, SPLIT=size != 12, N=MOST_ROWS, ROWS=tuning.rows)  # fmt: skip
    made("exact_kernel", kernels.EXACT.warps, TILE=kernels.EXACT.tile)
    made("escapes_kernel", 1, WEIGHTS=1 << 16, TILE=32)
    for group, per_row, to in ((128, False, tl.bfloat16), (32, False, tl.float16), (128, True, tl.float32)):
        constants = {"HAS_ZERO": group == 128, "PER_ROW": per_row}
        pairs = {"out": "*i64" if to == tl.float32 else "*i32"}
        made("int4_kernel", 4, pointers=pairs, PART=group // 2, PARTS=2048 // group, TO=to, **constants)
        for e4m3 in (False, True):
            made("bytes_kernel", 4, pointers={"out": f"*{to}"}, E4M3=e4m3, PART=group, PARTS=32, TO=to, **constants)
        for bits in (4, 8) if to != tl.float32 else ():
            tuning, whole = product_kernels.PRODUCT[bits], bits == 4 and group == 128
            tile = {"STEP": group, "N": MOST_ROWS, "ROWS": tuning.rows, "EVEN": whole, "SPLIT": whole}
            made("product_kernel", tuning.warps, tuning.stages, {"x": f"*{to}", "out": f"*{to}"},
                 BITS=bits, ASSEMBLED=True, **tile, **constants)  # fmt: skip


def interpret() -> None:
    """The formats' own way to the kernels, on the CPU."""
    with (
        mock.patch.object(backend, "kernels_for", return_value=kernels),
        mock.patch.object(exact, "kernels_for", return_value=kernels),
        mock.patch.object(fp8, "kernels_for", return_value=kernels),
        mock.patch.object(integer, "kernels_for", return_value=kernels),
        mock.patch.object(gguf_blocks, "kernels_for", return_value=kernels),
    ):
        blocks_through_kernels = [decode_blocks(*case) for case in block_cases()]
        through_kernels = [decode(name, shape, dtype) for name, shape, dtype in cases()]
        multiply()
    assert all(torch.equal(one, decode(*case)) for one, case in zip(through_kernels, cases(), strict=True))

    for case, found in zip(block_cases(), blocks_through_kernels, strict=True):
        assert torch.equal(found, decode_blocks(*case)), case


def block_cases() -> list[tuple[str, tuple[int, int], torch.dtype]]:
    """One row, rows of several programs, and a last program that is nearly empty."""
    cut = {name: ((3, 576), (1, 32), (5, 8192)) if form.weights == 32 else ((3, 768), (1, 256), (5, 8192))
           for name, form in TYPES.items()}  # fmt: skip
    return [(name, shape, to) for name in TYPES for shape in cut[name] for to in (torch.float16, torch.float32)]


def decode_blocks(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The bits of a matrix of random blocks."""
    form, out = TYPES[name], torch.full(shape, 7.0, dtype=dtype)
    form.decode_({"blocks": random_blocks(form, shape)}, out)
    return out.view(torch.int32 if dtype == torch.float32 else torch.int16)


def cases() -> list[tuple[str, tuple[int, int], torch.dtype]]:
    dtypes = {name: (torch.bfloat16,) if name == "exact" else (torch.float16, torch.float32) for name in FORMATS}
    return [
        (name, shape, dtype)
        for name in FORMATS
        for shape in ((3, 576), (5, 100), (1, 1), (3, 33))
        for dtype in dtypes[name]
    ]


def decode(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The bits of a decoded matrix."""
    form, weight = Exact(pays_below=9.0) if name == "exact" else get(name), matrix(shape, dtype)
    planes = form.encode(weight)
    assert planes is not None
    out = torch.full_like(weight, 7.0)
    form.decode_(planes, out)
    return out.view(torch.int32 if dtype == torch.float32 else torch.int16)


def multiply() -> None:
    """Packed products, split or not, against the plain ones; alone a row gives the same bits as among others."""
    integers = [name for name in FORMATS if name.startswith("int")]
    for name in (*integers, *TYPES):
        form = get(name)
        for shape in ((3, 576), (66, 100), (5, 2048)) if name in integers else multiplied(TYPES[name]):
            planes, values = planes_of(form, matrix(shape, torch.float16)), torch.empty(shape)
            form.decode_(planes, values)
            x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).half()
            wide = torch.zeros(5, shape[0] + 6).half()
            product = form.linear(x, planes, shape, out=wide[:, 4:-2])
            alone = form.linear(x[3:4], planes, shape)
            assert product is not None
            assert alone is not None
            assert not wide[:, :4].any()
            assert not wide[:, -2:].any()
            assert torch.equal(product[3], alone[0])
            expected = x.float() @ values.T
            assert (product.float() - expected).norm() <= 0.002 * expected.norm(), (name, shape)


def multiplied(form: BlockType) -> tuple[tuple[int, int], ...]:
    return ((3, 576), (34, 2048)) if form.weights == 32 else ((3, 768), (34, 2048))


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[1]))
