"""``exact``: bfloat16 at 1.5 bytes a weight, bit for bit: most exponents of a matrix lie in a window of 15."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wsm.errors import StoreError, UnusableInput
from wsm.formats.backend import kernels_for
from wsm.formats.format import Plane, Shape, check_planes, pieces, total_bytes
from wsm.formats.spread import each_piece

BLOCK_WEIGHTS = 1 << 16
"""Escapes are found by block, and by a uint16 inside of it."""
WINDOW = 15
"""Exponents that a 4-bit code names; the code 15 says: look in the list of escapes."""
_EXPONENT_BITS = 0x7F80
_LAST_BASE = 256 - WINDOW


@dataclass(frozen=True, slots=True)
class Exact:
    """Weights in row order, n of them: a byte of sign and mantissa, 4 bits of exponent, and the list of escapes.

    ``signs``     uint8  [n rounded up to even]  sign in the high bit, 7 bits of mantissa
    ``codes``     uint8  [n / 2, rounded up]     exponent - base, or 15; the even weight in the low bits
    ``base``      uint8  [1]                     the window's first exponent
    ``counts``    uint32 [blocks]                escapes up to the end of each block of 65 536 weights
    ``places``    uint16 [escapes]               inside their block, ascending
    ``exponents`` uint8  [escapes]
    """

    pays_below: float = 0.95
    """Of the plain size: a matrix that would take more stays plain."""
    name = "exact"
    exact = True

    @classmethod
    def named(cls, name: str) -> Exact | None:
        return cls() if name == cls.name else None

    def planes(self, shape: Shape, dtype: torch.dtype) -> None:
        return None

    def least_planes(self, shape: Shape, dtype: torch.dtype) -> tuple[Plane, ...]:
        return _planes(shape[0] * shape[1], 0)

    def planes_of(self, shape: Shape, seen: Tensor) -> tuple[Plane, ...] | None:
        """The planes of a matrix in which each of the 256 exponents is ``seen`` so often; None: it stays plain."""
        weights = shape[0] * shape[1]
        planned = _planes(weights, _window(seen)[1])
        return planned if sum(plane.nbytes for plane in planned) <= self.pays_below * 2 * weights else None

    def base_of(self, seen: Tensor) -> int:
        """The window's first exponent for such a matrix."""
        return _window(seen)[0]

    def most_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        plain = shape[0] * shape[1] * dtype.itemsize
        return max(total_bytes([Plane("plain", dtype, shape)]), int(self.pays_below * plain) + total_bytes(_some()))

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor] | None:
        if weight.dtype != torch.bfloat16:
            raise UnusableInput(f"the weight format exact holds bfloat16, not {weight.dtype}; use --dtype bfloat16")
        bits = weight.contiguous().view(torch.int16).flatten()
        seen = count_exponents(bits)
        if (planned := self.planes_of((weight.shape[0], weight.shape[1]), seen)) is None:
            return None
        base = self.base_of(seen)
        planes = {p.name: weight.new_zeros(p.shape, dtype=p.dtype) for p in planned}
        planes["base"].fill_(base)
        _fill_(planes, bits, base)
        return planes

    def check(self, shape: Shape, planes: Mapping[str, Tensor]) -> None:
        weights = shape[0] * shape[1]
        check_planes(self.name, _planes(weights, planes["places"].numel() if "places" in planes else 0), planes)
        if (base := int(planes["base"])) > _LAST_BASE:
            raise StoreError(f"exact: the window begins at exponent {base}; the last place it can is {_LAST_BASE}")
        counts, places = planes["counts"].long(), planes["places"].long()
        if bool((counts.diff(prepend=counts.new_zeros(1)) < 0).any()) or int(counts[-1]) != places.numel():
            raise StoreError(f"exact: the counts of escapes do not rise to the {places.numel()} that there are")
        at = _escaped(counts, places)
        if bool((at.diff() <= 0).any()):
            raise StoreError("exact: escapes are out of order, or beyond their block")
        if places.numel() and int(at[-1]) >= weights:
            raise StoreError(f"exact: an escape is at weight {int(at[-1])} of {weights}")
        if bool((planes["codes"][at // 2] >> (at % 2 * 4).byte() & WINDOW != WINDOW).any()):
            raise StoreError("exact: an escape is listed for a weight whose code is not the escape")
        if (escaped := _count_escapes(planes["codes"])) != places.numel():
            raise StoreError(f"exact: {escaped} codes are the escape, and {places.numel()} are listed")

    def decode_(self, planes: Mapping[str, Tensor], out: Tensor) -> None:
        if (kernels := kernels_for(out)) is not None and out.numel() % 2 == 0 and out.data_ptr() % 4 == 0:
            kernels.decode_exact_(planes, out)
        else:
            _decode_(planes, out)

    def packed_rows(self, dtype: torch.dtype, cuda: bool) -> int:
        return 0

    def linear(self, x: Tensor, planes: Mapping[str, Tensor], shape: Shape, out: Tensor | None = None) -> None:
        return None


def _planes(weights: int, escapes: int) -> tuple[Plane, ...]:
    pairs, blocks = -(-weights // 2), -(-weights // BLOCK_WEIGHTS)
    return (
        Plane("signs", torch.uint8, (2 * pairs,)),
        Plane("codes", torch.uint8, (pairs,)),
        Plane("base", torch.uint8, (1,)),
        Plane("counts", torch.uint32, (blocks,)),
        Plane("places", torch.uint16, (escapes,)),
        Plane("exponents", torch.uint8, (escapes,)),
    )


def _some() -> tuple[Plane, ...]:
    """What rounding up can add: a little of every plane."""
    return _planes(1, 1)


def _exponents(bits: Tensor) -> Tensor:
    """uint8, of bfloat16 ``bits`` as int16: what is above falls away."""
    return (bits >> 7).to(torch.uint8)


def count_exponents(bits: Tensor) -> Tensor:
    """How often each exponent is in bfloat16 ``bits`` as int16: int64 ``[256]`` on the CPU."""
    found = list[Tensor]()
    each_piece(
        lambda piece: found.append(torch.bincount(_exponents(bits[piece]), minlength=256)), bits.numel(), bits.device
    )
    return torch.stack(found).sum(0).cpu()


def _window(seen: Tensor) -> tuple[int, int]:
    """The first exponent of the window with the fewest escapes (the lowest of several), and how many there are."""
    inside = seen.unfold(0, WINDOW, 1).sum(1).tolist()
    base = inside.index(max(inside))
    return base, int(seen.sum()) - inside[base]


def _fill_(planes: Mapping[str, Tensor], bits: Tensor, base: int) -> None:
    """Fill the planes that are as long as the matrix or its escapes; a piece is whole blocks."""
    escapes = dict[int, tuple[Tensor, Tensor, Tensor]]()  # places, exponents and counts of each piece

    def fill(piece: slice) -> None:
        part = bits[piece]
        exponents = _exponents(part)
        codes = (exponents - base).clamp_(max=WINDOW)  # what is below the window wraps round to above it
        planes["signs"][piece] = ((part >> 8 & 0x80) | (part & 0x7F)).to(torch.uint8)
        pairs = planes["codes"][piece.start // 2 : (piece.stop + 1) // 2]
        pairs.copy_(codes[::2])
        pairs[: part.numel() // 2] |= codes[1::2] << 4
        at = (codes == WINDOW).nonzero().flatten()
        blocks = torch.arange(1, -(-part.numel() // BLOCK_WEIGHTS) + 1, device=bits.device)
        counts = torch.searchsorted(at, blocks * BLOCK_WEIGHTS)
        escapes[piece.start] = (at % BLOCK_WEIGHTS).to(torch.uint16), exponents[at], counts

    each_piece(fill, bits.numel(), bits.device)
    places, exponents, counts = zip(*(found for _, found in sorted(escapes.items())), strict=True)
    planes["places"].copy_(torch.cat(places))
    planes["exponents"].copy_(torch.cat(exponents))
    before = torch.tensor([0, *map(len, places)]).cumsum(0).tolist()
    planes["counts"].copy_(torch.cat([earlier + own for earlier, own in zip(before, counts, strict=False)]))


def _count_escapes(codes: Tensor) -> int:
    """How many 4-bit codes are the escape."""
    pairs = (codes[piece].numpy() for piece in pieces(codes.numel(), codes.device))  # it counts faster than torch
    return sum(np.count_nonzero(pair >= WINDOW << 4) + np.count_nonzero(pair & WINDOW == WINDOW) for pair in pairs)


def _escaped(counts: Tensor, places: Tensor) -> Tensor:
    """The weights that are escapes, int64 ``[escapes]``, of int64 ``counts`` and ``places``."""
    listed = torch.arange(places.numel(), device=places.device)
    return torch.searchsorted(counts, listed, right=True) * BLOCK_WEIGHTS + places


def _decode_(planes: Mapping[str, Tensor], out: Tensor) -> None:
    """The reference: the other decoders give its bits."""
    bits, signs = out.view(torch.int16).flatten(), planes["signs"].view(torch.int8)
    base = planes["base"].to(torch.int16)
    for piece in pieces(-(-bits.numel() // 2), bits.device, 2):
        codes = planes["codes"][piece]
        exponents = torch.stack((codes & 15, codes >> 4), 1).flatten().to(torch.int16).add_(base).bitwise_left_shift_(7)
        weights = slice(2 * piece.start, min(2 * piece.stop, bits.numel()))
        _join_(bits[weights], signs[weights], exponents[: weights.stop - weights.start])
    if planes["places"].numel():
        at = _escaped(planes["counts"].long(), planes["places"].long())
        escaped = torch.empty_like(at, dtype=torch.int16)
        _join_(escaped, signs[at], planes["exponents"].to(torch.int16) << 7)
        bits[at] = escaped


def _join_(bits: Tensor, signs: Tensor, exponents: Tensor) -> None:
    """Bits of bfloat16: sign and mantissa, whose sign the conversion carries to the top, and shifted exponents."""
    bits.copy_(signs).bitwise_and_(~_EXPONENT_BITS).bitwise_or_(exponents)
