"""What several test files share: one measured result, and its trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from bench.cli import main


@pytest.fixture(scope="session")
def measured_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A result of the built-in model in ``mixed`` and its trace, as a run wrote them; to be read only."""
    folder = tmp_path_factory.mktemp("measured")
    out, trace = folder / "run.json", folder / "run.trace.json"
    argv = ["--device", "cpu", "--cache-dir", str(folder / "cache"), "--out-json", str(out), "--trace", str(trace)]
    assert main([*argv, "--prompt-len", "8", "--max-new-tokens", "6", "--repeats", "2", "--ignore-eos"]) == 0
    return out, trace


@pytest.fixture(scope="session")
def measured(measured_files: tuple[Path, Path]) -> Mapping[str, Any]:
    """That result; :func:`tests.results.varied` makes others of it."""
    return MappingProxyType(json.loads(measured_files[0].read_text(encoding="utf-8")))
