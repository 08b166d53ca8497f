"""Scripts that compile or interpret Triton kernels where there is no GPU, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

GENERATIONS = ("80", "86", "89", "90")
_INTERPRETER_FAILS = "only 0-dimensional arrays can be converted to Python scalars"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_part(script: Path, part: str, **environment: str) -> None:
    """Triton reads its environment when it is imported, hence the process."""
    command = [sys.executable, str(script), part]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if _INTERPRETER_FAILS in done.stderr:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout + done.stderr
