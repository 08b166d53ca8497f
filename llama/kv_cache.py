"""The KV cache on the compute device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.batch import Segment
from llama.config import ModelConfig

BLOCK_TOKENS = 256
"""Room for KV is taken in blocks of so many tokens."""


def padded_tokens(tokens: int) -> int:
    """``tokens`` rounded up to whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def attended_tokens(length: int, room: int) -> int:
    """Positions that a decode step attends over where the longest row has ``length``: whole blocks, at most ``room``.

    Beyond 2 048 tokens the steps grow with the length, so that they stay few: at most an eighth is attended in vain.
    """
    step = max(BLOCK_TOKENS, 1 << max(0, length.bit_length() - 4))
    return min(-(-length // step) * step, room)


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
    batch's prefix are both views. ``lengths`` are the tokens that each row holds in every layer, kept on the host.
    """

    def __init__(self, config: ModelConfig, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.batch, self.tokens = batch, padded_tokens(tokens)
        self.lengths = [0] * batch
        shape = (config.n_layers, 2, batch, config.n_kv_heads, self.tokens, config.head_dim)
        # Zeros, not whatever was there: a masked place counts nothing times its value, and nothing times NaN is NaN.
        self._data = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def layer(self, layer: int) -> Tensor:
        """Keys and values, ``[2, batch, n_kv_heads, tokens, head_dim]``."""
        return self._data[layer]

    def keys(self, layer: int) -> Tensor:
        return self._data[layer, 0]

    def values(self, layer: int) -> Tensor:
        return self._data[layer, 1]

    def check(self, segments: Sequence[Segment]) -> None:
        """Raises ValueError unless each segment goes on where its row ends, and fits."""
        for segment in segments:
            if segment.start_pos != self.lengths[segment.row] or segment.end_pos > self.tokens:
                raise ValueError(
                    f"row {segment.row} of the KV cache holds {self.lengths[segment.row]} of {self.tokens} tokens; "
                    f"a pass cannot add positions {segment.start_pos} to {segment.end_pos}"
                )

    def extend(self, segments: Sequence[Segment]) -> None:
        """Count the tokens that a pass has added in every layer."""
        for segment in segments:
            self.lengths[segment.row] = segment.end_pos

    def reset(self) -> None:
        """Empty every row."""
        self.lengths = [0] * self.batch
