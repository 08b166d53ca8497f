"""Every test begins with the whole GPU, also after one that failed with a model open."""

from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def whole_gpu() -> None:
    """No cached memory of tests before it, and no budget of theirs."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
