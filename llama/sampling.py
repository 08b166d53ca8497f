"""Picking the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.config import UnusableInput


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises UnusableInput unless ``temperature >= 0`` and ``0 < top_p <= 1``."""
    if not 0 <= temperature < float("inf"):
        raise UnusableInput(f"--temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise UnusableInput(f"--top-p must be above 0 and at most 1, not {top_p}")


def sample(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row, int64 ``[B]``, from float32 logits ``[B, vocab]``.

    Temperature 0 takes the likeliest. Otherwise nucleus sampling (Holtzman et al. 2020): the smallest set of likeliest
    tokens whose mass reaches ``top_p``, drawn in proportion.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    mass_before = probs.cumsum(dim=-1) - probs
    picked = torch.multinomial(probs.masked_fill(mass_before >= top_p, 0.0), 1, generator=generator)
    return order.gather(-1, picked).squeeze(-1)
