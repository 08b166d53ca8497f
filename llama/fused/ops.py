"""What the model computes between its products, and products with one row: Triton on CUDA, torch elsewhere.

Which of them computes depends on nothing but dtype, device and shapes: all modes take the same one.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from wsm.formats.backend import loaded_kernels


@cache
def _launchers() -> ModuleType | None:
    if loaded_kernels() is None:
        return None
    from llama.fused import launch

    return launch


def launchers_for(x: Tensor) -> ModuleType | None:
    """What launches the Triton kernels, where they work on the device of ``x``; else None."""
    return _launchers() if x.is_cuda else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of ``x [n, dim]``, in float32 and rounded once."""
    launch = launchers_for(x)
    if launch is not None and launch.can_norm(x):
        return launch.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(x: Tensor, part: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add ``part`` to ``x [n, dim]`` in place, and give the norm of it: the bits of ``add_`` and :func:`rms_norm`."""
    launch = launchers_for(x)
    if launch is not None and launch.can_norm(x) and part.is_contiguous():
        return launch.rms_norm(x, weight, eps, part)  # type: ignore[no-any-return]
    return rms_norm(x.add_(part), weight, eps)


def rotate_(heads: Tensor, rotated: int, freqs_cis: Tensor) -> None:
    """RoPE of the first ``rotated`` of ``heads [n, every, head_dim]`` in place, in float32 and rounded once.

    ``freqs_cis`` is complex64 ``[n, 1, head_dim / 2]``.
    """
    if (launch := launchers_for(heads)) is not None:
        launch.rotate_(heads, rotated, freqs_cis)
        return
    x = heads[:, :rotated]
    wide = x.float()
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(freqs_cis)
    if wide is not x:
        x.copy_(wide)


def gate_(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in the memory of ``gate``, both ``[n, ffn_dim]``; the same bits on either way."""
    if (launch := launchers_for(gate)) is not None and gate.is_contiguous() and up.is_contiguous():
        return launch.gate_(gate, up)  # type: ignore[no-any-return]
    return F.silu(gate, inplace=True).mul_(up)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T``, ``[n, rows]``."""
    if (launch := launchers_for(x)) is not None and launch.can_multiply(x, weight):
        return launch.linear(x, weight)  # type: ignore[no-any-return]
    return F.linear(x, weight)


def add_linear_(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add ``x weight^T`` to ``h [n, rows]``."""
    if (launch := launchers_for(x)) is not None and launch.can_multiply(x, weight) and h.stride(1) == 1:
        launch.add_linear_(h, x, weight)
    else:
        h.addmm_(x, weight.t())


def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """``silu(x gate^T) * (x up^T)``, with the bits of :func:`linear` twice and :func:`gate_`."""
    if (launch := launchers_for(x)) is not None and launch.can_multiply(x, gate, up):
        return launch.gated_linear(x, gate, up)  # type: ignore[no-any-return]
    return gate_(linear(x, gate), linear(x, up))


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """One query a row over its keys: ``q [n, n_heads, head_dim]`` -> ``[n, n_heads * head_dim]``.

    ``keys`` and ``values`` are ``[n, n_kv_heads, tokens, head_dim]``; ``mask [n, 1, 1, tokens]`` is added to the
    scores.
    """
    launch = launchers_for(q)
    if launch is not None and launch.can_attend(q, keys, values):
        return launch.attend_rows(q, keys, values, mask)  # type: ignore[no-any-return]
    grouped = q.unflatten(1, (keys.shape[1], -1))  # the heads that share a KV head stand where positions would
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(q.shape[0], -1)
