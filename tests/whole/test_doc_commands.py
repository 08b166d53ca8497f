"""The commands in the documents: each is understood, and each that needs no hardware or download runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.options.flags import VERBS, parse
from bench.sweep import sweep as sweep_module
from bench_infer import command_line as main

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "docs/QUICKSTART.md",
    "docs/QUICKSTART.zh-CN.md",
    "docs/TUNING.md",
    "docs/COMPARING.md",
    "docs/SPECULATION.md",
)
ELSEWHERE = re.compile(r"/dev/|~/|Llama-|70b|prompts\.txt")
"""A device, a checkpoint or a prompt file that is not here."""
STAND_IN = """
import shutil, sys
out = next(word.partition("=")[2] for word in sys.argv if word.startswith("--out-json="))
shutil.copy(__file__ + ".json", out)
"""


class Command(NamedTuple):
    """A line of a document: variables set for it, and the script's arguments."""

    page: str
    variables: dict[str, str]
    argv: list[str]

    @property
    def verb(self) -> str:
        return self.argv[0] if self.argv and self.argv[0] in VERBS else "run"

    @property
    def runs_here(self) -> bool:
        return not any(ELSEWHERE.search(word) for word in self.argv)


def commands() -> Iterator[Command]:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                place = next((place for place, word in enumerate(words) if word.endswith("bench_infer.py")), None)
                if place is not None:
                    pairs = [word.partition("=") for word in words[:place] if "=" in word]
                    yield Command(page, {name: value for name, _, value in pairs}, words[place + 1 :])


def test_the_bash_blocks_of_the_documents_hold_nothing_that_is_not_tried_here() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            for line in filter(None, block.replace("\\\n", " ").splitlines()):
                words = shlex.split(line, comments=True)
                made = words[:1] == ["make"] and set(words[1:]) <= targets
                assert made or any(word.endswith("bench_infer.py") for word in words), f"{page}: {line}"


def test_what_pip_is_told_to_install_is_there_to_be_had() -> None:
    """In documents and messages: the clone with an extra that it has, or a package that this project needs; this
    project itself is in no index.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.")[0]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("optional-dependencies]")[2], re.MULTILINE))
    packages = set(re.findall(r'"([a-zA-Z][\w-]*)[>=]', project))
    sources = [path for folder in ("bench", "llama", "wsm") for path in (ROOT / folder).rglob("*.py")]
    sources += [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench_infer.py"]
    asked = [
        (path, words) for path in sources for words in re.findall(r"pip install ((?:-e )?\S+)", path.read_text("utf-8"))
    ]
    assert len(asked) >= 4
    for path, word in asked:
        assert word.strip("`\"').,;") in packages | {f"-e '.[{extra}]'" for extra in extras}, path
    [extra] = re.findall(r"pip install --quiet -e '\.\[(\w+)\]'", (ROOT / "Makefile").read_text("utf-8"))
    assert extra in extras


def _named(command: Command) -> str:
    return f"{command.page}: {' '.join(command.argv) or '(no flag)'}"


def test_the_documents_hold_commands_of_every_page_and_most_verbs() -> None:
    found = list(commands())
    assert {command.page for command in found} == set(PAGES)
    assert {command.verb for command in found} >= {"run", "pack", "plan", "sweep", "compare", "report"}
    assert len([command for command in found if command.runs_here]) >= 12


@pytest.mark.parametrize("command", list(commands()), ids=_named)
def test_every_command_in_the_documents_is_understood(command: Command) -> None:
    assert parse(command.argv)[0] == command.verb


def test_the_readmes_table_of_verbs_has_an_example_of_each_that_is_understood() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Verbs\n")[2].partition("\n## ")[0]
    cells = [row.strip("| ").split(" | ")[-1] for row in table.splitlines() if row.startswith("| `")]
    examples = [shlex.split(example) for cell in cells for example in re.findall(r"`([^`]+)`", cell)]
    assert {argv[0] for argv in examples} == set(VERBS) - {"run"}
    for argv in examples:
        assert parse(argv)[0] == argv[0]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_one_after_the_other(
    page: str,
    measured: Mapping[str, Any],
    measured_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With fewer tokens, and with results at hand in place of a sweep's processes: the suite is to stay fast."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    (tmp_path / "stand_in.py.json").write_text(json.dumps(dict(measured)))
    monkeypatch.setattr(sweep_module, "SCRIPT", script)
    for command in commands():
        if command.page != page or not command.runs_here:
            continue
        for name, value in command.variables.items():
            monkeypatch.setenv(name, value)
        code = main([*command.argv, *_faster(command, measured_files[0].parent / "cache")])
        # Times here are noise: whether stream is slower than mixed on this machine is not the question.
        assert code in ((0, 1) if "--threshold" in command.argv else (0,)), _named(command)
        for name in command.variables:
            monkeypatch.delenv(name)


def _faster(command: Command, cache: Path) -> list[str]:
    if command.verb not in ("run", "plan"):
        return []
    short = [] if "--prompt" in command.argv else ["--prompt-len", "4"]
    return [
        *short,
        "--max-new-tokens",
        "2",
        "--warmup-rounds",
        "0",
        "--no-probe",
        "--device",
        "cpu",
        "--cache-dir",
        str(cache),
    ]


def test_the_example_that_does_not_fit_says_what_the_page_quotes_and_its_advice_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "TUNING.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^    \S+ bench_infer\.py (.*--gpu-mem-gb.*)$", page, re.MULTILINE)
    [quoted] = re.findall(r"^    (the run does not fit: .*)$", page, re.MULTILINE)
    argv = [*shlex.split(line), "--cache-dir", str(tmp_path), "--out-json", str(tmp_path / "r.json")]
    assert main(argv) == 3
    assert capsys.readouterr().err.splitlines()[0] == f"bench_infer.py: {quoted}"
    advice = quoted.split("it fits with ")[1].split()
    assert main([*argv, *advice, "--no-probe"]) == 0
