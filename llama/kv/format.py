"""How the keys or values of one head and token are stored in the bytes of the KV cache: as they are, or in 8 bits.

Every tier holds KV as uint8 ``[rows, n_kv_heads, tokens, 2, record]``, the 2 being keys and values. Nothing here makes
the host wait for the device, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.fused.ops import launchers_for, rotate_
from llama.kv import KV_DTYPES
from wsm.errors import UnusableInput
from wsm.formats.backend import kernels_for

_SCALE_BYTES, _PADDING_BYTES = 4, 4
_LARGEST = 127


class KVFormat:
    """Writes and reads records of ``record_bytes``; here in the model dtype: what is read is what was written."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        self.record_bytes = head_dim * dtype.itemsize
        self._word = self._dtype = dtype

    def _packed(self, new: Tensor) -> Tensor:
        """Records of ``new`` ``[..., head_dim]``, in words ``[..., words of a record]``."""
        return new

    def write_(self, window: Tensor, rows: Tensor, positions: Tensor, new: Tensor) -> None:
        """Put one token of each row into ``window [R, n_kv_heads, tokens, 2, record]``, uint8.

        ``rows`` and ``positions`` are int64 ``[n]`` on its device, no pair twice; ``new``, in the model dtype, is
        ``[n, 2, n_kv_heads, head_dim]``, keys before values.
        """
        window.view(self._word)[rows, :, positions] = self._packed(new).transpose(1, 2)

    def rotate_and_write_(
        self, window: Tensor, rows: Tensor, positions: Tensor, heads: Tensor, n_heads: int, freqs_cis: Tensor
    ) -> None:
        """Rotate queries and keys of ``heads [n, n_heads + 2 * n_kv_heads, head_dim]``, then :meth:`write_`."""
        launch = launchers_for(heads)
        if launch is not None and self._word == self._dtype:
            launch.rotate_and_write_(heads, n_heads, freqs_cis, window.view(self._dtype), rows, positions)
            return
        n_kv_heads = window.shape[1]
        rotate_(heads, n_heads + n_kv_heads, freqs_cis)
        self.write_(window, rows, positions, heads[:, n_heads:].unflatten(1, (2, n_kv_heads)))

    def write_span_(self, row: Tensor, begin: int, new: Tensor) -> None:
        """Put ``new``, as for :meth:`write_`, into one row ``[n_kv_heads, tokens, 2, record]`` from ``begin`` on."""
        row.view(self._word)[:, begin : begin + new.shape[0]] = self._packed(new).permute(2, 0, 1, 3)

    def read(self, window: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``tokens`` positions, in the model dtype: views where nothing is converted.

        From a window of rows, or one row of it: two tensors ``[..., n_kv_heads, tokens, head_dim]``.
        """
        keys, values = window.view(self._dtype).narrow(-3, 0, tokens).unbind(-2)
        return keys, values


class Int8Format(KVFormat):
    """Records of ``head_dim`` int8 values, a float32 scale and 4 zero bytes; symmetric, one scale per head and token.

    The scale is the largest magnitude / 127; so a value is off by at most half a scale, before the model dtype rounds
    it. The zero bytes keep every 256-token block a multiple of 4096 bytes.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        self.record_bytes = head_dim + _SCALE_BYTES + _PADDING_BYTES
        self._dtype, self._head_dim, self._word = dtype, head_dim, torch.int64

    def _packed(self, new: Tensor) -> Tensor:
        wide = new.float()
        # Never 0: a head of zeros is divided as any other.
        scales = (wide.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        whole = (wide / scales).round().to(torch.int8)
        padding = scales.new_zeros((*scales.shape[:-1], _PADDING_BYTES), dtype=torch.uint8)
        return torch.cat((whole.view(torch.uint8), scales.view(torch.uint8), padding), dim=-1).view(torch.int64)

    def read(self, window: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        records = window.narrow(-3, 0, tokens)
        # Multiplied in float32 and rounded once into the result: on a GPU no float32 copy of the window is made.
        both = torch.empty((*records.shape[:-1], self._head_dim), dtype=self._dtype, device=window.device)
        if kernels_for(window) is not None and window.is_contiguous():
            from llama.kv import int8_kernel

            int8_kernel.read_(window, tokens, both)
        else:
            whole = records[..., : self._head_dim].view(torch.int8)
            scales = records[..., self._head_dim : self._head_dim + _SCALE_BYTES].view(torch.float32)
            torch.mul(whole, scales, out=both)
        keys, values = both.unbind(-2)
        return keys, values


def kv_format(name: str, dtype: torch.dtype, head_dim: int) -> KVFormat:
    """What ``--kv-dtype`` names: ``auto``, the model's ``dtype``, or ``int8``; UnusableInput where neither runs."""
    if name == "auto":
        return KVFormat(dtype, head_dim)
    if name != "int8":
        raise UnusableInput(f"--kv-dtype must be {' or '.join(KV_DTYPES)}, not {name!r}")
    if head_dim % 8:
        raise UnusableInput(
            f"--kv-dtype int8 needs heads of a multiple of 8 values, this model's have {head_dim}: use --kv-dtype auto"
        )
    return Int8Format(dtype, head_dim)
