"""A test that gives a model a small budget leaves nothing of it to the next: it is the process's."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def whole_gpu() -> Iterator[None]:
    """No cached memory of tests before it, and no budget of theirs."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    yield
