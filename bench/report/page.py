"""The page of a report: one HTML file that needs nothing beside it. Everything that comes from a file is escaped."""

from __future__ import annotations

import html
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compare.compare import Comparison, compare
from bench.compare.sides import Side, provenance_of, settings_of
from bench.compare.text import differing_lines, letters, shown_cell, verdict_lines
from bench.report.charts import Chart, overview_charts, side_charts, sweep_charts
from bench.report.draw import svg
from bench.report.timeline import timelines_of

_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_COLUMNS = ("prefill_ms", "ttft_ms", "decode_ms", "e2e_ms", "throughput_tok_s")


def page(sides: Sequence[Side]) -> str:
    """The whole page.

    Raises:
        UnusableInput: if a trace beside a result is damaged.
    """
    comparison = compare(sides) if len(sides) > 1 else None
    body = [
        _head(sides),
        *_overview(sides, comparison),
        *(_figure(chart) for chart in sweep_charts(sides)),
        *(_figure(chart) for chart in overview_charts(sides)),
        *(part for place, side in enumerate(sides) for part in _side(side, place)),
    ]
    title = escaped(f"bench_infer: {', '.join(side.name for side in sides[:3])}{' …' if len(sides) > 3 else ''}")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{title}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def escaped(value: Any) -> str:
    """Text for HTML, and - for what there is not."""
    return "-" if value is None else html.escape(str(value), quote=True)


# -- the top


def _head(sides: Sequence[Side]) -> str:
    models = dict.fromkeys(str(s.typical.config.resolved["model"]) for s in sides if s.typical is not None)
    results = sum(len(side.results) for side in sides)
    failed = sum(len(side.failures) for side in sides)
    counted = f"{results} result{'s' * (results != 1)}" + (f", {failed} failed" if failed else "")
    return (
        f"<header><h1>{escaped(', '.join(models) or 'No result')}</h1>"
        f'<p class="note">{escaped(counted)}. Times are in milliseconds, GB are 10^9 bytes, GiB 2^30.</p></header>'
    )


def _overview(sides: Sequence[Side], comparison: Comparison | None) -> Iterator[str]:
    head = ["", "setting", "mode", "n", *_COLUMNS, "floor reached", "bound by"]
    if comparison is not None:
        head.append("against A")
    rows = [_overview_row(side, place, comparison) for place, side in enumerate(sides)]
    yield _table(head, rows, figures=range(3, 10))
    if comparison is None:
        return
    yield "<h3>Verdicts</h3>"
    yield _list(verdict_lines(comparison))
    for title, values in (("Settings", comparison.settings), ("Provenance", comparison.provenance)):
        lines = list(differing_lines(values))
        if lines:
            yield f"<h3>{title} that differ</h3>"
            yield _list(lines)


def _overview_row(side: Side, place: int, comparison: Comparison | None) -> list[str]:
    typical = side.typical
    cells = [letters(place), escaped(side.name)]
    if typical is None:
        cells += ["failed", "0", *("-" for _ in (*_COLUMNS, "roofline", "bound"))]
    else:
        decode = typical.phases.decode
        percent = decode.roofline_pct
        cells += [escaped(typical.mode), str(len(side.samples("e2e_ms")))]
        cells += [escaped(shown_cell(statistics.median(side.samples(metric)))) for metric in _COLUMNS]
        cells += ["-" if percent is None else f"{percent:.1f} %", escaped(decode.bound_by)]
    if comparison is not None:
        verdict = comparison.against[place - 1].verdict if place else "base"
        cells.append(f'<span class="{escaped(verdict.replace(" ", "-"))}">{escaped(verdict)}</span>')
    return cells


# -- a side


def _side(side: Side, place: int) -> Iterator[str]:
    yield f"<section><h2>{letters(place)}: {escaped(side.name)}</h2>"
    for failure in side.failures:
        yield f"<p>A process failed with exit {failure.exit_code}: {escaped(failure.reason)}</p>"
    typical = side.typical
    if typical is not None:
        said = dict.fromkeys(line for result in side.results for line in result.warnings)
        yield from (_figure(chart) for chart in (*timelines_of(side), *side_charts(side)))
        if said:
            yield f"<h3>Warnings</h3>{_list(said)}"
        yield _details("Settings", settings_of(typical))
        yield _details("Provenance", {**provenance_of(typical), "utc": typical.provenance.utc})
        command = shlex.join(["bench_infer.py", *typical.config.argv])
        yield f"<p class=note>Made by <code>{escaped(command)}</code></p>"
    yield "</section>"


def _details(title: str, values: Mapping[str, Any]) -> str:
    rows = [[escaped(name), escaped(value)] for name, value in values.items()]
    return f"<details><summary>{title}</summary>{_table(['name', 'value'], rows, figures=())}</details>"


# -- pieces


def _figure(chart: Chart) -> str:
    drawn = f'<div class="wide">{svg(chart)}</div>'
    return f"<figure><h3>{escaped(chart.title)}</h3><figcaption>{escaped(chart.note)}</figcaption>{drawn}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, figures: Iterable[int]) -> str:
    """Cells are HTML already."""
    right = set(figures)
    kinds = [' class="figure"' if place in right else ' class="value"' for place in range(len(head))]
    heads = "".join(f"<th{kind}>{escaped(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    lines = ["".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>"
