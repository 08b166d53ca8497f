"""No verb takes a flag that it does not look at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.options.flags import parse
from bench.options.verb_flags import VERBS
from wsm.errors import UnusableInput
from wsm.option import options_of

PACKAGE = Path(__file__).resolve().parents[3] / "bench"
READ_IN = {
    "pack": ("cli/models.py", "run/calibrate.py"),
    "verify": ("cli/models.py",),
    "prompts": ("cli/verbs.py",),
    "compare": ("cli/verbs.py",),
    "report": ("cli/verbs.py", "report/report.py"),
    "cache": ("cli/cache.py", "options/verb_flags.py"),
    "sweep": ("cli/verbs.py", "sweep/sweep.py"),
}
"""Where each verb is; what a run, a plan or quality builds is looked at all over the model."""


@pytest.mark.parametrize("verb", READ_IN)
def test_every_flag_of_a_verb_is_looked_at(verb: str) -> None:
    source = "".join((PACKAGE / path).read_text(encoding="utf-8") for path in READ_IN[verb])
    for name in options_of(VERBS[verb][0]).keys() - {"verbose"}:  # which every verb's end looks at
        assert re.search(rf"\b(options|self)\.{name}\b|\"{name}\"", source), name


QUALITY = ["quality", "--text", "t.txt"]
PACK = ["pack", "--to", "s.wsm", "--manifest", "s.json"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*QUALITY, "--draft", "ngram"], "--draft is no flag of quality, but of run and plan"),
        ([*QUALITY, "--draft-depth", "2"], "--draft-depth is no flag of quality"),
        ([*QUALITY, "--draft-width", "2"], "--draft-width is no flag of quality"),
        ([*QUALITY, "--draft-weight-format", "int8"], "--draft-weight-format is no flag of quality"),
        ([*QUALITY, "--verify-rows", "2"], "--verify-rows is no flag of quality"),
        ([*QUALITY, "--topk-blk", "2"], "--topk-blk is no flag of quality"),
        ([*QUALITY, "--tp", "2"], "--tp is no flag of quality, but of run and pack and plan"),
        ([*QUALITY, "--checkpoints", "a", "--synthetic", "Llama-3.2-1B"], "exclude each other"),
        ([*QUALITY, "--raw-device", "/dev/nvme0n1"], "--raw-device needs --manifest"),
        ([*PACK, "--window", "64"], "--window without --calibrate"),
        ([*PACK, "--windows", "4"], "--windows without --calibrate"),
        ([*PACK, "--device", "cpu"], "--device without --calibrate"),
        ([*PACK, "--gpu-mem-gb", "8"], "--gpu-mem-gb without --calibrate"),
        ([*PACK, "--cpu-mem-gb", "8"], "--cpu-mem-gb without --calibrate"),
        (["prompts", "--out", "p.txt", "--cache-dir", "c"], "--cache-dir is no flag of prompts"),
        (["cache", "list", "--all"], "--all is of cache clear"),
        (["cache", "list", "--yes"], "--yes is of cache clear"),
    ],
)
def test_a_flag_that_means_nothing_to_a_verb_is_refused(argv: Sequence[str], said: str) -> None:
    with pytest.raises(UnusableInput, match=re.escape(said)):
        parse(argv)


def test_what_reading_a_text_needs_is_taken_with_the_text() -> None:
    verb, _ = parse([*PACK, "--calibrate", "t.txt", "--window", "64", "--device", "cpu", "--cpu-mem-gb", "8"])
    assert verb == "pack"
