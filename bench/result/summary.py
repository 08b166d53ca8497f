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
from bench.result.types_speculation import Speculation, acceptance_by_depth
from wsm.words import counted, plural

_SHAPE = "mode", "device", "batch_size", "prefill_tokens_total", "decode_tokens_total"
_COLUMNS: dict[str, Callable[[Result], Any]] = {
    "model": lambda r: r.config.resolved["model"],
    **{name: attrgetter(name) for name in _SHAPE},
    "tpot_ms": lambda r: r.tpot_ms and r.tpot_ms.mean,
    **{name: attrgetter(name) for name in ("decode_tok_s", "ttft_ms", "decode_ms", "e2e_ms")},
    "tokens_a_pass": lambda r: r.speculation.tokens_a_pass if isinstance(r.speculation, Speculation) else None,
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
        lines.append(f"{'figures':>24}: of the round of median e2e_ms; `compare` shows each figure's own median")
    if isinstance(held := result.weights, Weights) and held.rest_bytes < held.decoded_bytes:
        took = f", decoding {held.decode_ms:.3f} ms a decode pass" if held.decode_ms is not None else ""
        lines.append(
            f"{'weights':>24}: {held.weight_format}, {held.rest_bytes / 1e9:.3f} GB at rest of "
            f"{held.decoded_bytes / 1e9:.3f} GB{took}"
        )
    if isinstance(speculation := result.speculation, Speculation):
        lines += [f"{name:>24}: {said}" for name, said in speculation_lines(speculation, result).items()]
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


def speculation_lines(found: Speculation, result: Result) -> dict[str, str]:
    """By their names: who drafted, and what a token took: tokens a pass, bytes and the link's rate stand together."""
    shape = "chain" if found.width == 1 else f"tree of {found.width} a level"
    drafting = ""
    if found.drafting_ms is not None:
        drafting = f", drafting {found.drafting_ms:.3f} ms a pass"
        if found.drafting_hidden_pct is not None:
            drafting += f", {found.drafting_hidden_pct:.0f} % of it while the link copied"
    lines = {"speculation": f"{found.draft}: {shape}, depth {found.depth}, {counted(found.nodes, 'node')}{drafting}"}
    if found.tokens_a_pass is not None and found.weight_bytes_a_token is not None:
        rate = result.io_bw_MBps.weight_h2d_MBps
        link = f" over a link of {rate / 1e3:.1f} GB/s" if rate is not None else ""
        lines["a token"] = f"{found.tokens_a_pass:.2f} tokens a pass, {found.weight_bytes_a_token / 1e9:.3f} GB{link}"
        shares = ", ".join(f"{100 * share:.0f}" for share in acceptance_by_depth(found))
        if shares:
            lines["accepted by depth"] = f"{shares} %"
    if (pair := found.synthetic_agreement) is not None and pair.realised_agree is not None:
        lines["synthetic agreement"] = (
            f"{pair.realised_agree:.3f} and {pair.realised_second:.3f} (asked {pair.agree:g} and {pair.second:g}): "
            "no model's acceptance"
        )
    return lines


def _what_ran(result: Result) -> str:
    """Model, mode, rows and tokens; a row that ended early shows in the tokens."""
    rows, asked = result.batch_size, result.batch_size * result.max_new_tokens
    made = f"{result.decode_tokens_total} of {asked}" if result.decode_tokens_total < asked else f"{asked}"
    return (
        f"{result.config.resolved['model']} in mode {result.mode}, {counted(rows, 'row')}, "
        f"{counted(result.prefill_tokens_total, 'prompt token')}, {made} new {plural(asked, 'token')}"
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
