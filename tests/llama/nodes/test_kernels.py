"""Node attention's Triton kernels without a GPU: they compile for each generation, and interpreted are right."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.wsm.formats.test_kernels import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("without_a_gpu.py")


@pytest.mark.parametrize("generation", ["80", "86", "89", "90"])
def test_kernels_compile_for(generation: str, tmp_path: Path) -> None:
    run(generation, SCRIPT, TRITON_CACHE_DIR=str(tmp_path))


def test_interpreted_kernels_attend_as_torch_does_and_depend_on_no_place() -> None:
    run("interpret", SCRIPT, TRITON_INTERPRET="1")
