"""Random weights in a real model's shape: no file, and the same on every machine.

One block of seeded normal numbers is tiled over every tensor, each from a start of its own. The block's length is
odd, so that no two rows of a matrix are alike, and filling is a copy: as fast as memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import SourceFile
from llama.config import PRESETS, ModelConfig, UnusableInput

BLOCK_VALUES = (4 << 20) + 1
STD = 0.02
NORM_STD = 0.05


class SyntheticCheckpoint:
    """Weights drawn from N(0, 0.02^2), norms around 1, from ``seed``."""

    def __init__(self, config: ModelConfig, *, seed: int, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.directory: Path | None = None
        self._seed = seed
        generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(BLOCK_VALUES, generator=generator) * STD
        self._blocks: dict[torch.dtype, Tensor] = {}
        self._lock = threading.Lock()

    def sources(self) -> tuple[SourceFile, ...]:
        recipe = f"{self.config.to_json()} seed={self._seed} block={BLOCK_VALUES} std={STD}"
        return (SourceFile(f"synthetic:{self.config.name}", 0, hashlib.sha256(recipe.encode()).hexdigest()[:32]),)

    def read_into(self, name: str, out: Tensor) -> None:
        start = self._start(name)
        if "norm" in name:
            values = self._normal[start : start + 65536]
            repeats = -(-out.numel() // values.numel())
            out.view(-1).copy_(1 + values.repeat(repeats)[: out.numel()] * (NORM_STD / STD))
            return
        block, flat, filled = self._block(out.dtype), out.view(-1), 0
        while filled < flat.numel():
            take = min(block.numel() - start, flat.numel() - filled)
            flat[filled : filled + take].copy_(block[start : start + take])
            filled, start = filled + take, 0

    def _start(self, name: str) -> int:
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % (BLOCK_VALUES - 65536)

    def _block(self, dtype: torch.dtype) -> Tensor:
        with self._lock:
            if dtype not in self._blocks:
                self._blocks[dtype] = self._normal.to(dtype)
            return self._blocks[dtype]

    def close(self) -> None:
        """There are no files."""


def synthetic_checkpoint(spec: str, *, seed: int, dtype: torch.dtype) -> SyntheticCheckpoint:
    """``NAME`` or ``NAME:layers=N``, NAME being a known model.

    Raises:
        UnusableInput: for an unknown name or option.
    """
    name, _, option = spec.partition(":")
    config = PRESETS.get(name)
    if config is None:
        raise UnusableInput(f"--synthetic {spec}: {name!r} is no known model; known are {', '.join(PRESETS)}")
    if option:
        key, _, count = option.partition("=")
        if key != "layers" or not count.isdecimal() or int(count) < 1:
            raise UnusableInput(f"--synthetic {spec}: after the name only :layers=N is understood, N at least 1")
        config = dataclasses.replace(config, name=f"{name}:layers={int(count)}", n_layers=int(count))
    return SyntheticCheckpoint(config, seed=seed, dtype=dtype)
