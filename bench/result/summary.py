"""What a run prints when it is over: the summary, or a row for pipes and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import msgspec
from tabulate import tabulate

from bench.result.results import plain, significant
from bench.result.types import METRICS, Result
from bench.result.types_machine import Weights

_SHAPE = "mode", "device", "batch_size", "prefill_tokens_total", "decode_tokens_total"
_COLUMNS: dict[str, Callable[[Result], Any]] = {
    "model": lambda r: r.config.resolved["model"],
    **{name: attrgetter(name) for name in _SHAPE},
    "tpot_ms": lambda r: r.tpot_ms and r.tpot_ms.mean,
    **{name: attrgetter(name) for name in ("decode_tok_s", "ttft_ms", "decode_ms", "e2e_ms")},
    "repeats": attrgetter("repeats.n"),
    "e2e_stdev_ms": attrgetter("repeats.statistics.e2e_ms.stdev"),
    **{name: attrgetter(name) for name in ("throughput_tok_s", "end_to_end_tok_s")},
    "decode_bound_by": attrgetter("phases.decode.bound_by"),
    "decode_roofline_pct": attrgetter("phases.decode.roofline_pct"),
    "gpu_GB": lambda r: r.gpu_mem_GB.allocated_GB,
    "page_locked_MB": lambda r: r.memory.cpu_page_locked_bytes / 1e6,
    "output": lambda r: r.output.sha256[:12],
    "warnings": lambda r: len(r.warnings),
    "commit": lambda r: _commit(r),
    "time": attrgetter("provenance.utc"),
}


def summary(result: Result) -> str:
    """The summary block: a pass and tokens a second, the guide's seven figures, then what the time was bound by."""
    lines = ["", "=== Benchmark Summary ==="]
    if result.tpot_ms is not None:
        lines.append(f"{'tpot_ms':>24}: {result.tpot_ms.mean:.3f}")
    if result.decode_tok_s is not None:
        lines.append(f"{'decode_tok_s':>24}: {result.decode_tok_s:.3f}")
    lines += [f"{name:>24}: {getattr(result, name):.3f}" for name in sorted(METRICS, key=lambda m: m != "ttft_ms")]
    lines.append(f"{'of':>24}: {_what_ran(result)}")
    spread = result.repeats.statistics.e2e_ms
    if spread.stdev is not None:
        over = f"median {spread.median:.3f} ms of {result.repeats.n} rounds, sample stdev {spread.stdev:.3f}"
        if spread.median_ci95 is not None:
            low, high = spread.median_ci95
            over += f", 95 % interval of the median {low:.3f} to {high:.3f}"
        lines.append(f"{'e2e_ms over rounds':>24}: {over}")
    if isinstance(held := result.weights, Weights) and held.rest_bytes < held.decoded_bytes:
        took = f", decoding {held.decode_ms:.3f} ms a decode pass" if held.decode_ms is not None else ""
        lines.append(
            f"{'weights':>24}: {held.weight_format}, {held.rest_bytes / 1e9:.3f} GB at rest of "
            f"{held.decoded_bytes / 1e9:.3f} GB{took}"
        )
    for name, phase in msgspec.structs.asdict(result.phases).items():
        if phase.floor_ms is None:
            lines.append(f"{name + ' floor':>24}: not known")
            continue
        if phase.roofline_pct is None:
            why = "the run beat it: a disturbed ceiling" if phase.beats_floor else "the phase took no time"
            lines.append(f"{name + ' floor':>24}: {phase.floor_ms:.3f} ms, bound by {phase.bound_by}; {why}")
            continue
        varied = phase.ceiling_spread_pct
        unsure = f", the ceiling itself varied by {varied:.0f} %" if varied is not None else ""
        lines.append(
            f"{name + ' floor':>24}: {phase.floor_ms:.3f} ms, bound by {phase.bound_by}, "
            f"{phase.roofline_pct:.1f} % of it reached{unsure}"
        )
    lines += [f"[WARNING] {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _what_ran(result: Result) -> str:
    """Model, mode, rows and tokens; a row that ended early shows in the tokens."""
    rows, asked = result.batch_size, result.batch_size * result.max_new_tokens
    made = f"{result.decode_tokens_total} of {asked}" if result.decode_tokens_total < asked else f"{asked}"
    return (
        f"{result.config.resolved['model']} in mode {result.mode}, {rows} {'row' if rows == 1 else 'rows'}, "
        f"{result.prefill_tokens_total} prompt tokens, {made} new tokens"
    )


def _commit(result: Result) -> str | None:
    """The commit, with a + where files were changed since."""
    commit = result.provenance.git_commit
    return commit and f"{commit[:12]}{'+' if result.provenance.git_dirty else ''}"


def row(result: Result, output: str, settings: Sequence[str] = ()) -> str:
    """One result for pipes and tables: ``md``, ``csv`` (both with a header line), or ``json`` on one line.

    ``settings`` are the names of those in force that get a column of their own.
    """
    if output == "json":
        return json.dumps(plain(result))
    resolved = result.config.resolved
    cells = {name: significant(read(result)) for name, read in _COLUMNS.items()}
    cells = {**{name: resolved.get(name) for name in settings if name not in cells}, **cells}
    cells = {"model": cells.pop("model"), **cells}
    if output == "md":
        return str(tabulate([[_shown(cell) for cell in cells.values()]], list(cells), "github", disable_numparse=True))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cells, cells.values()])
    return text.getvalue().rstrip("\n")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
