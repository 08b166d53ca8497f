"""What is answered before torch is imported, whose import takes seconds: wrong flags, help, and verbs on results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import hf_directory, hf_model, hf_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REFUSING = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refusing())
sys.argv[0] = "bench_infer.py"
from bench_infer import main
sys.exit(main())
"""


def without_torch(*argv: object) -> subprocess.CompletedProcess[str]:
    """The script, where an import of torch is an error."""
    command = [sys.executable, "-c", REFUSING, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--temperature", "nan"], 2, "--temperature: must be a number of at least 0, not nan"),
        (["--prompt", "a", "--prompt-len", "4"], 2, "exclude each other"),
        (["sweep", "--mode", "full,full"], 2, "twice"),
        (["--help"], 0, "compare"),
        (["run", "--help"], 0, "--prefetch-distance"),
        (["compare", "nowhere.json"], 2, "nowhere.json"),
        (["report", "nowhere.json"], 2, "nowhere.json"),
    ],
)
def test_flags_and_help_are_answered_without_torch(argv: list[str], code: int, said: str) -> None:
    ended = without_torch(*argv)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stdout + ended.stderr


def test_a_bad_variable_is_answered_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSM_PAIR_AHEAD", "x")
    ended = without_torch("plan")
    assert ended.returncode == 2
    assert "WSM_PAIR_AHEAD=x cannot be used: it must be a whole number of at least 0" in ended.stderr


def test_results_are_compared_without_torch(measured_files: tuple[Path, Path]) -> None:
    ended = without_torch("compare", measured_files[0], measured_files[0])
    assert ended.returncode == 0, ended.stderr


def test_prompts_are_made_without_torch(tmp_path: Path) -> None:
    model = hf_directory(tmp_path / "hf", hf_model(num_hidden_layers=1))
    hf_tokenizer(model)
    for flags in ([], ["--checkpoints", model]):
        ended = without_torch("prompts", "--out", tmp_path / "p.txt", "--count", "1", "--tokens", "9", *flags)
        assert ended.returncode == 0, ended.stderr
