"""``int4`` and ``int8``: groups of inputs share a scale and, where the format has it, a zero."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wsm.errors import StoreError
from wsm.formats.backend import kernels_for, packed_product, packed_rows
from wsm.formats.feedback import round_with_feedback
from wsm.formats.format import (
    Plane,
    Shape,
    SizedByShape,
    check_finite,
    check_planes,
    finite_float,
    pieces,
)
from wsm.formats.search import Grid, weights_of
from wsm.formats.spread import each_piece

_NAME = re.compile(
    r"int(?P<bits>[48])(-g(?P<group>32|64)|-(?P<row>row))?(-(?P<scale>float16|float32))?(-(?P<zero>zero|sym))?"
)
_SCALES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Integer(SizedByShape):
    """A value is ``float32(q - zero) * float32(scale)``, rounded once to the compute dtype, without a fused add.

    ``values`` uint8 ``[rows, cols]``, or for 4 bits ``[rows, cols / 2 rounded up]``, the even column in the low bits;
    ``scales`` ``[rows, groups]``; ``zeros`` uint8 ``[rows, groups]``, absent where the zero is the middle, 8 or 128.
    The last group of a row may be short. ``group`` 0: the whole row.
    """

    bits: int
    group: int = 128
    scale: str = "bfloat16"
    has_zero: bool = False
    exact = False

    @classmethod
    def named(cls, name: str) -> Integer | None:
        """``int4`` is ``int4-zero`` in groups of 128, ``int8`` is ``int8-sym``; imports use the others, as
        ``int4-g32-float16-sym``: group, dtype of the scales, whether there are zeros."""
        if (match := _NAME.fullmatch(name)) is None:
            return None
        bits, group = int(match["bits"]), int(match["group"] or 128)
        has_zero = match["zero"] == "zero" if match["zero"] else bits == 4
        found = cls(bits, 0 if match["row"] else group, match["scale"] or "bfloat16", has_zero)
        return found if found.name == name else None

    @property
    def name(self) -> str:
        group = {0: "-row", 128: ""}.get(self.group, f"-g{self.group}")
        scale = "" if self.scale == "bfloat16" else f"-{self.scale}"
        zero = "" if self.has_zero == (self.bits == 4) else ("-zero" if self.has_zero else "-sym")
        return f"int{self.bits}{group}{scale}{zero}"

    def planes(self, shape: Shape, dtype: torch.dtype | None = None) -> tuple[Plane, ...]:
        rows, cols = shape
        grouped = (rows, self._groups(cols))
        values = Plane("values", torch.uint8, (rows, cols if self.bits == 8 else -(-cols // 2)))
        zeros = (Plane("zeros", torch.uint8, grouped),) if self.has_zero else ()
        return values, Plane("scales", _SCALES[self.scale], grouped), *zeros

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        rows, cols = weight.shape
        planes = {p.name: weight.new_empty(p.shape, dtype=p.dtype) for p in self.planes((rows, cols))}
        groups, width = self._groups(cols), self.group or cols
        grid = Grid(self.bits, self.has_zero, _SCALES[self.scale])
        if importance is not None and importance.dim() == 2:
            found = round_with_feedback(grid, finite_float(weight, self.name).clone(), importance, width)
            self._put_(planes, slice(None), *found)
            return planes
        pad = groups * width - cols
        by_group = None if importance is None else F.pad(weights_of(importance), (0, pad)).view(1, groups, width)

        def encode_rows(part: slice) -> None:
            wide = F.pad(finite_float(weight[part], self.name), (0, pad)).view(-1, groups, width)
            scales, zeros = grid.nearest(wide) if by_group is None else grid.search(wide, by_group)
            codes = grid.codes(wide, scales, zeros).flatten(1)[:, :cols].to(torch.uint8)
            self._put_(planes, part, codes, scales.squeeze(-1), zeros.squeeze(-1))

        each_piece(encode_rows, rows, weight.device, cols)
        return planes

    def _put_(self, planes: Mapping[str, Tensor], rows: slice, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        planes["scales"][rows] = scales
        if self.has_zero:
            planes["zeros"][rows] = zeros.to(torch.uint8)
        planes["values"][rows] = codes if self.bits == 8 else _paired(codes)

    def check(self, shape: Shape, planes: Mapping[str, Tensor]) -> None:
        check_planes(self.name, self.planes(shape), planes)
        check_finite(self.name, "scales", planes["scales"])
        if self.has_zero and int(planes["zeros"].max()) > 1 << self.bits:
            raise StoreError(
                f"{self.name}: a zero of the plane zeros is {int(planes['zeros'].max())}, beyond the codes"
            )

    def decode_(self, planes: Mapping[str, Tensor], out: Tensor) -> None:
        """The torch part is the reference: the other decoders give its bits."""
        values, scales, zeros = planes["values"], planes["scales"], planes.get("zeros")
        kernels = kernels_for(out)
        if kernels is not None and self.bits == 8:
            kernels.decode_bytes_(values, scales, zeros, out, group=self.group)
            return
        if kernels is not None and out.shape[1] % 2 == 0 and out.data_ptr() % (2 * out.element_size()) == 0:
            kernels.decode_int4_(values, scales, zeros, out, group=self.group)
            return
        rows, cols = out.shape
        groups, width = self._groups(cols), self.group or cols
        for part in pieces(rows, out.device, cols):
            codes = values[part] if self.bits == 8 else _apart(values[part])[:, :cols]
            wide = F.pad(codes.float(), (0, groups * width - cols)).view(-1, groups, width)
            wide -= (1 << self.bits - 1) if zeros is None else zeros[part].float().unsqueeze(-1)
            wide *= scales[part].float().unsqueeze(-1)
            out[part] = wide.flatten(1)[:, :cols]

    def packed_rows(self, dtype: torch.dtype, cuda: bool) -> int:
        return packed_rows(dtype, cuda)

    def linear(self, x: Tensor, planes: Mapping[str, Tensor], shape: Shape, out: Tensor | None = None) -> Tensor | None:
        def multiply_(x: Tensor, out: Tensor) -> None:
            from wsm.formats import product_kernels

            given = planes["values"], planes["scales"], planes.get("zeros")
            product_kernels.multiply_(x, *given, out, bits=self.bits, group=self.group)

        return packed_product(x, shape[0], out, multiply_)

    def _groups(self, cols: int) -> int:
        return -(-cols // self.group) if self.group else 1


def _paired(codes: Tensor) -> Tensor:
    """Two codes a byte, uint8 ``[rows, cols / 2 rounded up]``, the even column in the low bits."""
    even = F.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def _apart(pairs: Tensor) -> Tensor:
    """uint8 ``[rows, 2 x bytes]``: what :func:`_paired` put together."""
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)
