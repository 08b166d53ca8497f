"""``fp8``: a byte a weight, E4M3 (4 bits of exponent, 3 of mantissa), and a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wsm.errors import StoreError
from wsm.formats.backend import kernels_for
from wsm.formats.format import Plane, Shape, SizedByShape, check_finite, check_planes, finite_float, pieces
from wsm.formats.spread import each_piece

_LARGEST = 448.0
_NAN = 0x7F


@dataclass(frozen=True, slots=True)
class Float8(SizedByShape):
    """A value is ``float32(q) * scale``, rounded once to the compute dtype.

    ``values`` float8_e4m3fn ``[rows, cols]``; ``scales`` float32 ``[rows]``, or ``[1]`` for the whole matrix.
    """

    per_row: bool = True
    exact = False

    @classmethod
    def named(cls, name: str) -> Float8 | None:
        return next((found for found in (cls(), cls(per_row=False)) if found.name == name), None)

    @property
    def name(self) -> str:
        return "fp8" if self.per_row else "fp8-tensor"

    def planes(self, shape: Shape, dtype: torch.dtype | None = None) -> tuple[Plane, ...]:
        scales = Plane("scales", torch.float32, (shape[0] if self.per_row else 1,))
        return Plane("values", torch.float8_e4m3fn, tuple(shape)), scales

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        n_rows, cols = weight.shape
        planes = {p.name: weight.new_empty(p.shape, dtype=p.dtype) for p in self.planes((n_rows, cols))}
        largest = weight.new_empty(n_rows, dtype=torch.float32)

        def look(rows: slice) -> None:
            largest[rows] = finite_float(weight[rows], self.name).abs().amax(1)

        each_piece(look, n_rows, weight.device, cols)
        scales = (largest if self.per_row else largest.amax(0, keepdim=True)) / _LARGEST
        scales[scales == 0] = 1.0
        planes["scales"].copy_(scales)

        def encode_rows(rows: slice) -> None:
            wide = weight[rows].float() / (scales[rows] if self.per_row else scales)[:, None]
            planes["values"][rows] = wide.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)

        each_piece(encode_rows, n_rows, weight.device, cols)
        return planes

    def check(self, shape: Shape, planes: Mapping[str, Tensor]) -> None:
        check_planes(self.name, self.planes(shape), planes)
        check_finite(self.name, "scales", planes["scales"])
        codes = planes["values"].view(torch.uint8).flatten()
        if any(bool((codes[piece] & 0x7F == _NAN).any()) for piece in pieces(codes.numel(), codes.device)):
            raise StoreError(f"{self.name}: the plane values holds NaN")

    def decode_(self, planes: Mapping[str, Tensor], out: Tensor) -> None:
        if (kernels := kernels_for(out)) is not None:
            kernels.decode_bytes_(
                planes["values"].view(torch.uint8), planes["scales"].unsqueeze(1), None, out, e4m3=True
            )
            return
        scales = planes["scales"]
        for rows in pieces(out.shape[0], out.device, out.shape[1]):
            wide = planes["values"][rows].float()
            out[rows] = wide.mul_((scales[rows] if self.per_row else scales)[:, None])

    def packed_rows(self, dtype: torch.dtype, cuda: bool) -> int:
        return 0

    def linear(self, x: Tensor, planes: Mapping[str, Tensor], shape: Shape, out: Tensor | None = None) -> None:
        return None
