"""GGUF's block types: a matrix lies as the file has it, in blocks of 32 or 256 weights with scales of their own.

The layouts are those of ggml (ggml-common.h); the values, in float32, those of the ``gguf`` package's ``dequantize``,
bit for bit. All products are exact there: a float16 scale times whole numbers has at most 24 bits. So nothing but the
last sum rounds, and a fused multiply-add gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wsm.errors import StoreError, UnusableInput
from wsm.formats.backend import kernels_for, packed_product, packed_rows
from wsm.formats.format import Plane, Shape, SizedByShape, check_planes, pieces

_FINITE = 0x7C00
"""The exponent's bits of a float16: all of them are set in NaN and infinity."""


@dataclass(frozen=True, slots=True)
class BlockType(SizedByShape):
    """``blocks`` uint8 ``[rows, cols / weights * nbytes]``: a row's blocks one behind the other.

    ``scale_at`` and, where there is one, ``min_at`` are the places of the float16 numbers in a block. A value is what
    ``decode`` makes of it, rounded once to the compute dtype. No weights are encoded: blocks come from a file.
    """

    name: str
    weights: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]
    """``uint8 [n, nbytes]`` -> ``float32 [n, weights]``: the reference, the other decoders give its bits."""
    scale_at: int = 0
    min_at: int | None = None
    min_of_scale: float = 0.0
    """What the min is of the scale, for codes to lie around 0."""
    exact = False

    @classmethod
    def named(cls, name: str) -> BlockType | None:
        return TYPES.get(name)

    def planes(self, shape: Shape, dtype: torch.dtype | None = None) -> tuple[Plane, ...]:
        rows, cols = shape
        if cols % self.weights:
            raise UnusableInput(f"{self.name}, whose blocks of {self.weights} weights do not fill a row of {cols}")
        return (Plane("blocks", torch.uint8, (rows, cols // self.weights * self.nbytes)),)

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        raise UnusableInput(NOT_ENCODED.format(self.name))

    def seeded(self, count: int, std: float, seed: int) -> Tensor:
        """``uint8 [count, nbytes]`` random blocks of weights around 0 with that deviation; the same everywhere."""
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randint(256, (count, self.nbytes), dtype=torch.uint8, generator=generator)
        signs = torch.randint(2, (count,), generator=generator) * 2 - 1
        if self.min_at is not None and self.weights == 256:  # each group's min is as many as its scale
            blocks[:, 8:12] = blocks[:, 4:8]
            blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17
        self._set_scales_(blocks, torch.ones(count))
        spread = self.decode(blocks[:4096]).double().square().mean().sqrt()  # of whole and half numbers: an exact sum
        self._set_scales_(blocks, signs * (std / spread))
        return blocks

    def _set_scales_(self, blocks: Tensor, scales: Tensor) -> None:
        halves = blocks.view(torch.float16)
        halves[:, self.scale_at // 2] = scales.half()
        if self.min_at is not None:
            halves[:, self.min_at // 2] = (scales * self.min_of_scale).half()

    def check(self, shape: Shape, planes: Mapping[str, Tensor]) -> None:
        check_planes(self.name, self.planes(shape), planes)
        halves = planes["blocks"].reshape(-1, self.nbytes).view(torch.int16)
        for at in (self.scale_at,) if self.min_at is None else (self.scale_at, self.min_at):
            if bool((halves[:, at // 2] & _FINITE == _FINITE).any()):
                raise StoreError(f"{self.name}: a scale in the plane blocks is NaN or infinity")

    def decode_(self, planes: Mapping[str, Tensor], out: Tensor) -> None:
        if kernels_for(out) is not None and out.data_ptr() % (2 * out.element_size()) == 0:
            from wsm.formats.gguf_kernels import decode_blocks_  # it needs Triton

            decode_blocks_(self.name, planes["blocks"], out)
            return
        blocks, values = planes["blocks"].view(-1, self.nbytes), out.view(-1, self.weights)
        for piece in pieces(len(blocks), out.device, self.weights):
            values[piece] = self.decode(blocks[piece])

    def packed_rows(self, dtype: torch.dtype, cuda: bool) -> int:
        return packed_rows(dtype, cuda)

    def linear(self, x: Tensor, planes: Mapping[str, Tensor], shape: Shape, out: Tensor | None = None) -> Tensor | None:
        def multiply_(x: Tensor, out: Tensor) -> None:
            from wsm.formats.gguf_kernels import multiply_blocks_

            multiply_blocks_(self.name, x, planes["blocks"], out)

        return packed_product(x, shape[0], out, multiply_)


NOT_ENCODED = "blocks of {} come from a GGUF file, no other weights are put into them; use --weight-format int4 or int8"


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a place of each block: float32 ``[n, 1]``."""
    return blocks.view(torch.float16)[:, at // 2].float().unsqueeze(1)


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """Codes of 4 bits: of each ``width`` bytes all low ones, then all high ones; uint8 ``[n, 2 x bytes]``."""
    parts = codes.reshape(len(codes), -1, width)
    return torch.stack((parts & 15, parts >> 4), 2).flatten(1)


def _fields(codes: Tensor, width: int, bits: int) -> Tensor:
    """As :func:`_nibbles`, of codes of 1 or 2 bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).unsqueeze(1)
    return (codes.reshape(len(codes), -1, 1, width) >> shifts & ((1 << bits) - 1)).flatten(1)


def _with_fifth(codes: Tensor, fifth: Tensor) -> Tensor:
    """Codes of 5 bits, of nibbles and of 4 bytes that hold a bit of each of 32 weights."""
    bits = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return codes | (fifth.unsqueeze(-1) >> bits & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:], 16).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:], 16).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _with_fifth(_nibbles(blocks[:, 6:], 16), blocks[:, 2:6])
    return codes.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _with_fifth(_nibbles(blocks[:, 8:], 16), blocks[:, 4:8])
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _grouped(blocks: Tensor, codes: Tensor) -> Tensor:
    """Of ``q4_K`` and ``q5_K``: 8 groups of 32 codes, whose scales and mins are 6 bits each, in the bytes 4 to 15."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | (low >> 2 & 0x30)), 1).float().mul_(_half(blocks, 0))
    mins = torch.cat((middle & 63, high >> 4 | (middle >> 2 & 0x30)), 1).float().mul_(_half(blocks, 2))
    wide = codes.reshape(-1, 8, 32).float()
    return wide.mul_(scales.unsqueeze(-1)).sub_(mins.unsqueeze(-1)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _grouped(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    return _grouped(blocks, _nibbles(blocks[:, 48:], 32) | _fields(blocks[:, 16:48], 32, 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, :128], 64) | _fields(blocks[:, 128:192], 32, 2) << 4
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return codes.reshape(-1, 16, 16).float().sub_(32).mul_(scales.unsqueeze(-1)).flatten(1)


TYPES = {
    found.name: found
    for found in (
        BlockType("q4_0", 32, 18, _q4_0),
        BlockType("q4_1", 32, 20, _q4_1, min_at=2, min_of_scale=-7.5),
        BlockType("q5_0", 32, 22, _q5_0),
        BlockType("q5_1", 32, 24, _q5_1, min_at=2, min_of_scale=-15.5),
        BlockType("q8_0", 32, 34, _q8_0),
        BlockType("q4_K", 256, 144, _q4_k, min_at=2, min_of_scale=7.5),
        BlockType("q5_K", 256, 176, _q5_k, min_at=2, min_of_scale=15.5),
        BlockType("q6_K", 256, 210, _q6_k, scale_at=208),
    )
}
