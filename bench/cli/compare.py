"""The verb ``compare``."""

from __future__ import annotations

import sys

from bench.compare.compare import compare, regressions
from bench.compare.sides import read_sides
from bench.compare.text import as_csv, as_markdown, as_text
from bench.options.verb_flags import CompareOptions


def run_compare(options: CompareOptions) -> int:
    """Print results against the first; with ``--threshold``, exit code 1 if one is slower by more."""
    comparison = compare(read_sides(options.paths))
    print({"text": as_text, "md": as_markdown, "csv": as_csv}[options.output](comparison))
    if options.threshold is None:
        return 0
    slower = list(regressions(comparison, options.threshold))
    for side, percent in slower:
        print(
            f"bench_infer.py: {side.name} is slower than {comparison.sides[0].name} by "
            f"{percent:.1f} %, more than --threshold {options.threshold:g}",
            file=sys.stderr,
        )
    return 1 if slower else 0
