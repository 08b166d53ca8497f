"""Counters that the programs of one launch share, to know who of them comes last."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

COUNTERS = 1 << 16


@cache
def arrivals(device: torch.device) -> Tensor:
    """int32 ``[COUNTERS]``, 0 between launches, which are all of the one compute stream.

    To be made before any capture: what is made inside of one belongs to its graph.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
