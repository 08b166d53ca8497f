"""A comparison as text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.compare.compare import Against, Cell, Comparison, Row, why_unjudged
from bench.compare.verdict import CONFIDENCE
from bench.result.results import significant

_MOST_COLUMNS = 5
"""Sides beside each other in text and Markdown; the base is repeated in each block."""


def as_text(comparison: Comparison) -> str:
    """For the terminal."""
    blocks = [_header(comparison, "")]
    for columns in _blocks(comparison):
        blocks.append(_text_table(comparison, columns, (*comparison.figures, *ratio_rows(comparison))))
        blocks.append("where the time went (of each side's result of median e2e_ms)")
        blocks.append(_text_table(comparison, columns, comparison.where_time_went))
    blocks += ["\n".join(lines) for lines in _closing(comparison, "  ")]
    return "\n\n".join(blocks)


def as_markdown(comparison: Comparison) -> str:
    """For issues and reports."""
    blocks = [_header(comparison, "`")]
    for columns in _blocks(comparison):
        blocks.append(_markdown_table(comparison, columns, (*comparison.figures, *ratio_rows(comparison))))
        blocks.append("Where the time went, of each side's result of median `e2e_ms`:")
        blocks.append(_markdown_table(comparison, columns, comparison.where_time_went))
    for title, *lines in _closing(comparison, ""):
        blocks.append("\n".join([f"**{title}**", "", *(f"* {line}" for line in lines)]))
    return "\n\n".join(blocks)


def as_csv(comparison: Comparison) -> str:
    """A line each side, a column each figure: medians, then the ratio, the verdict, and where the time went."""
    rows = (*comparison.figures, *_bare_ratio_rows(comparison), *comparison.where_time_went)
    differ = [Row(f"setting {name}", tuple(map(_setting, cells))) for name, cells in comparison.settings.items()]
    differ += [Row(f"provenance {name}", tuple(map(_setting, cells))) for name, cells in comparison.provenance.items()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["side", *(row.name for row in (*rows, *differ))])
    for place, side in enumerate(comparison.sides):
        writer.writerow([side.name, *(significant(row.cells[place]) for row in (*rows, *differ))])
    return text.getvalue().rstrip("\n")


# -- tables


def _blocks(comparison: Comparison) -> Iterator[list[int]]:
    others = list(range(1, len(comparison.sides)))
    for start in range(0, len(others), _MOST_COLUMNS - 1):
        yield [0, *others[start : start + _MOST_COLUMNS - 1]]


def letters(place: int) -> str:
    """A, B, … Z, AA, AB, …: what a side is called in a table's head."""
    name = ""
    while place >= 0:
        place, letter = divmod(place, 26)
        name = chr(ord("A") + letter) + name
        place -= 1
    return name


def _text_table(comparison: Comparison, columns: Sequence[int], rows: Sequence[Row]) -> str:
    shown = [["", *(letters(place) for place in columns)]]
    shown += [[row.name, *(shown_cell(row.cells[place]) for place in columns)] for row in rows]
    widths = [max(len(line[column]) for line in shown) for column in range(len(shown[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in shown
    )


def _markdown_table(comparison: Comparison, columns: Sequence[int], rows: Sequence[Row]) -> str:
    lines = [["", *(letters(place) for place in columns)], ["---", *("---:" for _ in columns)]]
    lines += [[row.name, *(shown_cell(row.cells[place]) for place in columns)] for row in rows]
    return "\n".join("| " + " | ".join(_no_bars(cell) for cell in line) + " |" for line in lines)


def _no_bars(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def shown_cell(value: Cell) -> str:
    """A figure for people: four digits or more, - for none."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def ratio_rows(comparison: Comparison) -> Iterator[Row]:
    """e2e_ms over the base's, its interval and the verdict, for people."""
    percent = f"{100 * CONFIDENCE:.0f} %"
    ratios = ("-" if a.ratio is None or a.obstacles else f"{a.ratio.value:.4f}" for a in comparison.against)
    yield Row("e2e_ms ratio to A", ("1", *ratios))
    yield Row(f"{percent} interval", ("", *(_shown_interval(a) for a in comparison.against)))
    yield Row("verdict", ("base", *(a.verdict for a in comparison.against)))


def _shown_interval(against: Against) -> str:
    """None where nothing is judged: an interval of two samples is as wide as chance would have it."""
    if against.ratio is None or not against.judged:
        return "-"
    return f"{against.ratio.low:.4f}..{against.ratio.high:.4f}"


def _bare_ratio_rows(comparison: Comparison) -> Iterator[Row]:
    """The same for programs: empty where two sides are not comparable."""
    ratios = [against.ratio if not against.obstacles else None for against in comparison.against]
    yield Row("ratio", (1.0, *(ratio.value if ratio else None for ratio in ratios)))
    judged = [ratio if ratio is not None and ratio.judged is not None else None for ratio in ratios]
    yield Row("ratio_low99", (None, *(ratio.low if ratio else None for ratio in judged)))
    yield Row("ratio_high99", (None, *(ratio.high if ratio else None for ratio in judged)))
    yield Row("verdict", ("base", *(against.verdict for against in comparison.against)))
    yield Row("why", (None, *(why_unjudged(against) or None for against in comparison.against)))


# -- words


def _header(comparison: Comparison, quote: str) -> str:
    lines = []
    for place, side in enumerate(comparison.sides):
        made = side.typical.provenance.utc if side.typical is not None else "no result"
        role = " (base)" if place == 0 else ""
        lines.append(f"{letters(place)} = {quote}{_no_bars(side.name)}{quote}{role}, {made}")
    return "  \n".join(lines) if quote else "\n".join(lines)


def _closing(comparison: Comparison, indent: str) -> Iterator[list[str]]:
    yield ["verdicts", *(f"{indent}{line}" for line in verdict_lines(comparison))]
    for title, values in (("settings", comparison.settings), ("provenance", comparison.provenance)):
        lines = [f"{indent}{line}" for line in differing_lines(values)] or [f"{indent}none"]
        yield [f"{title} that differ", *lines]
    if comparison.warnings:
        yield ["warnings", *(f"{indent}{line}" for line in warning_lines(comparison))]


def verdict_lines(comparison: Comparison) -> Iterator[str]:
    """A sentence each side: the verdict, and what it rests on."""
    for place, against in enumerate(comparison.against, 1):
        why = why_unjudged(against)
        ratio = against.ratio
        if why or ratio is None:
            yield f"{letters(place)}: {against.verdict}: {why}"
            continue
        yield (
            f"{letters(place)}: {against.verdict}: e2e_ms is {ratio.value:.4f} times A's "
            f"({100 * CONFIDENCE:.0f} % interval {_shown_interval(against)}, Welch on logarithms, "
            f"n {ratio.n[0]} and {ratio.n[1]})"
        )


def warning_lines(comparison: Comparison) -> Iterator[str]:
    """Each warning once, with the letters of its sides."""
    called = {side.name: letters(place) for place, side in enumerate(comparison.sides)}
    for warning in dict.fromkeys(warning for _, warning in comparison.warnings):
        yield f"{', '.join(called[name] for name, told in comparison.warnings if told == warning)}: {warning}"


def differing_lines(values: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    for name, found in values.items():
        yield f"{name}: " + ", ".join(f"{letters(place)} {_setting(value)}" for place, value in enumerate(found))


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)
