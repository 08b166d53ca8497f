"""The transformer: layers outside, chunks of tokens inside, over weights that it is handed."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.batch import Segment, TokenBatch, cut
from llama.config import ModelConfig
from llama.fused.ops import attend_rows, linear, rms_norm, rotate_
from llama.graphs import DecodeGraphs
from llama.kv.cache import KVCache, Rows, attended_tokens
from llama.names import EMBEDDING, QKV
from llama.parallel.world import Collective
from llama.products import Acquire, Products, ProductSource, Residual, Scratch
from llama.rope import RopeScaling
from llama.weights import WeightSource
from wsm import stop
from wsm.layout.groups import GroupId, round_up
from wsm.layout.kv import KV_BLOCK_TOKENS


def scaled_frequencies(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies for contexts beyond the original one.

    ``llama3``: wavelengths beyond ``original / low_freq_factor`` are divided by ``factor``, those below
    ``original / high_freq_factor`` are kept, and between them the two are blended (Llama 3.1's model card and code).
    """
    if scaling.kind == "factors":
        return freqs / torch.tensor(scaling.factors)
    if scaling.kind == "linear":
        return freqs / scaling.factor
    wavelength, low = 2 * math.pi / freqs, scaling.low_freq_factor
    smooth = (scaling.original_max_position / wavelength - low) / (scaling.high_freq_factor - low)
    smooth = smooth.clamp(0.0, 1.0).nan_to_num(0.0)  # with equal factors a step: 1 or 0, and 0 / 0 on it
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def rotary_table(config: ModelConfig, tokens: int, device: torch.device) -> Tensor:
    """``freqs_cis``, complex64 ``[tokens, head_dim / 2]`` (Su et al. 2021, Meta's interleaved pairs)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        freqs = scaled_frequencies(freqs, config.rope_scaling)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``q [n_heads, n, head_dim]``, the last n of a row's ``end`` positions, over all of them.

    ``k`` and ``v`` are ``[n_kv_heads, end, head_dim]``; the result is of the shape of ``q``.
    """
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    length, end, n_rep = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if n_rep > 1 and not _kernel_shares_kv(q, k, v):
        k, v = k.repeat_interleave(n_rep, dim=1), v.repeat_interleave(n_rep, dim=1)
        n_rep = 1
    mask = None if length in (1, end) else _causal_at_the_end(length, end)
    causal = length == end > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=n_rep > 1)
    return out.squeeze(0)


def _kernel_shares_kv(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a fused kernel reads shared KV heads as they are. On CUDA only flash does (16-bit types); where it cannot
    run, ``enable_gqa`` would fall back to a plain product of n x end scores per head."""
    if q.device.type != "cuda":
        return True
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, True))


class Part(NamedTuple):
    """The part of a chunk that belongs to one stretch of the KV cache's rows."""

    stretch: int
    tokens: slice  # of the chunk
    segments: tuple[Segment, ...]
    last: bool  # no later chunk of the pass has tokens of this stretch
    rows: Rows | None  # None: attended segment by segment
    compact: Rows | None  # the same in a window of chosen blocks


class Chunk(NamedTuple):
    """Tokens that are computed at once, and what attention needs to know of them; made once per pass."""

    part: slice  # of the packed tokens
    positions: Tensor  # int64 [n]
    freqs_cis: Tensor  # complex64 [n, 1, head_dim / 2]
    parts: tuple[Part, ...]


def _causal_at_the_end(length: int, end: int) -> Tensor:
    """The mask of a row's last ``length`` of ``end`` tokens."""
    # The import takes seconds: the command line does without it, and a model has done it before its first pass.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(length, end)


class Transformer:
    """A LLaMA over any :class:`WeightSource`; with a ``collective`` ``config`` and ``weights`` are one rank's share.

    ``max_tokens`` is the longest row, prompt and new tokens together; ``scratch`` is where matrices are decoded, if any
    are in a weight format.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        device: torch.device,
        max_tokens: int,
        collective: Collective | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.config, self.weights, self.device, self.max_tokens = config, weights, device, max_tokens
        self.collective = collective or Collective()
        self.groups = ProductSource(weights, config.norm_eps, self.collective, scratch)
        self.vocab_size = config.vocab_size * self.collective.shard.size
        self.dtype = weights.globals["norm"].dtype
        self.graphs: DecodeGraphs | None = None
        self.freqs_cis = rotary_table(config, round_up(max_tokens, KV_BLOCK_TOKENS), device)
        _causal_at_the_end(1, 2)

    def forward(
        self, batch: TokenBatch, kv: KVCache, *, chunk_tokens: int, logits: Literal["last", "all"] = "last"
    ) -> Tensor:
        """One pass through all layers; appends to ``kv``. The host never waits for the device in it.

        Args:
            chunk_tokens: the most tokens that are computed at once while a group is here.
            logits: of each row's last token, float32 ``[rows, vocab]``, or of all, float32 ``[N, vocab]``.

        ValueError if a segment does not go on where its row of ``kv`` ends, or runs past ``max_tokens``.
        """
        kv.begin(batch.segments)
        if max(segment.end_pos for segment in batch.segments) > self.max_tokens:
            raise ValueError(f"a row runs past the {self.max_tokens} positions that this model was made for")
        h = self.graphs.replayed(batch) if self.graphs is not None else None
        if h is None:
            h = self.layers(batch, kv, self.groups.acquire, chunk_tokens)
            h = h[batch.last] if logits == "last" else h
        kv.extend(batch.segments)
        return self.head(h, chunk_tokens)

    def layers(self, batch: TokenBatch, kv: KVCache, acquire: Acquire, chunk_tokens: int) -> Tensor:
        """The residual ``[N, dim]`` behind the last layer, its groups handed out by ``acquire``."""
        h = self.embed(batch.tokens)
        chunks = self._chunks(batch, chunk_tokens, kv)
        residuals = [Residual(h[chunk.part], len(chunks)) for chunk in chunks]
        for layer in range(self.config.n_layers):
            with acquire(GroupId(layer, "attn")) as w:
                for chunk, residual in zip(chunks, residuals, strict=True):
                    stop.check()
                    self._attention_(residual, w, chunk, kv, layer)
            with acquire(GroupId(layer, "ffn")) as w:
                for residual in residuals:
                    stop.check()
                    self._feed_forward_(residual, w)
        for residual in residuals:
            residual.settled()
        return h

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual ``[N, dim]`` of the tokens; a rank knows the rows of its own part of the vocabulary."""
        table, shard = self.weights.globals[EMBEDDING], self.collective.shard
        if shard.size == 1:
            return F.embedding(tokens, table)
        own = tokens - shard.rank * self.config.vocab_size
        elsewhere = (own < 0) | (own >= self.config.vocab_size)
        h = F.embedding(own.masked_fill_(elsewhere, 0), table).masked_fill_(elsewhere.unsqueeze(1), 0)
        return self.collective.reduce_(h)

    def _chunks(self, batch: TokenBatch, chunk_tokens: int, kv: KVCache) -> list[Chunk]:
        freqs_cis = self.freqs_cis[batch.positions].unsqueeze(1)
        attended = attended_tokens(max(segment.end_pos for segment in batch.segments), kv.tokens)
        ends = {segment.row // kv.layout.stretch_rows: segment for segment in batch.segments}
        chunks = []
        for segments in cut(batch.segments, chunk_tokens):
            part = slice(segments[0].offset, segments[-1].offset + segments[-1].length)
            positions, parts = batch.positions[part], []
            for stretch, group in groupby(segments, lambda segment: segment.row // kv.layout.stretch_rows):
                inside = tuple(group)
                tokens = slice(inside[0].offset - part.start, inside[-1].offset + inside[-1].length - part.start)
                last = (inside[-1].row, inside[-1].end_pos) == (ends[stretch].row, ends[stretch].end_pos)
                rows = self._rows(inside, positions[tokens], attended, kv.layout.rows_of(stretch).start)
                compact = self._compact(rows, kv.topk) if rows is not None and kv.compact(stretch) else None
                parts.append(Part(stretch, tokens, inside, last, rows, compact))
            chunks.append(Chunk(part, positions, freqs_cis[part], tuple(parts)))
        return chunks

    def _rows(self, segments: tuple[Segment, ...], positions: Tensor, attended: int, first_row: int) -> Rows | None:
        first = segments[0].row
        if any(s.length != 1 or s.row != first + place for place, s in enumerate(segments)):
            return None
        shown = torch.arange(attended, device=self.device) <= positions.unsqueeze(1)
        places = torch.arange(first - first_row, first - first_row + len(segments), device=self.device)
        return Rows(first - first_row, places, positions, attended, self._mask(shown))

    def _compact(self, rows: Rows, k: int) -> Rows:
        """The same rows where their windows hold ``k`` chosen blocks, the newest one last."""
        begin = (k - 1) * KV_BLOCK_TOKENS
        positions, newest = begin + rows.positions % KV_BLOCK_TOKENS, rows.positions // KV_BLOCK_TOKENS
        place = torch.arange(k * KV_BLOCK_TOKENS, device=self.device)
        older = place < (newest.clamp(max=k - 1) * KV_BLOCK_TOKENS).unsqueeze(1)
        shown = older | ((place >= begin) & (place <= positions.unsqueeze(1)))
        return Rows(rows.first, rows.places, positions, k * KV_BLOCK_TOKENS, self._mask(shown))

    def _mask(self, shown: Tensor) -> Tensor:
        mask = torch.zeros(shown.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(~shown, -math.inf)[:, None, None, :]

    def _attention_(self, h: Residual, w: Products, chunk: Chunk, kv: KVCache, layer: int) -> None:
        """Add a chunk's attention to its residual; its keys and values go into the cache."""
        qkv = w.linear(w.norm(h, "attention_norm"), *QKV)
        heads = qkv.unflatten(1, (-1, self.config.head_dim))  # [n, n_heads + 2 * n_kv_heads, head_dim]
        outs = [self._attend(heads, part, chunk, kv, layer) for part in chunk.parts]
        w.add_linear_(h, outs[0] if len(outs) == 1 else torch.cat(outs), "wo")

    def _attend(self, heads: Tensor, part: Part, chunk: Chunk, kv: KVCache, layer: int) -> Tensor:
        """What a part of a chunk attends to, ``[n, n_heads * head_dim]``; may take the place of its queries.

        Queries and keys among ``heads [n, n_heads + 2 * n_kv_heads, head_dim]`` are rotated here.
        """
        window, n_heads = kv.enter(layer, part.stretch), self.config.n_heads
        own, freqs_cis = heads[part.tokens], chunk.freqs_cis[part.tokens]
        q, new = heads[:, :n_heads], heads[:, n_heads:].unflatten(1, (2, -1))  # [n, 2, n_kv_heads, head_dim]
        rows = part.compact if window.compact else part.rows
        if rows is None:
            rotate_(own, n_heads + self.config.n_kv_heads, freqs_cis)
            out = self._attend_segments(q, new, part, chunk, kv, layer, window.data)
        else:
            kv.record.rotate_and_write_(window.data, rows.places, rows.positions, own, n_heads, freqs_cis)
            out = self._attend_rows(q[part.tokens], rows, kv, window.data)
            positions = chunk.positions[part.tokens]
            kv.wrote_tokens(layer, part.stretch, rows, positions, new[part.tokens, 0], q[part.tokens])
        if part.last:
            kv.leave(layer, part.stretch)
        return out

    def _attend_segments(
        self, q: Tensor, new: Tensor, part: Part, chunk: Chunk, kv: KVCache, layer: int, window: Tensor
    ) -> Tensor:
        """Each segment over its own row so far; ``[n, n_heads * head_dim]``, in the memory of ``q``."""
        first_row = kv.layout.rows_of(part.stretch).start
        for segment in part.segments:
            begin = segment.offset - chunk.part.start
            tokens = slice(begin, begin + segment.length)
            last = slice(tokens.stop - 1, tokens.stop)
            row = window[segment.row - first_row]
            kv.record.write_span_(row, segment.start_pos, new[tokens])
            kv.wrote_span(layer, part.stretch, segment, new[tokens, 0], q[last], chunk.positions[last])
            keys, values = kv.record.read(row, segment.end_pos)
            q[tokens] = attend_causally(q[tokens].transpose(0, 1), keys, values).transpose(0, 1)
        return q[part.tokens].flatten(1)

    def _attend_rows(self, q: Tensor, rows: Rows, kv: KVCache, window: Tensor) -> Tensor:
        """One query a row over all its KV."""
        keys, values = kv.record.read(window[rows.first : rows.first + q.shape[0]], rows.tokens)
        return attend_rows(q, keys, values, rows.mask)

    def _feed_forward_(self, h: Residual, w: Products) -> None:
        """Add the feed-forward block to a chunk's residual."""
        x = w.norm(h, "ffn_norm")
        gate = w.gated_linear(x, "w1", "w3")  # [n, ffn_dim]
        del x
        w.add_linear_(h, gate, "w2")

    def head(self, h: Tensor, chunk_tokens: int) -> Tensor:
        """Logits, float32 ``[n, vocab]``, of the residual ``h [n, dim]``, so many tokens at a time."""
        w = self.weights.globals
        head = w[EMBEDDING] if self.config.tied_embeddings else w["output"]
        logits = torch.empty(h.shape[0], head.shape[0], dtype=torch.float32, device=self.device)
        for begin in range(0, h.shape[0], chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logits[part] = linear(rms_norm(h[part], w["norm"], self.config.norm_eps), head)
        return self.collective.gather(logits)
