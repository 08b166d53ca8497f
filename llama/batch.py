"""A pass's tokens, packed: rows of any length one after the other, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one row: tokens ``offset .. offset + length`` of the packed batch, at ``start_pos`` of the row."""

    row: int
    start_pos: int
    length: int
    offset: int

    @property
    def end_pos(self) -> int:
        """Tokens of the row up to and with this segment."""
        return self.start_pos + self.length


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Packed tokens and where each belongs; built on the host, uploaded at most once per pass.

    ``tokens`` and ``positions`` are int64 ``[N]`` on the device; ``last``, int64 ``[rows]``, is the place of each
    row's last token in them.
    """

    tokens: Tensor
    positions: Tensor
    last: Tensor
    segments: tuple[Segment, ...]

    def followed_by(self, tokens: Tensor) -> TokenBatch:
        """The batch of the next pass: one new token (int64 ``[rows]``, on the device) behind each row's last.

        Nothing is uploaded: a small upload would queue behind the weights on the copy engine.
        """
        decoding = len(self.segments) == self.tokens.shape[0]  # one token a row already
        return TokenBatch(
            tokens=tokens,
            positions=(self.positions if decoding else self.positions[self.last]) + 1,
            last=self.last if decoding else torch.arange(len(self.segments), device=tokens.device),
            segments=tuple(Segment(s.row, s.end_pos, 1, place) for place, s in enumerate(self.segments)),
        )


def _upload(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def prefill_batch(prompts: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device) -> TokenBatch:
    """Whole prompts for the given rows of an empty cache."""
    segments, offset = [], 0
    for row, prompt in zip(rows, prompts, strict=True):
        segments.append(Segment(row, 0, len(prompt), offset))
        offset += len(prompt)
    tokens = torch.tensor(list(chain.from_iterable(prompts)), dtype=torch.int64)
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    last = torch.tensor([segment.offset + segment.length - 1 for segment in segments], dtype=torch.int64)
    uploaded = _upload(torch.cat((tokens, positions, last)), device)
    tokens, positions, last = uploaded.split((offset, offset, len(segments)))
    return TokenBatch(tokens, positions, last, tuple(segments))


def waves(rows: int, most: int) -> Iterator[range]:
    """The rows of each pass of a prefill, at most so many."""
    for first in range(0, rows, most):
        yield range(first, min(first + most, rows))


def decode_batch(tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> TokenBatch:
    """One new token for each of the first B rows, at its position: int64 ``[B]`` each, on the device.

    ``lengths`` are the same positions, the tokens before each, as the host knows them. Nothing is uploaded.
    """
    return TokenBatch(
        tokens=tokens,
        positions=positions,
        last=torch.arange(len(lengths), device=tokens.device),
        segments=tuple(Segment(row, length, 1, row) for row, length in enumerate(lengths)),
    )


def cut(segments: Sequence[Segment], chunk_tokens: int) -> list[tuple[Segment, ...]]:
    """Chunks of at most ``chunk_tokens`` tokens; a long row is cut, short rows share a chunk."""
    if chunk_tokens < 1:
        raise ValueError(f"a chunk must hold at least one token, not {chunk_tokens}")
    chunks: list[list[Segment]] = [[]]
    room = chunk_tokens
    for segment in segments:
        done = 0
        while done < segment.length:
            take = min(room, segment.length - done)
            chunks[-1].append(Segment(segment.row, segment.start_pos + done, take, segment.offset + done))
            done, room = done + take, room - take
            if room == 0:
                chunks.append([])
                room = chunk_tokens
    return [tuple(chunk) for chunk in chunks if chunk]
