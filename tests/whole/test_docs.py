"""The README, docs/FLAGS.md and docs/JSON.md: what a user can give or may get stands there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.cli.docs import GENERATED, result_schema
from bench.options.flags import VERBS, build_parser
from bench.options.run_flags import RunOptions
from bench.result.schema import document
from bench.result.types import FIXED_KEYS
from bench.result.types_speculation import Speculation
from bench.run import job as cli
from bench.run.signals import ENDING, exit_code
from wsm.option import options_of
from wsm.plan.machines import MACHINES
from wsm.settings import PRESETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAGS = (ROOT / "docs" / "FLAGS.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "docs" / "QUICKSTART.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "docs" / "QUICKSTART.zh-CN.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
COMPARING = (ROOT / "docs" / "COMPARING.md").read_text(encoding="utf-8")
SPECULATION = (ROOT / "docs" / "SPECULATION.md").read_text(encoding="utf-8")
TUNING = (ROOT / "docs" / "TUNING.md").read_text(encoding="utf-8")


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    [verbs] = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(verbs.choices)


def _verbs() -> dict[str, argparse.ArgumentParser]:
    return verbs_of(build_parser())


def _flags() -> Iterator[str]:
    seen = {"-h", "--help"}
    for parser in _verbs().values():
        for action in parser._actions:
            if action.option_strings and not seen & set(action.option_strings):
                seen |= set(action.option_strings)
                yield action.option_strings[-1] if action.dest == "output" else action.option_strings[0]


def _stands(word: str, text: str) -> bool:
    """Whether ``word`` stands in ``text`` as a whole: ``--prompt`` is not found in ``--prompts``."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def test_a_flag_is_not_taken_for_a_longer_one() -> None:
    assert not _stands("--prompt", "`--prompts FILE` and `--prompt-len N`")
    assert _stands("--prompt", "`--prompts FILE` / `--prompt TEXT`")


@pytest.mark.parametrize("flag", sorted(_flags()))
def test_the_page_of_flags_names_every_flag_of_every_verb(flag: str) -> None:
    assert _stands(flag, FLAGS), f"FLAGS.md lacks {flag}"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_the_table_of_a_verb_has_a_row_for_each_of_its_flags_with_its_default(verb: str) -> None:
    title = "## run, plan\n" if VERBS[verb][0] is RunOptions else f"## {verb}\n"
    part = FLAGS.partition(title)[2].partition("\n## ")[0]
    shared = options_of(RunOptions) if verb == "plan" else {}
    for name, declared in options_of(VERBS[verb][0]).items():
        if not declared.by_variable and name not in shared:
            shown = declared.metavar if declared.positional else declared.spelled
            [row] = re.findall(rf"^\| `{re.escape(shown)}[ ,`].*$", part, re.MULTILINE)
            assert declared.default_text in row, name


@pytest.mark.parametrize("verb", sorted(_verbs()))
def test_the_readme_names_every_verb(verb: str) -> None:
    assert f"`{verb}`" in README or f"bench_infer.py {verb}" in README, f"README.md lacks the verb {verb}"


@pytest.mark.parametrize("machine", [machine.name for machine in MACHINES])
def test_the_readme_and_the_tuning_guide_name_every_card_that_plan_knows(machine: str) -> None:
    assert f"`{machine}`" in README
    assert f"\n| `{machine}` |" in TUNING


@pytest.mark.parametrize("variable", sorted(PRESETS))
def test_flags_page_and_chinese_guide_name_every_variable(variable: str) -> None:
    assert f"| `{variable}` |" in FLAGS, f"FLAGS.md lacks {variable}"
    assert f"| `{variable}` |" in CHINESE, f"QUICKSTART.zh-CN.md lacks {variable}"


SIGNALLED = [exit_code(number) for number in ENDING]


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_both_quick_starts_name_every_key_of_the_guide(key: str) -> None:
    assert re.search(rf"`{key}\b", QUICKSTART), f"QUICKSTART.md lacks the JSON key {key}"
    assert re.search(rf"`{key}\b", CHINESE), f"QUICKSTART.zh-CN.md lacks the JSON key {key}"


@pytest.mark.parametrize("code", [0, cli.FAILED, cli.UNUSABLE, cli.TOO_LARGE, cli.BAD_STORE, *SIGNALLED])
def test_both_quick_starts_and_the_contract_explain_every_exit_code(code: int) -> None:
    pages = {"QUICKSTART.md": QUICKSTART, "QUICKSTART.zh-CN.md": CHINESE, "ARCHITECTURE.md": ARCHITECTURE}
    for name, page in pages.items():
        assert re.search(rf"^\| {code} \| \w", page, re.MULTILINE), f"{name} lacks exit code {code}"


@pytest.mark.parametrize("page", [README, QUICKSTART, CHINESE, TUNING, COMPARING, ARCHITECTURE, FLAGS, SPECULATION])
def test_no_page_names_a_flag_or_variable_that_does_not_exist(page: str) -> None:
    known = {word for parser in _verbs().values() for action in parser._actions for word in action.option_strings}
    foreign = {"--user", "--index-url", "--nproc-per-node"}  # of pip and of torchrun
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page)) - foreign
    assert sorted(flags - known) == []
    variables = set(re.findall(r"\bWSM_[A-Z_]+[A-Z]\b", page))
    assert sorted(variables - set(PRESETS) - {"WSM_KV_THROTTLE"}) == []


def test_the_tuning_guide_names_only_keys_that_the_json_has() -> None:
    keys = {
        part for row in re.findall(r"^\| `([^`]+)`", document(result_schema()), re.MULTILINE) for part in _names(row)
    }
    named = [word for word in re.findall(r"`([a-z][\w]*(?:\.[\w]+)+)`", TUNING) if not word.endswith((".py", ".json"))]
    assert len(named) >= 8
    assert [word for word in named if not set(word.split(".")) <= keys] == []


def test_the_page_on_speculation_names_every_key_of_its_part_of_the_json() -> None:
    missing = [key for key in Speculation.__struct_fields__ if f"`{key}`" not in SPECULATION and key != "passes"]
    assert missing == []


def _names(key: str) -> list[str]:
    """``a.{b,c}.d`` is of the names a, b, c and d."""
    return re.findall(r"\w+", key)


def test_the_exit_codes_are_those_of_the_design() -> None:
    assert (cli.UNUSABLE, cli.TOO_LARGE, cli.BAD_STORE) == (2, 3, 4)
    assert SIGNALLED == [130, 143, 129]


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_generated_pages_are_what_the_types_and_options_give(path: Path) -> None:
    """`python -m bench.cli.docs` writes them anew."""
    written = path.read_text(encoding="utf-8")
    assert written == GENERATED[path]()
    assert "Generated by `python -m bench.cli.docs`" in "".join(written.splitlines()[:4])


def test_json_md_has_a_row_for_every_fixed_key() -> None:
    page = document(result_schema())
    assert [key for key in FIXED_KEYS if f"\n| `{key}` |" not in page] == []


def test_json_md_says_what_several_objects_share_once() -> None:
    page = document(result_schema())
    assert page.count("| `phases.{prefill,decode}.floor_ms` |") == 1
    assert page.count("`ceilings.*.value` |") == 1
    assert "| `repeats.raw[].ttft_ms` |" in page


def test_documents_named_in_the_documents_exist() -> None:
    docs = ROOT / "docs"
    pages = (QUICKSTART, CHINESE, TUNING, ARCHITECTURE, FLAGS)
    for folder, page in ((ROOT, README), *((docs, page) for page in pages)):
        links = re.findall(r"\]\((?!http)([^)#]+)", page)
        assert links
        assert [link for link in links if not (folder / link).exists()] == []
