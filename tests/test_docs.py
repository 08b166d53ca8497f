"""The README and docs/JSON.md: what a user can give or may get stands there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import cli
from bench.flags import build_parser
from bench.results import FIXED_KEYS
from bench.schema_doc import DOC_FILE, document, read_schema
from wsm.settings import PRESETS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _verbs() -> dict[str, argparse.ArgumentParser]:
    [verbs] = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(verbs.choices)


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
def test_the_readme_names_every_flag_of_every_verb(flag: str) -> None:
    short = {"--output": "-o"}.get(flag, flag)
    assert _stands(flag, README) or _stands(short, README), f"README.md lacks {flag}"


@pytest.mark.parametrize("verb", sorted(_verbs()))
def test_the_readme_names_every_verb(verb: str) -> None:
    assert f"`{verb}`" in README or f"bench_infer.py {verb}" in README, f"README.md lacks the verb {verb}"


@pytest.mark.parametrize("variable", sorted(PRESETS))
def test_the_readme_names_every_variable(variable: str) -> None:
    assert f"`{variable}`" in README, f"README.md lacks {variable}"


@pytest.mark.parametrize("key", FIXED_KEYS)
def test_the_readme_names_every_key_of_the_guide(key: str) -> None:
    assert re.search(rf"`{key}\b", README), f"README.md lacks the JSON key {key}"


@pytest.mark.parametrize("code", [cli.UNUSABLE, cli.TOO_LARGE, cli.BAD_STORE, cli.INTERRUPTED])
def test_the_readme_explains_every_exit_code(code: int) -> None:
    assert re.search(rf"^\| {code} \| \w", README, re.MULTILINE), f"README.md lacks exit code {code}"


def test_the_exit_codes_are_those_of_the_design() -> None:
    assert (cli.UNUSABLE, cli.TOO_LARGE, cli.BAD_STORE, cli.INTERRUPTED) == (2, 3, 4, 130)


def test_json_md_is_what_the_schema_gives() -> None:
    """`python -m bench.schema_doc` rewrites it."""
    assert DOC_FILE.read_text(encoding="utf-8") == document(read_schema())


def test_json_md_has_a_row_for_every_fixed_key() -> None:
    page = document(read_schema())
    assert [key for key in FIXED_KEYS if f"\n| `{key}` |" not in page] == []


def test_json_md_says_what_several_objects_share_once() -> None:
    page = document(read_schema())
    assert page.count("| `phases.{prefill,decode}.floor_ms` |") == 1
    assert page.count("`ceilings.*.value` |") == 1
    assert "| `repeats.raw[].ttft_ms` |" in page


def test_documents_named_in_the_readme_exist() -> None:
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
