"""Scripts that compile or interpret Triton kernels where there is no GPU, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def compiled(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Sequence[int] = (),
    **options: int,
) -> Any:
    """A Triton kernel, compiled for a compute capability: its assembly in ``asm``, its needs in ``metadata``.

    Arguments that are neither in ``types`` nor among the ``constants`` are int32; those at the places ``aligned`` are
    aligned to 16 bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): given for name, given in constants.items()}
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature, places, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    return made
