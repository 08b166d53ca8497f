"""What the verbs other than ``run`` and ``plan`` take.

In a sweep every flag of a run takes a list: a comma stands between its values, or the flag is given several times.
Flags whose own value may hold a comma (a text, a path, the devices of a striped store) are never split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bench.options.run_flags import PlanOptions, RunOptions
from llama.options import BuildOptions
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
    unused,
    whole,
)

if TYPE_CHECKING:
    from bench.result.sweep_folder import Sweep

_A_RESULT = "a result's .json, a folder of results of the same settings, a .jsonl of such, a sweep's folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions(BuildOptions):
    """The model that is measured, as a run has it, against the checkpoint as it is.

    It reads a text on one rank, pass by pass as a prefill does, and generates nothing.
    """

    text: Path = option(MISSING, PATH, "UTF-8 text that both models read")
    reference: Path | None = option(None, PATH, "another checkpoint as the reference", metavar="DIR", shown="the same")
    window: int = option(512, whole(3), "tokens that are read at once, from an empty context")
    windows: int | None = option(None, whole(1), "no more windows than this", shown="all")
    batch_size: int = option(1, whole(1), "windows in one pass")
    out_json: Path | None = option(None, PATH, "the figures")
    output: str | None = same(RunOptions, "output")
    quiet: bool = same(RunOptions, "quiet")
    verbose: bool = same(RunOptions, "verbose")
    tp: int | None = unused(BuildOptions, "tp")
    topk_blk: int = unused(BuildOptions, "topk_blk")
    draft: str | None = unused(BuildOptions, "draft")
    draft_depth: int | Literal["auto"] = unused(BuildOptions, "draft_depth")
    draft_width: int | None = unused(BuildOptions, "draft_width")
    draft_weight_format: str = unused(BuildOptions, "draft_weight_format")
    verify_rows: int | None = unused(BuildOptions, "verify_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    to: tuple[str, ...] = option(MISSING, NAMES, "file or block device; several are striped", metavar="TARGET[,TARGET]")
    manifest: Path = option(MISSING, PATH, "where the store's description is written")
    force: bool = option(False, SWITCH, "overwrite a device that has a filesystem or the like on it")
    yes: bool = option(False, SWITCH, "do not ask")
    checkpoints: Path | None = same(RunOptions, "checkpoints")
    synthetic: str | None = same(RunOptions, "synthetic")
    dtype: str | None = same(RunOptions, "dtype")
    weight_format: str = same(RunOptions, "weight_format")
    calibrate: Path | None = option(
        None, PATH, "UTF-8 text: one prefill over it says which errors of int4 and int8 matter (docs/FORMATS.md)"
    )
    window: int = same(QualityOptions, "window", help="tokens of the text that are read at once")
    windows: int = option(48, whole(1), "no more windows of the text than this")
    device: str | None = same(RunOptions, "device", help="where the text is read and matrices are quantised with it")
    gpu_mem_gb: float | None = same(RunOptions, "gpu_mem_gb")
    cpu_mem_gb: float | None = same(RunOptions, "cpu_mem_gb")
    tp: int | None = same(RunOptions, "tp")
    cache_dir: Path = same(RunOptions, "cache_dir")
    quiet: bool = same(RunOptions, "quiet")
    verbose: bool = same(RunOptions, "verbose")

    def __post_init__(self) -> None:
        if self.calibrate is not None:
            return
        declared = options_of(PackOptions)
        for name in ("window", "windows", "device", "gpu_mem_gb", "cpu_mem_gb"):
            if getattr(self, name) != declared[name].default:
                raise UnusableInput(
                    f"{declared[name].spelled} without --calibrate: only reading a text needs it; name a text, or "
                    "leave it out"
                )


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
    verbose: bool = same(RunOptions, "verbose", help="show each warning, not one of a kind, and give tracebacks")


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
        "list, or clear, and the names that are meant; `*` and `?` stand for others",
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
        for flag, given in (("--all", self.all), ("--yes", self.yes)):
            if self.words[0] == "list" and given:
                raise UnusableInput(f"{flag} is of cache clear: cache list shows all, and asks nothing")
        if self.all and len(self.words) > 1:
            raise UnusableInput("cache: names and --all exclude each other: give one")


Options = (
    RunOptions
    | PackOptions
    | VerifyOptions
    | QualityOptions
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
    "quality": (QualityOptions, "what a weight format costs: perplexity, KL and equal first choices on a text"),
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
