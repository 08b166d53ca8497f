"""What a weight format is: the planes that a matrix lies in at rest, and how its values come back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from wsm.errors import StoreError, UnusableInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PLANE_ALIGNMENT = 512
"""What each plane is aligned to in an image, as every tensor is."""
MOST_ROWS = 16
"""Of ``x`` in a packed product: the smallest tile of the tensor cores, so 16 rows take the time of one."""
CPU_PIECE, GPU_PIECE = 1 << 18, 1 << 24
"""Weights that are encoded or decoded at once by torch: a cache full, and enough to fill a GPU."""

Shape = tuple[int, int]
"""Rows (outputs) and columns (inputs) of a matrix."""


class Plane(NamedTuple):
    """One of the arrays that a matrix lies in at rest."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFormat(Protocol):
    """How a matrix ``[rows, cols]`` lies at rest. Formats keep no state: one may be used by several threads at once."""

    @property
    def name(self) -> str:
        """As ``--weight-format`` and the manifest spell it."""

    @property
    def exact(self) -> bool:
        """Whether the decoded matrix is the encoded one bit for bit."""

    def planes(self, shape: Shape, dtype: torch.dtype) -> tuple[Plane, ...] | None:
        """The planes of a matrix of compute dtype ``dtype``, in their order; None where sizes depend on its values."""

    def least_planes(self, shape: Shape, dtype: torch.dtype) -> tuple[Plane, ...]:
        """Those of :meth:`planes`, or of a matrix whose values take the least: what can be planned with."""

    def most_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """The most bytes a matrix takes, plain ones included; each plane rounded up to ``PLANE_ALIGNMENT``."""

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor] | None:
        """The planes of ``weight [rows, cols]``, contiguous and on its device; the same bytes whatever the threads.

        ``importance`` is the mean square of each input channel, float32 ``[cols]``: what errors are weighted with; or
        the mean product of each two, ``[cols, cols]``: then later columns make up for the errors of earlier ones.
        None where the format does not pay for this matrix: it stays plain.
        UnusableInput for a dtype or for values that the format cannot hold.
        """

    def check(self, shape: Shape, planes: Mapping[str, Tensor]) -> None:
        """StoreError where planes (on the CPU) are not what :meth:`encode` can have made of a matrix of ``shape``."""

    def decode_(self, planes: Mapping[str, Tensor], out: Tensor) -> None:
        """Put the values into ``out [rows, cols]``, contiguous, of the compute dtype, on the device of ``planes``.

        The planes must have passed :meth:`check`. On CUDA it waits for nothing on the host, so that it can be captured.
        """

    def linear(self, x: Tensor, planes: Mapping[str, Tensor], shape: Shape, out: Tensor | None = None) -> Tensor | None:
        """``x weight^T`` ``[n, rows]`` of ``x [n, cols]`` straight from the planes; None: decode, then multiply.

        ``out`` is where to put it: its rows may lie apart. A row's result does not depend on the other rows, and
        whether there is one depends on nothing but dtype, device and shapes.
        """

    def packed_rows(self, dtype: torch.dtype, cuda: bool) -> int:
        """The most rows of which :meth:`linear` makes the product, on CUDA or elsewhere; 0 where it makes none."""


class SizedByShape(ABC):
    """The planes of a format whose sizes follow from a matrix's shape: none takes more or less."""

    __slots__ = ()

    @abstractmethod
    def planes(self, shape: Shape, dtype: torch.dtype | None = None) -> tuple[Plane, ...]:
        """As :meth:`WeightFormat.planes`."""

    def least_planes(self, shape: Shape, dtype: torch.dtype) -> tuple[Plane, ...]:
        """As :meth:`WeightFormat.least_planes`."""
        return self.planes(shape)

    def most_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """As :meth:`WeightFormat.most_bytes`."""
        return total_bytes(self.planes(shape))


def total_bytes(planes: Iterable[Plane]) -> int:
    """Bytes of ``planes``, each rounded up to ``PLANE_ALIGNMENT``."""
    return sum(-(-plane.nbytes // PLANE_ALIGNMENT) * PLANE_ALIGNMENT for plane in planes)


def pieces(total: int, device: torch.device, unit: int = 1) -> Iterator[slice]:
    """``total`` cut so that a piece, of things of ``unit`` weights each, is small enough to be worked on at once."""
    step = max(1, (GPU_PIECE if device.type == "cuda" else CPU_PIECE) // unit)
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))


def check_planes(name: str, expected: Iterable[Plane], found: Mapping[str, Tensor]) -> None:
    """StoreError unless ``found`` are the ``expected`` planes of format ``name``."""
    wanted = {plane.name: plane for plane in expected}
    if missing := set(wanted) ^ set(found):
        raise StoreError(f"{name}: planes {', '.join(wanted)} belong to a matrix, not {', '.join(missing)}")
    for plane in wanted.values():
        have = found[plane.name]
        if have.dtype != plane.dtype or tuple(have.shape) != plane.shape:
            raise StoreError(
                f"{name}: the plane {plane.name} is {have.dtype} {list(have.shape)}, "
                f"where {plane.dtype} {list(plane.shape)} belongs"
            )


def check_finite(name: str, plane: str, values: Tensor) -> None:
    """StoreError where ``values`` of a plane hold NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise StoreError(f"{name}: the plane {plane} holds NaN or infinity")


def finite_float(weight: Tensor, name: str) -> Tensor:
    """``weight`` as float32; UnusableInput where a value is NaN or infinite."""
    wide = weight.float()
    if not bool(wide.isfinite().all()):
        raise UnusableInput(f"a weight is NaN or infinite, which {name} cannot hold; use --weight-format exact")
    return wide
