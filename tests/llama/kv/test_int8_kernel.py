"""8-bit KV is read by the kernel bit by bit as by torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.without_gpu import GENERATIONS, needs_triton, run_part

pytestmark = needs_triton
SCRIPT = Path(__file__).with_name("int8_without_a_gpu.py")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_kernel_compiles_for(generation: str, tmp_path: Path) -> None:
    run_part(SCRIPT, generation, TRITON_CACHE_DIR=str(tmp_path))


def test_the_interpreted_kernel_gives_the_bits_of_torch() -> None:
    run_part(SCRIPT, "interpret", TRITON_INTERPRET="1")
