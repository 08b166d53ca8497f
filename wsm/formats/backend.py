"""Whether the Triton kernels can be used; without them torch decodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from wsm.formats.format import MOST_ROWS


@cache
def _loaded() -> tuple[ModuleType | None, str]:
    """The kernels, and what decodes in words. They are tried once: Triton also needs a C compiler."""
    try:
        from wsm.formats import kernels

        kernels.try_out(torch.device("cuda"))
    except Exception as error:  # whatever keeps Triton from working: torch does the same, only slower
        return None, f"torch (Triton does not work here: {str(error).strip().splitlines()[0]})"
    return kernels, f"Triton {kernels.VERSION}"


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The Triton kernels where they work on the device of ``tensor``, else None."""
    return loaded_kernels() if tensor.is_cuda else None


def loaded_kernels() -> ModuleType | None:
    """The Triton kernels where they work on the CUDA device, else None."""
    return _loaded()[0]


def has_kernels() -> bool:
    """Whether a CUDA device has the Triton kernels.

    A plan for a card, made where there is none to try them on, takes them to work: torch for CUDA brings Triton along.
    """
    return not torch.cuda.is_available() or loaded_kernels() is not None


def packed_rows(dtype: torch.dtype, cuda: bool) -> int:
    """The most rows of ``dtype`` of which a format makes its packed product, on CUDA or elsewhere; 0: of none."""
    return MOST_ROWS if cuda and dtype.itemsize == 2 and has_kernels() else 0


def packed_product(
    x: Tensor, rows: int, out: Tensor | None, multiply_: Callable[[Tensor, Tensor], None]
) -> Tensor | None:
    """``out [n, rows]``, made where it is not given, that ``multiply_(x, out)`` has filled; None where no kernel takes
    ``x [n, cols]``."""
    if kernels_for(x) is None:
        return None
    from wsm.formats.product_kernels import can_multiply

    if not can_multiply(x):
        return None
    if out is None:
        out = x.new_empty(x.shape[0], rows)
    multiply_(x, out)
    return out


def decoder(device: torch.device) -> str:
    """What decodes on ``device``, in words: Triton with its version, or torch and why."""
    return _loaded()[1] if device.type == "cuda" else "torch"
