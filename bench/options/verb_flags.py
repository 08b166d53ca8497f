"""What the verbs other than ``run`` and ``plan`` take.

In a sweep every flag of a run takes a list: a comma stands between its values, or the flag is given several times.
Flags whose own value may hold a comma (a text, a path, the devices of a striped store) are never split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.options.run_flags import PlanOptions, RunOptions
from wsm.errors import UnusableInput
from wsm.option import (
    NAME,
    NAMES,
    PATH,
    SWITCH,
    TEXT,
    Option,
    negated,
    number,
    one_of,
    option,
    options_of,
    same,
    whole,
)

if TYPE_CHECKING:
    from bench.result.sweep_folder import Sweep

_A_RESULT = "a result's .json, a folder of results of the same settings, a .jsonl of such, a sweep's folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    to: tuple[str, ...] = option(MISSING, NAMES, "file or block device; several are striped", metavar="TARGET[,TARGET]")
    manifest: Path = option(MISSING, PATH, "where the store's description is written")
    force: bool = option(False, SWITCH, "overwrite a device that has a filesystem or the like on it")
    yes: bool = option(False, SWITCH, "do not ask")
    checkpoints: Path | None = same(RunOptions, "checkpoints")
    synthetic: str | None = same(RunOptions, "synthetic")
    dtype: str | None = same(RunOptions, "dtype")
    tp: int | None = same(RunOptions, "tp")
    cache_dir: Path = same(RunOptions, "cache_dir")
    quiet: bool = same(RunOptions, "quiet")
    verbose: bool = same(RunOptions, "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    manifest: Path = same(RunOptions, "manifest", MISSING, shown="")
    raw_device: str | None = same(RunOptions, "raw_device")
    checkpoints: Path | None = same(RunOptions, "checkpoints", help="for a manifest of version 1", shown="")
    staging_mb: int = same(RunOptions, "staging_mb")
    quiet: bool = same(RunOptions, "quiet")
    verbose: bool = same(RunOptions, "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsOptions:
    out: Path = option(MISSING, PATH, "the file to write")
    count: int = option(512, whole(1), "prompts")
    tokens: int = option(2048, whole(1), "tokens of each")
    checkpoints: Path | None = same(RunOptions, "checkpoints", help="whose tokenizer counts", shown="bytes")
    seed: int = same(RunOptions, "seed", help="of the words")
    cache_dir: Path = same(RunOptions, "cache_dir")
    quiet: bool = same(RunOptions, "quiet")
    verbose: bool = same(RunOptions, "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    paths: tuple[Path, ...] = option(
        MISSING, PATH, f"{_A_RESULT}; the first is the base", metavar="RESULT", positional=True
    )
    threshold: float | None = option(
        None,
        number(0),
        "exit code 1 where a side is slower by more percent than this, 2 where it cannot be judged",
        metavar="PCT",
    )
    equal_outputs: bool = option(False, SWITCH, "exit code 1 where two sides generated different tokens")
    output: str = option("text", one_of("text", "md", "csv"), "how the table is printed", flags=("-o",))
    verbose: bool = same(RunOptions, "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    paths: tuple[Path, ...] = option(
        MISSING, PATH, f"{_A_RESULT}; each becomes a part of the page", metavar="RESULT", positional=True
    )
    out: Path = option(Path("report.html"), PATH, "the page to write")
    png: Path | None = option(None, PATH, "write the plots as PNG there too; needs matplotlib", metavar="DIR")
    verbose: bool = same(RunOptions, "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """How often, where to, and what is swept (which is no flag of its own, but those of a run)."""

    sweep: Sweep
    repeats: int = same(RunOptions, "repeats", help="processes per point, interleaved")
    inner_repeats: int = option(1, whole(1), "timed rounds in each")
    out_dir: Path = option(Path("sweep"), PATH, "a new folder, or that of the same sweep, which goes on", metavar="DIR")
    retry_failed: bool = option(False, SWITCH, "run again what failed before")
    quiet: bool = same(RunOptions, "quiet")
    verbose: bool = same(RunOptions, "verbose", help="give tracebacks")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    words: tuple[str, ...] = option(
        MISSING,
        NAME,
        "list, or clear, and the names that are meant (`*` and `?` stand for others)",
        metavar="ACTION",
        positional=True,
    )
    all: bool = option(False, SWITCH, "clear all that is in it")
    older_than: float | None = option(None, number(0), "only what was last used so many days ago", metavar="DAYS")
    yes: bool = same(PackOptions, "yes")
    cache_dir: Path = same(RunOptions, "cache_dir")
    verbose: bool = same(RunOptions, "verbose", help="give tracebacks")

    def __post_init__(self) -> None:
        if self.words[0] not in ("list", "clear"):
            raise UnusableInput(f"cache {self.words[0]} is not known: cache list, or cache clear")
        if self.words == ("clear",) and not self.all and self.older_than is None:
            raise UnusableInput("cache clear: say what: names, --older-than DAYS, or --all")
        if self.all and len(self.words) > 1:
            raise UnusableInput("cache: names and --all exclude each other: give one")


Options = (
    RunOptions
    | PackOptions
    | VerifyOptions
    | PromptsOptions
    | SweepOptions
    | CompareOptions
    | ReportOptions
    | CacheOptions
)
VERBS: Mapping[str, tuple[type[Options], str]] = {
    "run": (RunOptions, "run and measure (the default verb)"),
    "pack": (PackOptions, "checkpoint to packed device or file"),
    "verify": (VerifyOptions, "read a packed store back and check it"),
    "plan": (PlanOptions, "what would be where, in how much memory, bound by what"),
    "prompts": (PromptsOptions, "make a prompt file of exactly N tokens per prompt"),
    "sweep": (SweepOptions, "a run for every combination of listed values"),
    "compare": (CompareOptions, "results against the first one: table, ratio, verdict"),
    "report": (ReportOptions, "results as one HTML page, and as PNG"),
    "cache": (CacheOptions, "what lies in the cache directory; clear it"),
}

LISTED: Mapping[str, Option] = {
    declared.spelled: declared
    for name, declared in options_of(RunOptions).items()
    if declared.swept and not declared.by_variable and name not in options_of(SweepOptions)
}
"""Flags of a run that a sweep takes as lists, by spelling."""


def is_split(declared: Option) -> bool:
    """Whether a comma stands between two values."""
    return declared.kind not in (PATH, TEXT)


def sweep_of(given: Iterable[tuple[str, str]]) -> Sweep:
    """The points of flags and their texts, in the command line's order; refuses an empty and a repeated value."""
    from bench.result.sweep_folder import Point, Sweep  # and so what a result is: no other verb's flags need it

    texts: dict[str, list[str]] = {}
    for flag, text in given:
        texts.setdefault(flag, []).extend(text.split(",") if is_split(LISTED[flag]) else [text])
    for flag, found in texts.items():
        _check_list(flag, found)
    axes = {flag: tuple(found) for flag, found in texts.items() if len(found) > 1}
    fixed = [word for flag, found in texts.items() if len(found) == 1 for word in _typed(flag, found[0])]
    points = []
    for place, chosen in enumerate(itertools.product(*axes.values()), 1):
        named = dict(zip(axes, chosen, strict=True))
        argv = [*fixed, *(word for flag, value in named.items() for word in _typed(flag, value))]
        points.append(Point(place, named, tuple(argv)))
    return Sweep(axes, tuple(fixed), tuple(points))


def _check_list(flag: str, values: Sequence[str]) -> None:
    said = f"{flag} {','.join(values)}"
    if is_split(LISTED[flag]) and not all(values):
        raise UnusableInput(f"{said} has an empty value: a comma too many?")
    if len(set(values)) < len(values):
        raise UnusableInput(f"{said} names a value twice: for several runs of a point use --repeats")
    if LISTED[flag].kind is SWITCH and not set(values) <= {"on", "off"}:
        raise UnusableInput(f"{said} cannot be used: in a sweep a switch is on, off, or on,off")


def _typed(flag: str, value: str) -> list[str]:
    """A flag with its value, as one types it for a run."""
    if LISTED[flag].kind is SWITCH:
        return [flag] if value == "on" else [negated(flag)] if LISTED[flag].default is None else []
    return [f"{flag}={value}"]
