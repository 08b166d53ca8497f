"""Picking the next token.

A draw depends on the seed, the row and the token's position alone, on no state: however many tokens a pass computes,
and on whatever device, the same logits give the same token.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from wsm.errors import UnusableInput

SAMPLER = 2
"""Version of the draw above temperature 0; 1 was a generator of torch's."""
ROWS_AT_ONCE = 16
"""Sorting takes some five times the logits' memory; a batch is sampled this many rows at a time."""
MASS = 2**40
"""Probability 1 in whole units."""
_ROUNDS = 10
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises UnusableInput unless ``temperature >= 0`` and ``0 < top_p <= 1``."""
    if not 0 <= temperature < float("inf"):
        raise UnusableInput(f"--temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise UnusableInput(f"--top-p must be above 0 and at most 1, not {top_p}")


class Sampling(TypedDict):
    """How tokens are drawn."""

    temperature: float
    top_p: float
    seed: int


def sample(logits: Tensor, rows: Tensor, positions: Tensor, *, temperature: float, top_p: float, seed: int) -> Tensor:
    """One token for each of float32 logits ``[n, vocab]``; int64 ``[n]``.

    Temperature 0 takes the likeliest. Otherwise nucleus sampling (Holtzman et al. 2020): the smallest set of likeliest
    tokens whose mass reaches ``top_p``, drawn in proportion. ``rows`` and ``positions``, int64 ``[n]`` on the device of
    the logits, say whose token it is, and where in its row it will stand.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    parts = zip(logits.split(ROWS_AT_ONCE), uniform(seed, rows, positions).split(ROWS_AT_ONCE), strict=True)
    return torch.cat([_draw(part, keys, temperature, top_p) for part, keys in parts])


def margins_(logits: Tensor, tokens: Tensor) -> Tensor:
    """How far the logits ``[n, vocab]`` of the ``tokens``, int64 ``[n]``, are above the largest other; float32 ``[n]``.

    The logits are of no use afterwards: a copy would take as much memory again.
    """
    places = tokens.unsqueeze(1)
    own = logits.gather(1, places).squeeze(1)
    return own - logits.scatter_(1, places, -math.inf).amax(dim=1)


def _draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    # The largest logit is taken off first: next to temperature 0 nothing overflows, and the likeliest is left.
    below = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    probs, order = torch.softmax(below, dim=-1).sort(dim=-1, descending=True, stable=True)
    mass = masses(probs)
    running = mass.cumsum(dim=-1)
    total = running.gather(-1, nucleus(mass, running, top_p).sum(dim=-1, keepdim=True) - 1)
    # Below total: a uniform is at most 1 - 2^-53, and both are exact in float64. So the draw is inside the nucleus.
    drawn = (uniforms.unsqueeze(-1) * total).floor().long()
    picked = torch.searchsorted(running, drawn, right=True)
    return order.gather(-1, picked).squeeze(-1)


def masses(probs: Tensor) -> Tensor:
    """Probabilities in whole units, int64: a GPU may add floats in another order each time; the modes must agree."""
    return (probs.double() * MASS).long()


def nucleus(mass: Tensor, running: Tensor, top_p: float) -> Tensor:
    """Which masses ``[n, vocab]``, largest first and with their ``running`` sums, are the fewest to reach ``top_p``."""
    # A whole number: torch compares whole numbers with a float as float32, which has 24 bits.
    return running - mass < math.ceil(top_p * MASS)


def uniform(seed: int, rows: Tensor, positions: Tensor) -> Tensor:
    """Numbers of ``[0, 1)`` in steps of 2^-53, float64, that depend on nothing but these three; shapes are kept."""
    zero = torch.zeros_like(rows)
    first, second, _, _ = philox(seed, (positions & _LOW, positions >> 32, rows, zero))
    return ((first >> 5) * 2**26 + (second >> 6)).double() * 2.0**-53


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits each, in int64: philox4x32-10 (Salmon et al. 2011, "Parallel random numbers").

    Elementwise and on the device of the ``counter``, whose words are below 2^32; of the ``key`` 64 bits count.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a product of 32-bit words; by halves, since int64 has a sign."""
    lower, upper = factor * (words & 0xFFFF), factor * (words >> 16)
    upper = upper + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF
