"""What several test files share: random numbers, threads, a measured result with its trace, sides of a sweep of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from bench.compare.sides import Side
from bench.result.sweep_folder import Failure
from bench_infer import command_line as main
from tests.results import typed, varied

ROUNDS = [100.0, 104.0, 98.0, 101.0, 99.0]


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Torch draws the same in a test whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Torch computes on three threads, however many the machine has; a test may change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


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
    result = json.loads(measured_files[0].read_text(encoding="utf-8"))
    for phase in result["phases"].values():
        if phase["roofline_pct"] is None:  # on a busy machine a run may beat a ceiling that was disturbed
            phase |= {"floor_ms": phase["wall_ms"] / 2, "roofline_pct": 50.0}
    return MappingProxyType(result)


@pytest.fixture
def swept(measured: Mapping[str, Any], tmp_path: Path) -> list[Side]:
    """Two modes at three distances, one of the six failed."""
    sides = []
    for mode, factor in (("mixed", 1.0), ("stream", 0.8)):
        for distance in (4, 6, 8):
            values = {"--mode": mode, "--prefetch-distance": str(distance)}
            result = varied(measured, [factor * distance * sample for sample in ROUNDS], mode=mode)
            sides.append(Side(f"{mode} {distance}", (typed(result),), tmp_path, (), values))
    return [*sides[:5], Side("stream 8", (), tmp_path, (Failure(3, "it does not <fit>"),), sides[5].values)]
