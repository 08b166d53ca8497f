"""The Triton kernels without a GPU: they compile for each generation, and interpreted give the reference's bits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("without_a_gpu.py")


INTERPRETER_FAILS = "only 0-dimensional arrays can be converted to Python scalars"


def run_script(script: Path, part: str, **environment: str) -> None:
    """In a process of its own: Triton reads its environment when it is imported."""
    command = [sys.executable, str(script), part]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if INTERPRETER_FAILS in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("generation", ["80", "86", "89", "90"])
def test_kernels_compile_for(generation: str, tmp_path: Path) -> None:
    run_script(SCRIPT, generation, TRITON_CACHE_DIR=str(tmp_path))


def test_interpreted_kernels_give_the_bits_of_the_reference() -> None:
    run_script(SCRIPT, "interpret", TRITON_INTERPRET="1")
