"""Flags of the verbs that work on results: compare, report, sweep."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from bench.options.types import number, path


@dataclass(frozen=True, slots=True)
class CompareOptions:
    paths: tuple[Path, ...]
    threshold: float | None
    output: str
    verbose: bool


@dataclass(frozen=True, slots=True)
class ReportOptions:
    paths: tuple[Path, ...]
    out: Path
    png: Path | None
    verbose: bool


def add_compare(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser, "the first is the base")
    parser.add_argument(
        "--threshold",
        type=number(0, or_equal=True),
        metavar="PCT",
        help="exit 1 if a side is slower by more than so many percent, 2 if that cannot be judged",
    )
    parser.add_argument("-o", "--output", choices=("text", "md", "csv"), default="text", help="(text)")
    parser.add_argument("--verbose", action="store_true")


def add_report(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser, "each becomes a part of the page")
    parser.add_argument("--out", type=path, default=Path("report.html"), metavar="FILE", help="(report.html)")
    parser.add_argument("--png", type=path, metavar="DIR", help="write the plots as PNG there too (needs matplotlib)")
    parser.add_argument("--verbose", action="store_true")


def _add_paths(parser: argparse.ArgumentParser, role: str) -> None:
    parser.add_argument(
        "paths",
        type=path,
        nargs="+",
        metavar="RESULT",
        help=f"a result's .json, a folder of results of the same settings, a sweep's folder or .jsonl; {role}",
    )
