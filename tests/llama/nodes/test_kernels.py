"""Node attention's Triton kernels without a GPU: they compile for each generation, and interpreted are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.without_gpu import GENERATIONS, needs_triton, run_part

pytestmark = needs_triton
SCRIPT = Path(__file__).with_name("without_a_gpu.py")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_kernels_compile_for(generation: str, tmp_path: Path) -> None:
    run_part(SCRIPT, generation, TRITON_CACHE_DIR=str(tmp_path))


def test_interpreted_kernels_attend_as_torch_does_and_depend_on_no_place() -> None:
    run_part(SCRIPT, "interpret", TRITON_INTERPRET="1")
