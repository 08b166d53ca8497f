"""The transformer: layers outside, chunks of tokens inside, over weights that it is handed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

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


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in place, in float32, on interleaved pairs.

    Args:
        x: ``[n, heads, head_dim]``.
        cos, sin: float32 ``[n, 1, head_dim / 2]``.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (even * cos).sub_(odd * sin)
    odd.copy_((even * sin).add_(odd * cos))
    even.copy_(turned)
    return x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, in float32, rounded before the weight is applied (as the reference models do)."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a row's newest positions over all its positions so far; ``[n_heads, n, head_dim]``.

    Args:
        q: ``[n_heads, n, head_dim]``, the last n of the row's ``end`` positions.
        k, v: ``[n_kv_heads, end, head_dim]``.
    """
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    length, end, n_rep = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if n_rep > 1 and not _kernel_shares_kv(q, k, v):
        k, v = k.repeat_interleave(n_rep, dim=1), v.repeat_interleave(n_rep, dim=1)
        n_rep = 1
    starts_here = length == end
    mask = None if starts_here or length == 1 else causal_lower_right(length, end)
    causal = starts_here and length > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=n_rep > 1)
    return out.squeeze(0)


def _kernel_shares_kv(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a fused kernel reads shared KV heads as they are. On CUDA only flash does (16-bit types); where it cannot
    run, ``enable_gqa`` would fall back to a plain product of n x end scores a head."""
    if q.device.type != "cuda":
        return True
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, True))


class Rows(NamedTuple):
    """A chunk of one token a row, of neighbouring rows: attended as one batch over the longest row's positions."""

    first: int
    places: Tensor  # int64 [B]: 0, 1, …, the row inside the chunk
    longest: int
    mask: Tensor | None  # bool [B, 1, 1, longest]: the positions that a row has; None where all are equally long


class Chunk(NamedTuple):
    """Tokens that are computed at once, and what attention needs to know of them; made once a pass."""

    part: slice  # of the packed tokens
    segments: tuple[Segment, ...]
    positions: Tensor  # int64 [n]
    cos: Tensor  # float32 [n, 1, head_dim / 2]
    sin: Tensor
    rows: Rows | None  # None: attended segment by segment


class Transformer:
    """A LLaMA over any :class:`WeightSource`.

    Args:
        weights: hands out groups in pass order, and the globals.
        max_tokens: the longest row, prompt and new tokens together.
    """

    def __init__(self, config: ModelConfig, weights: WeightSource, device: torch.device, max_tokens: int) -> None:
        self.config, self.weights, self.device, self.max_tokens = config, weights, device, max_tokens
        self._cos, self._sin = rotary_table(config, max_tokens, device)

    def forward(
        self, batch: TokenBatch, kv: KVCache, *, chunk_tokens: int, logits: Literal["last", "all"] = "last"
    ) -> Tensor:
        """One pass through all layers; appends to ``kv``. The host never waits for the device in it.

        Args:
            chunk_tokens: the most tokens that are computed at once while a group is here.
            logits: of each row's last token, float32 ``[rows, vocab]``, or of all, float32 ``[N, vocab]``.

        Raises:
            ValueError: if a segment does not go on where its row of ``kv`` ends, or runs past ``max_tokens``.
        """
        kv.check(batch.segments)
        if max(segment.end_pos for segment in batch.segments) > self.max_tokens:
            raise ValueError(f"a row runs past the {self.max_tokens} positions that this model was made for")
        h = F.embedding(batch.tokens, self.weights.globals["tok_embeddings"])  # [N, dim]
        chunks = self._chunks(batch, chunk_tokens)
        for layer in range(self.config.n_layers):
            with self.weights.acquire(GroupId(layer, "attn")) as w:
                for chunk in chunks:
                    h[chunk.part].add_(self._attention(h[chunk.part], w, chunk, kv, layer))
            with self.weights.acquire(GroupId(layer, "ffn")) as w:
                for chunk in chunks:
                    h[chunk.part].add_(self._feed_forward(h[chunk.part], w))
        kv.extend(batch.segments)
        return self._head(h[batch.last] if logits == "last" else h, chunk_tokens)

    def _chunks(self, batch: TokenBatch, chunk_tokens: int) -> list[Chunk]:
        cos, sin = self._cos[batch.positions].unsqueeze(1), self._sin[batch.positions].unsqueeze(1)
        chunks = []
        for segments in cut(batch.segments, chunk_tokens):
            part = slice(segments[0].offset, segments[-1].offset + segments[-1].length)
            positions = batch.positions[part]
            rows = self._rows(segments, positions)
            chunks.append(Chunk(part, segments, positions, cos[part], sin[part], rows))
        return chunks

    def _rows(self, segments: tuple[Segment, ...], positions: Tensor) -> Rows | None:
        first = segments[0].row
        if any(s.length != 1 or s.row != first + place for place, s in enumerate(segments)):
            return None
        longest = max(segment.end_pos for segment in segments)
        mask = None
        if any(segment.end_pos != longest for segment in segments):
            mask = torch.arange(longest, device=self.device) <= positions.unsqueeze(1)  # [B, longest]
            mask = mask[:, None, None, :]
        return Rows(first, torch.arange(len(segments), device=self.device), longest, mask)

    def _attention(self, h: Tensor, w: Mapping[str, Tensor], chunk: Chunk, kv: KVCache, layer: int) -> Tensor:
        """What attention adds to a chunk ``[n, dim]``; its keys and values go into the cache."""
        x = rms_norm(h, w["attention_norm"], self.config.norm_eps)
        q, k, v = (F.linear(x, w[name]).unflatten(-1, (-1, self.config.head_dim)) for name in ("wq", "wk", "wv"))
        del x
        q, k = rotate_(q, chunk.cos, chunk.sin), rotate_(k, chunk.cos, chunk.sin)
        if chunk.rows is None:
            out = self._attend_segments(q, k, v, chunk, kv.keys(layer), kv.values(layer))
        else:
            out = self._attend_rows(q, k, v, chunk.rows, chunk.positions, kv.keys(layer), kv.values(layer))
        return F.linear(out, w["wo"])

    def _attend_segments(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, keys: Tensor, values: Tensor) -> Tensor:
        """Each segment over its own row so far; ``[n, n_heads * head_dim]``, in the memory of q."""
        first = chunk.part.start
        for segment in chunk.segments:
            row, begin, end = segment.row, segment.start_pos, segment.end_pos
            part = slice(segment.offset - first, segment.offset - first + segment.length)
            keys[row, :, begin:end] = k[part].transpose(0, 1)
            values[row, :, begin:end] = v[part].transpose(0, 1)
            q[part] = attend_causally(q[part].transpose(0, 1), keys[row, :, :end], values[row, :, :end]).transpose(0, 1)
        return q.flatten(1)

    def _attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, positions: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """One query a row over all its KV: the query heads that share a KV head stand where positions would."""
        count = q.shape[0]
        keys, values = keys[rows.first : rows.first + count], values[rows.first : rows.first + count]
        keys[rows.places, :, positions] = k
        values[rows.places, :, positions] = v
        grouped = q.unflatten(1, (self.config.n_kv_heads, -1))  # [B, n_kv_heads, n_rep, head_dim]
        keys, values = keys[:, :, : rows.longest], values[:, :, : rows.longest]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=rows.mask).reshape(count, -1)

    def _feed_forward(self, h: Tensor, w: Mapping[str, Tensor]) -> Tensor:
        """What the feed-forward block adds to a chunk ``[n, dim]``."""
        x = rms_norm(h, w["ffn_norm"], self.config.norm_eps)
        gate = F.silu(F.linear(x, w["w1"]), inplace=True)  # [n, ffn_dim]
        gate.mul_(F.linear(x, w["w3"]))
        del x
        return F.linear(gate, w["w2"])

    def _head(self, h: Tensor, chunk_tokens: int) -> Tensor:
        w = self.weights.globals
        head = w["tok_embeddings"] if self.config.tied_embeddings else w["output"]
        logits = torch.empty(h.shape[0], head.shape[0], dtype=torch.float32, device=self.device)
        for begin in range(0, h.shape[0], chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logits[part] = F.linear(rms_norm(h[part], w["norm"], self.config.norm_eps), head)
        return logits
