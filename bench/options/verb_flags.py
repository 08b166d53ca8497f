"""What the verbs other than ``run`` and ``sweep`` take."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from bench.options.run_flags import RunOptions
from wsm.option import NAMES, PATH, SWITCH, number, one_of, option, same, whole

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
    verbose: bool = same(RunOptions, "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    manifest: Path = same(RunOptions, "manifest", MISSING, shown="")
    raw_device: str | None = same(RunOptions, "raw_device")
    checkpoints: Path | None = same(RunOptions, "checkpoints", help="for a manifest of version 1", shown="")
    staging_mb: int = same(RunOptions, "staging_mb")
    verbose: bool = same(RunOptions, "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsOptions:
    out: Path = option(MISSING, PATH, "the file to write")
    count: int = option(512, whole(1), "prompts")
    tokens: int = option(2048, whole(1), "tokens of each")
    checkpoints: Path | None = same(RunOptions, "checkpoints", help="whose tokenizer counts", shown="bytes")
    seed: int = same(RunOptions, "seed", help="of the words")
    cache_dir: Path = same(RunOptions, "cache_dir")
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
