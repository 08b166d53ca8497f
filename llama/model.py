"""The transformer: layers outside, chunks of tokens inside, over weights that it is handed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from llama.batch import Segment, TokenBatch, cut
from llama.checkpoint.names import GroupId
from llama.config import ModelConfig, RopeScaling
from llama.kv_cache import KVCache
from llama.weights import WeightSource


def scaled_frequencies(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies for contexts beyond the original one.

    ``llama3``: wavelengths beyond ``original / low_freq_factor`` are divided by ``factor``, those below
    ``original / high_freq_factor`` are kept, and between them the two are blended (Llama 3.1's model card and code).
    """
    if scaling.kind == "linear":
        return freqs / scaling.factor
    wavelength = 2 * math.pi / freqs
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def rotary_table(config: ModelConfig, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 ``[tokens, head_dim / 2]`` (Su et al. 2021, Meta's interleaved pairs)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        freqs = scaled_frequencies(freqs, config.rope_scaling)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), freqs)
    return angles.cos().to(device), angles.sin().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in float32 on interleaved pairs: x ``[n, heads, head_dim]``, cos and sin ``[n, 1, head_dim / 2]``."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, in float32, rounded before the weight is applied (as the reference models do)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class Transformer:
    """A LLaMA over any :class:`WeightSource`.

    Args:
        weights: hands out groups in pass order, and the globals.
        max_tokens: the longest row, prompt and new tokens together.
    """

    def __init__(self, config: ModelConfig, weights: WeightSource, device: torch.device, max_tokens: int) -> None:
        self.config, self.weights, self.device = config, weights, device
        self._cos, self._sin = rotary_table(config, max_tokens, device)

    def forward(
        self, batch: TokenBatch, kv: KVCache, *, chunk_tokens: int, logits: Literal["last", "all"] = "last"
    ) -> Tensor:
        """One pass through all layers; appends to ``kv``.

        Args:
            chunk_tokens: the most tokens that are computed at once while a group is here.
            logits: of each row's last token, float32 ``[rows, vocab]``, or of all, float32 ``[N, vocab]``.
        """
        h = F.embedding(batch.tokens, self.weights.globals["tok_embeddings"])  # [N, dim]
        chunks = [(slice(c[0].offset, c[-1].offset + c[-1].length), c) for c in cut(batch.segments, chunk_tokens)]
        if batch.lengths is not None:
            chunks = [(slice(0, batch.n_tokens), batch.segments)]
        cos, sin = self._cos[batch.positions].unsqueeze(1), self._sin[batch.positions].unsqueeze(1)
        mask = self._decode_mask(batch)
        for layer in range(self.config.n_layers):
            keys, values = kv.keys(layer), kv.values(layer)
            with self.weights.acquire(GroupId(layer, "attn")) as w:
                for part, segments in chunks:
                    q, k, v = self._project(h[part], w, cos[part], sin[part])
                    if batch.lengths is None:
                        out = self._attend_segments(q, k, v, keys, values, segments)
                    else:
                        out = self._attend_decode(q, k, v, keys, values, batch, mask)
                    h[part] += F.linear(out, w["wo"])
            with self.weights.acquire(GroupId(layer, "ffn")) as w:
                for part, _ in chunks:
                    h[part] += self._feed_forward(h[part], w)
        return self._head(h[batch.last] if logits == "last" else h)

    def _project(self, h: Tensor, w: Mapping[str, Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[n, n_heads, head_dim]``, keys and values ``[n, n_kv_heads, head_dim]`` of a chunk."""
        x = rms_norm(h, w["attention_norm"], self.config.norm_eps)
        shape = (-1, self.config.head_dim)
        q, k, v = (F.linear(x, w[name]).unflatten(-1, shape) for name in ("wq", "wk", "wv"))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _attend_segments(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, segments: tuple[Segment, ...]
    ) -> Tensor:
        """Causal attention of each segment over its own row so far; ``[n, n_heads * head_dim]``."""
        out = torch.empty_like(q)
        first = segments[0].offset
        for segment in segments:
            part = slice(segment.offset - first, segment.offset - first + segment.length)
            end = segment.start_pos + segment.length
            keys[segment.row, :, segment.start_pos : end] = k[part].transpose(0, 1)
            values[segment.row, :, segment.start_pos : end] = v[part].transpose(0, 1)
            out[part] = _causal_attention(
                q[part].transpose(0, 1),
                keys[segment.row, :, :end],
                values[segment.row, :, :end],
            ).transpose(0, 1)
        return out.flatten(1)

    def _attend_decode(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, batch: TokenBatch, mask: Tensor | None
    ) -> Tensor:
        """One query a row over all its KV; the query heads that share a KV head stand where positions would."""
        rows, n_kv = q.shape[0], self.config.n_kv_heads
        assert batch.lengths is not None
        longest = max(batch.lengths)
        keys[batch.last, :, batch.positions] = k
        values[batch.last, :, batch.positions] = v
        grouped = q.view(rows, n_kv, -1, self.config.head_dim)  # [B, n_kv_heads, n_rep, head_dim]
        out = F.scaled_dot_product_attention(grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
        return out.reshape(rows, -1)

    def _decode_mask(self, batch: TokenBatch) -> Tensor | None:
        """Which KV tokens a row has, bool ``[B, 1, 1, longest]``; None where all rows are equally long."""
        if batch.lengths is None or len(set(batch.lengths)) == 1:
            return None
        places = torch.arange(max(batch.lengths), device=self.device)
        return (places <= batch.positions.unsqueeze(1))[:, None, None, :]

    def _feed_forward(self, h: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        x = rms_norm(h, w["ffn_norm"], self.config.norm_eps)
        gate = F.silu(F.linear(x, w["w1"]), inplace=True)
        return F.linear(gate.mul_(F.linear(x, w["w3"])), w["w2"])

    def _head(self, h: Tensor) -> Tensor:
        w = self.weights.globals
        head = w.get("output", w["tok_embeddings"])
        return F.linear(rms_norm(h, w["norm"], self.config.norm_eps), head).float()


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q ``[n_heads, n, head_dim]`` over k, v ``[n_kv_heads, end, head_dim]``: the last n of ``end`` positions."""
    length, end = q.shape[1], k.shape[1]
    n_rep = q.shape[0] // k.shape[0]
    if n_rep > 1:
        k, v = k.repeat_interleave(n_rep, dim=0), v.repeat_interleave(n_rep, dim=0)
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if length == end:
        return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1).squeeze(0)
    if length == 1:
        return F.scaled_dot_product_attention(q, k, v).squeeze(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(length, end)).squeeze(0)
