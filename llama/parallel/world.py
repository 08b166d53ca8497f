"""The processes that run one model together, as the model and its builder see them; here there is only one.

Several, started by torchrun, are in :mod:`llama.parallel.ranks`, which is imported only then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from wsm.layout.model import WHOLE, Shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wsm.engine.telemetry import Telemetry


class Collective:
    """What the ranks compute together. Alone, every call gives back what it was given."""

    shard = WHOLE

    def reduce_(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks, in place; queued behind the computation, the host does not wait."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' ``x`` side by side along the last axis, in the order of the ranks and the same on all of them."""
        return x


class World:
    """One process among all (``shard``) and among those of its host (``local``); alone, it waits for nobody."""

    def __init__(self, shard: Shard = WHOLE, local: Shard = WHOLE) -> None:
        self.shard, self.local = shard, local

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        return [""] * self.shard.size

    def connect(self, device: torch.device) -> None:
        """Be ready for collectives on ``device``; what they need of its memory is taken now."""

    def collective(self, timer: Telemetry) -> Collective:
        """What the model's layers call; only when connected."""
        return Collective()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare facts, by name, with the other ranks'; UnusableInput on every rank alike, naming rank and fact."""

    def exchange(self, text: str, limit_s: float | None = None) -> list[str | None]:
        """Every rank's text, in order; None for one that gave none within ``limit_s`` (None: it is waited for)."""
        return [text] * self.shard.size

    def barrier(self) -> None:
        """Wait until every rank is here and its device idle."""

    def first_here(self) -> AbstractContextManager[None]:
        """A block that the host's first rank goes through before its others."""
        return contextlib.nullcontext()

    def abandon(self) -> None:
        """Give up collectives under way, for good: nothing waits any longer for a rank that will not come."""


ALONE = World()
