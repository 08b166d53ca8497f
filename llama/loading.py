"""What a model's start-up reports: lines, progress bars, times; and the choice of its device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wsm.errors import UnusableInput
from wsm.layout.groups import GroupId
from wsm.layout.model import WHOLE, Shard

if TYPE_CHECKING:
    import torch

DEFAULT_CACHE = Path("~/.cache/wsm-bench")
"""Packed files, the built-in model and ceilings."""


class Reporter:
    """Reports what happens while a model is built; this one is silent."""

    verbose = False

    def say(self, line: str) -> None:
        """A line for the user."""

    def bar(self, total: int, unit: str, what: str) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar over ``total`` units; the callable inside moves it."""
        return contextlib.nullcontext(lambda done: None)


def choose_device(name: str | None, local: Shard = WHOLE) -> torch.device:
    """The named device, or a CUDA device, or the CPU; of several ranks on a host each has its own GPU."""
    import torch  # takes seconds, and the command line needs the rest of this module only

    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise UnusableInput(f"--device {name} is not known; cpu and cuda[:N] are") from None
    if device.type == "cuda":
        if device.index is not None and local.size > 1:
            raise UnusableInput(f"--device {name} would be every rank's: with --device cuda each has its own")
        index, count = device.index or local.rank, torch.cuda.device_count()
        if index >= count and local.size > 1:
            raise UnusableInput(
                f"there are {count} CUDA devices here for {local.size} ranks: start fewer with torchrun "
                f"--nproc-per-node {max(1, count)}, or give --device cpu"
            )
        if index >= count:
            raise UnusableInput(f"--device {name}: there are {count} CUDA devices here; --device cpu runs without")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UnusableInput(f"--device {name} is not supported; cpu and cuda[:N] are")
    return device


@dataclass(slots=True)
class LoadTimes:
    """Seconds of each part of the start-up; None for a part that did not take place."""

    parts: dict[str, float | None] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = (self.parts.get(part) or 0.0) + time.perf_counter() - started


class LayerProgress:
    """Moves a bar by one when both groups of a layer are loaded."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._half = advance, set[int]()

    def __call__(self, group: GroupId) -> None:
        if group.layer in self._half:
            self._advance(1)
        self._half.add(group.layer)
