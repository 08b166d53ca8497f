"""The page of a report: one HTML file that needs nothing beside it. Everything that comes from a file is escaped."""

from __future__ import annotations

import html
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compare.compare import Comparison, compare, copied, tokens_a_pass
from bench.compare.sides import PLACES, Side, device_of, provenance_of, settings_of
from bench.compare.text import MEDIANS, differing_lines, letters, output_lines, shown_cell, verdict_lines
from bench.compare.work import shown_setting, spelled
from bench.report.charts import Chart, overview_charts, side_charts, sweep_charts
from bench.report.draw import svg
from bench.report.timeline import timelines_of
from bench.result.summary import speculation_lines
from bench.result.types_speculation import Speculation
from wsm.words import counted

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>"""
_COLUMNS = ("tpot_ms", "decode_tok_s", "prefill_ms", "ttft_ms", "decode_ms", "e2e_ms")
_MOST_FLAGS = 6
"""That the first table has room for; the list of settings has all."""
_A_PASS = "tokens a pass"
_FIGURES = ("n", *_COLUMNS, _A_PASS, "floor reached")


def page(sides: Sequence[Side]) -> str:
    """The whole page; raises UnusableInput if a trace beside a result is damaged."""
    title = escaped(f"bench_infer: {', '.join(side.name for side in sides[:3])}{' …' if len(sides) > 3 else ''}")
    parts = [
        _HEAD.format(title=title, style=Path(__file__).with_name("report.css").read_text(encoding="utf-8")),
        _heading(sides),
        *_overview(sides),
        *(_figure(chart) for chart in (*sweep_charts(sides), *overview_charts(sides))),
        *(part for place, side in enumerate(sides) for part in _side(side, place)),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def escaped(value: Any) -> str:
    """Text for HTML, and - for what there is not."""
    return "-" if value is None else html.escape(str(value), quote=True)


# -- the top


def _heading(sides: Sequence[Side]) -> str:
    models = dict.fromkeys(str(s.typical.config.resolved["model"]) for s in sides if s.typical is not None)
    results, failed = sum(len(side.results) for side in sides), sum(len(side.failures) for side in sides)
    gave = counted(results, "result") + (f", {failed} failed" if failed else "")
    ran = "".join(f"<p>{escaped(line)}</p>" for line in dict.fromkeys(_what_ran(s) for s in sides) if line)
    return (
        f"<header><h1>{escaped(', '.join(models) or 'No result')}</h1>{ran}"
        f'<p class="note">{escaped(gave)}. Times are in milliseconds, GB are 10^9 bytes, GiB 2^30.</p></header>'
    )


def _what_ran(side: Side) -> str:
    """Where and of how much a side is, in a line: the card or processor, its budget, rows and tokens."""
    if (result := side.typical) is None:
        return ""
    budget = result.config.resolved.get("gpu_mem_gb")
    device = device_of(result)
    if result.provenance.gpu is not None:
        device += " with all of its memory" if budget is None else f" with --gpu-mem-gb {shown_setting(budget)}"
    return (
        f"{device}: {counted(result.batch_size, 'row')}, "
        f"{counted(result.prefill_tokens_total, 'prompt token')} and "
        f"{counted(result.decode_tokens_total, 'new token')}"
    )


def _overview(sides: Sequence[Side]) -> Iterator[str]:
    comparison = compare(sides) if len(sides) > 1 else None
    head = ["", "setting", "mode", "n", *_COLUMNS, "floor reached", "bound by", *(["against A"] if comparison else [])]
    verdicts = [["base"], *([against.verdict] for against in comparison.against)] if comparison else [[]]
    rows = [[letters(place), *_overview_row(side), *verdicts[place]] for place, side in enumerate(sides)]
    if any(drafted := [tokens_a_pass(side.typical) for side in sides]):
        at = head.index("decode_tok_s")
        head.insert(at, _A_PASS)
        for row, rate in zip(rows, drafted, strict=True):
            row.insert(at, shown_cell(rate))
    flags = _flags_that_differ(sides, comparison)
    if any(flags):
        head.insert(2, "flags that differ")
        for row, given in zip(rows, flags, strict=True):
            row.insert(2, given or None)
    yield _table(head, rows)
    yield f'<p class="note">{escaped(f"{MEDIANS}; what is bound and reached is of the round of median e2e_ms.")}</p>'
    yield _list("Results that are there twice", twice_lines(sides))
    if comparison is not None:
        yield _list("Outputs", output_lines(comparison))
        yield _list("Verdicts", verdict_lines(comparison))
        yield _list("Settings that differ", differing_lines(comparison.settings))
        yield _list("Provenance that differ", differing_lines(comparison.provenance))


def _flags_that_differ(sides: Sequence[Side], comparison: Comparison | None) -> list[str]:
    """Of each side, as typed; nothing for the points of a sweep, whose names say it, and of the mode, a column."""
    if comparison is None or all(side.values for side in sides):
        return ["" for _ in sides]
    # By its spelling: a variable is in the settings by both its names.
    shown = {spelled(name): values for name, values in comparison.settings.items() if name not in ("mode", *PLACES)}
    many = f", and {len(shown) - _MOST_FLAGS} more (below)" if len(shown) > _MOST_FLAGS else ""
    names = list(shown)[:_MOST_FLAGS]
    drafts = [side.typical is not None and isinstance(side.typical.speculation, Speculation) for side in sides]

    def told(place: int) -> str:
        """Without a draft, what a draft would have done by default says nothing."""
        given = {flag: shown[flag][place] for flag in names}
        quiet = () if drafts[place] else ("auto", None)
        kept = [f"{f} {shown_setting(v)}" for f, v in given.items() if not (f.startswith("--draft") and v in quiet)]
        return ", ".join(kept) + (many if kept else many.removeprefix(", "))

    return [told(place) for place in range(len(sides))]


def twice_lines(sides: Sequence[Side]) -> list[str]:
    """Which results are there twice, a line each, with their side's letter."""
    return [f"{letters(place)}: {line}" for place, lines in enumerate(copied(sides)) for line in lines]


def _overview_row(side: Side) -> list[str | int | None]:
    if side.typical is None:
        return [side.name, "failed", 0, *("-" for _ in (*_COLUMNS, "roofline", "bound"))]
    decode = side.typical.phases.decode
    found = [side.samples(metric) for metric in _COLUMNS]
    medians = [shown_cell(statistics.median(samples) if samples else None) for samples in found]
    reached = None if decode.roofline_pct is None else f"{decode.roofline_pct:.1f} %"
    return [side.name, side.typical.mode, len(side.samples("e2e_ms")), *medians, reached, decode.bound_by]


# -- a side


def _side(side: Side, place: int) -> Iterator[str]:
    yield f"<section><h2>{letters(place)}: {escaped(side.name)}</h2>"
    for failure in side.failures:
        yield f"<p>A process failed with {escaped(failure)}</p>"
    if (typical := side.typical) is not None:
        yield from (_figure(chart) for chart in (*timelines_of(side), *side_charts(side)))
        if isinstance(speculation := typical.speculation, Speculation):
            told = speculation_lines(speculation, typical)
            yield _list("Speculation", (f"{name}: {said}" for name, said in told.items()))
            yield _list("Row passes by their tokens", _row_passes(speculation))
        yield _list("Warnings", dict.fromkeys(line for result in side.results for line in result.warnings))
        yield _details("Settings", settings_of(typical))
        yield _details("Provenance", {**provenance_of(typical), "utc": typical.provenance.utc})
        command = shlex.join(["bench_infer.py", *typical.config.argv])
        yield f"<p class=note>Made by <code>{escaped(command)}</code></p>"
    yield "</section>"


def _row_passes(found: Speculation) -> Iterator[str]:
    given = sum(found.row_passes)
    for tokens, times in enumerate(found.row_passes, 1):
        if times:
            yield f"{tokens}: {times} ({100 * times / given:.1f} %)"


def _details(title: str, values: Mapping[str, Any]) -> str:
    return f"<details><summary>{title}</summary>{_table(['name', 'value'], values.items())}</details>"


# -- pieces


def _figure(chart: Chart) -> str:
    drawn = f'<div class="wide">{svg(chart)}</div>'
    return f"<figure><h3>{escaped(chart.title)}</h3><figcaption>{escaped(chart.note)}</figcaption>{drawn}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    kinds = ["figure" if name in _FIGURES else "value" for name in head]

    def line(tag: str, row: Sequence[Any]) -> str:
        cells = [f'<{tag} class="{kind}">{_cell(value)}</{tag}>' for kind, value in zip(kinds, row, strict=True)]
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{line("th", head)}</thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    return f'<span class="{value}">{value}</span>' if value in ("faster", "slower") else escaped(value)


def _list(title: str, lines: Iterable[str]) -> str:
    """Nothing where there are no lines."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return items and f"<h3>{title}</h3><ul>{items}</ul>"
