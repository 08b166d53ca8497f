"""What a wheel of the project holds: everything that a run reads."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bench.run.prompts import DEFAULT_FILE

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(__file__).resolve().parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_file_of_the_packages_goes_into_a_wheel() -> None:
    packages, data = SETUP["packages"], SETUP["package-data"]
    for top in sorted({package.partition(".")[0] for package in packages}):
        for path in (ROOT / top).rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            package = ".".join(path.relative_to(ROOT).parent.parts)
            assert package in packages, path
            assert path.suffix == ".py" or any(path.match(pattern) for pattern in data.get(package, ())), path


@pytest.mark.parametrize("page", ["README.md", "docs/QUICKSTART.zh-CN.md"])
def test_the_cpu_build_is_had_by_the_pages_own_example(page: str) -> None:
    """What stands behind TORCH is handed to pip as it is; nothing is run."""
    row = next(line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "| `make bench` |" in line)
    command = re.search(r"`(make bench TORCH='.+?')`", row)
    assert command is not None, "2 GB are enough for the CPU build alone"
    said = subprocess.run(
        [*shlex.split(command[1]), "-nB"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "pip install --quiet torch --index-url URL\n" in said


def test_the_default_prompts_go_with_it() -> None:
    assert DEFAULT_FILE.parent.relative_to(ROOT).as_posix() in SETUP["packages"]
    assert (ROOT / f"{SETUP['py-modules'][0]}.py").exists()
