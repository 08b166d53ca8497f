"""The fused kernels without a GPU: they compile for each generation, and interpreted do what torch does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.wsm.formats.test_kernels import run_script

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("without_a_gpu.py")


@pytest.mark.parametrize("generation", ["80", "86", "89", "90"])
def test_fused_kernels_compile_for(generation: str, tmp_path: Path) -> None:
    run_script(SCRIPT, generation, TRITON_CACHE_DIR=str(tmp_path))


def test_interpreted_fused_kernels_do_what_torch_does() -> None:
    run_script(SCRIPT, "interpret", TRITON_INTERPRET="1")
