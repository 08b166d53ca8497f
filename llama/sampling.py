"""Picking the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from wsm.errors import UnusableInput

ROWS_AT_ONCE = 16
"""Sorting takes some five times the logits' memory; a batch is sampled this many rows at a time."""
MASS = 2**40
"""Probability 1 in whole units."""


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises UnusableInput unless ``temperature >= 0`` and ``0 < top_p <= 1``."""
    if not 0 <= temperature < float("inf"):
        raise UnusableInput(f"--temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise UnusableInput(f"--top-p must be above 0 and at most 1, not {top_p}")


def sample(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row, int64 ``[B]``, from float32 logits ``[B, vocab]``.

    Temperature 0 takes the likeliest. Otherwise nucleus sampling (Holtzman et al. 2020): the smallest set of likeliest
    tokens whose mass reaches ``top_p``, drawn in proportion.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.cat([_draw(rows, temperature, top_p, generator) for rows in logits.split(ROWS_AT_ONCE)])


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    # The largest logit is taken off first: next to temperature 0 nothing overflows, and the likeliest is left.
    below = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    probs, order = torch.softmax(below, dim=-1).sort(dim=-1, descending=True, stable=True)
    picked = torch.multinomial(probs * nucleus(probs, top_p), 1, generator=generator)
    return order.gather(-1, picked).squeeze(-1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Which of the probabilities ``[B, vocab]``, largest first, are the fewest that reach ``top_p``; bool.

    The sums are of whole numbers: a GPU may add floats in another order each time, and the modes must agree.
    """
    mass = (probs.double() * MASS).long()
    return mass.cumsum(dim=-1) - mass < top_p * MASS
