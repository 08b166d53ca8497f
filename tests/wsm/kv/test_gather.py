"""Chosen blocks are gathered by a kernel as by torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.without_gpu import GENERATIONS, needs_triton, run_part
from wsm.engine.device import Device
from wsm.kv.gather import gather, gather_on

SCRIPT = Path(__file__).with_name("gather_without_a_gpu.py")


@needs_triton
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_kernel_compiles_to_vector_loads_for(generation: str, tmp_path: Path) -> None:
    run_part(SCRIPT, generation, TRITON_CACHE_DIR=str(tmp_path))


@needs_triton
def test_the_interpreted_kernel_gathers_what_torch_gathers() -> None:
    run_part(SCRIPT, "interpret", TRITON_INTERPRET="1")


def test_each_head_gets_its_own_blocks_in_the_order_asked() -> None:
    home = torch.arange(2 * 3 * 4 * 5).view(2, 12, 5)
    wanted = torch.tensor([[[0, 3], [2, 1], [1, 1]], [[3, 0], [0, 0], [2, 3]]])
    window = torch.full((2, 6, 5), -1)
    gather_on(Device())(home, wanted, window)
    blocks = home.view(2, 3, 4, 5)
    for row, head, place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2)).tolist():
        assert torch.equal(window[row, 2 * head + place], blocks[row, head, wanted[row, head, place]])


def test_without_cuda_torch_gathers() -> None:
    assert gather_on(Device()) is gather
