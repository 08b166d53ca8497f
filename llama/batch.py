"""A pass's tokens, packed: rows of any length one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one row: tokens ``offset .. offset + length`` of the packed batch, at ``start_pos`` of the row."""

    row: int
    start_pos: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Packed tokens and where each belongs; built on the host, uploaded once a pass.

    ``tokens`` and ``positions`` are int64 ``[N]`` on the device, ``last`` int64 ``[rows]`` the place of each row's
    last token. A decode batch (one token in every row of the cache) also has ``lengths``, the KV tokens of each row
    with the new one, on the host.
    """

    tokens: Tensor
    positions: Tensor
    last: Tensor
    segments: tuple[Segment, ...]
    lengths: tuple[int, ...] | None = None

    @property
    def n_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    on_host = torch.tensor(values, dtype=torch.int64)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


def prefill_batch(prompts: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device) -> TokenBatch:
    """Whole prompts for the given rows of an empty cache."""
    segments, offset = [], 0
    for row, prompt in zip(rows, prompts, strict=True):
        segments.append(Segment(row, 0, len(prompt), offset))
        offset += len(prompt)
    return TokenBatch(
        tokens=_upload([token for prompt in prompts for token in prompt], device),
        positions=_upload([place for prompt in prompts for place in range(len(prompt))], device),
        last=_upload([segment.offset + segment.length - 1 for segment in segments], device),
        segments=tuple(segments),
    )


def decode_batch(tokens: Tensor, lengths: Sequence[int], device: torch.device) -> TokenBatch:
    """One new token (int64 ``[B]`` on the device) for every row; ``lengths`` are the KV tokens before it."""
    rows = range(len(lengths))
    return TokenBatch(
        tokens=tokens,
        positions=_upload(lengths, device),
        last=_upload(rows, device),
        segments=tuple(Segment(row, length, 1, row) for row, length in zip(rows, lengths, strict=True)),
        lengths=tuple(length + 1 for length in lengths),
    )


def cut(segments: Sequence[Segment], chunk_tokens: int) -> list[tuple[Segment, ...]]:
    """Chunks of at most ``chunk_tokens`` tokens; a long row is cut, short rows share a chunk."""
    chunks: list[tuple[Segment, ...]] = []
    chunk: list[Segment] = []
    room = chunk_tokens
    for segment in segments:
        done = 0
        while done < segment.length:
            take = min(room, segment.length - done)
            chunk.append(Segment(segment.row, segment.start_pos + done, take, segment.offset + done))
            done, room = done + take, room - take
            if room == 0:
                chunks.append(tuple(chunk))
                chunk, room = [], chunk_tokens
    if chunk:
        chunks.append(tuple(chunk))
    return chunks
