"""The KV cache on the compute device."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.config import ModelConfig

BLOCK_TOKENS = 256
"""Room for KV is taken in blocks of so many tokens."""


def padded_tokens(tokens: int) -> int:
    """``tokens`` rounded up to whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def kv_bytes(config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of ``batch`` rows of up to ``tokens`` tokens."""
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
    return batch * padded_tokens(tokens) * per_token


class KVCache:
    """Keys and values of every layer and row.

    Args:
        batch: rows.
        tokens: the most a row may hold; rounded up to whole blocks.

    Each layer's ``keys`` and ``values`` are ``[batch, n_kv_heads, tokens, head_dim]``: a row's prefix and the whole
    batch's prefix are both views.
    """

    def __init__(self, config: ModelConfig, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.batch, self.tokens = batch, padded_tokens(tokens)
        shape = (config.n_layers, 2, batch, config.n_kv_heads, self.tokens, config.head_dim)
        self._data = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def keys(self, layer: int) -> Tensor:
        return self._data[layer, 0]

    def values(self, layer: int) -> Tensor:
        return self._data[layer, 1]
