"""A comparison as text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from bench.compare.compare import Against, Cell, Comparison, Rows, are_equal, outputs_of
from bench.compare.difference import Difference
from bench.compare.verdict import CONFIDENCE
from bench.compare.work import shown_setting
from bench.result.results import significant

MEDIANS = "each figure is the median of its own over the rounds or processes"
"""What a table of sides shows, where it is not one round's figures."""
_MOST_COLUMNS = 5
"""Sides beside each other in text and Markdown; the base is repeated in each block."""
_VARYING = re.compile(r"^(prefill|decode)(?=: )|\d[\d.,]*")
"""What two warnings of a kind differ in."""
_PERCENT = f"{100 * CONFIDENCE:.0f} %"


def as_text(comparison: Comparison, *, verbose: bool = False) -> str:
    """For the terminal; ``verbose``: every warning, instead of one of a kind."""
    tables = _tables(comparison, "plain", "where the time went (of each side's result of median e2e_ms)")
    closing = ("\n  ".join(lines) for lines in _closing(comparison, verbose))
    return "\n\n".join(["\n".join(_header(comparison, "")), *tables, *closing])


def as_markdown(comparison: Comparison, *, verbose: bool = False) -> str:
    """For issues and reports."""
    tables = _tables(comparison, "pipe", "Where the time went, of each side's result of median `e2e_ms`:")
    closing = ("\n* ".join([f"**{title}**\n", *lines]) for title, *lines in _closing(comparison, verbose))
    return "\n\n".join(["  \n".join(_header(comparison, "`")), *tables, *closing])


def as_csv(comparison: Comparison) -> str:
    """A line each side, a column each figure: medians, then the ratio, the verdict, and where the time went."""
    compared = {**_bare_ratios(comparison.against), **_bare_differences(comparison.against)}
    rows: Rows = {**comparison.figures, **compared, **comparison.where_time_went}
    for what, values in (("setting", comparison.settings), ("provenance", comparison.provenance)):
        rows |= {f"{what} {name}": [shown_setting(value) for value in found] for name, found in values.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["side", *rows])
    for place, side in enumerate(comparison.sides):
        writer.writerow([side.name, *(significant(cells[place]) for cells in rows.values())])
    return text.getvalue().rstrip("\n")


# -- tables


def _tables(comparison: Comparison, form: str, title: str) -> Iterator[str]:
    """For each block of sides their figures, what forbids comparing and, under ``title``, where the time went."""
    figures = {**comparison.figures, **_shown_ratios(comparison.against)}
    for start in range(1, len(comparison.sides), _MOST_COLUMNS - 1):
        places = [0, *range(len(comparison.sides))[start : start + _MOST_COLUMNS - 1]]
        yield _table(figures, places, form)
        for place in places[1:]:
            if (against := comparison.against[place - 1]).obstacles:
                yield f"{letters(place)} is not comparable with A: {against.why}"
        yield title
        yield _table(comparison.where_time_went, places, form)


def _table(rows: Rows, places: Sequence[int], form: str) -> str:
    shown = [[name, *(shown_cell(cells[place]) for place in places)] for name, cells in rows.items()]
    align = ["left", *("right" for _ in places)]
    return str(tabulate(shown, ["", *map(letters, places)], form, disable_numparse=True, colalign=align))


def letters(place: int) -> str:
    """A, B, … Z, AA, AB, …: what a side is called in a table's head."""
    before, letter = divmod(place, 26)
    return (letters(before - 1) if before else "") + chr(ord("A") + letter)


def shown_cell(value: Cell) -> str:
    """A figure for people: four digits or more, - for none."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _shown_ratios(sides: Sequence[Against]) -> Rows:
    """e2e_ms over the base's, its interval and the verdict, for people."""
    return {
        "e2e_ms ratio to A": ["1", *(f"{side.ratio.value:.4f}" if side.ratio else "-" for side in sides)],
        f"{_PERCENT} interval": ["", *(_shown_interval(side) for side in sides)],
        "verdict": ["base", *(side.verdict for side in sides)],
    }


def _shown_interval(side: Against) -> str:
    """None where nothing is judged: an interval of two samples is as wide as chance would have it."""
    return f"{side.ratio.low:.4f}..{side.ratio.high:.4f}" if side.ratio and side.ratio.judged else "-"


def _bare_ratios(sides: Sequence[Against]) -> Rows:
    """The same for programs: empty where two sides are not comparable."""
    judged = [side.ratio if side.ratio and side.ratio.judged else None for side in sides]
    return {
        "ratio": [1.0, *(side.ratio.value if side.ratio else None for side in sides)],
        "ratio_low99": [None, *(ratio.low if ratio else None for ratio in judged)],
        "ratio_high99": [None, *(ratio.high if ratio else None for ratio in judged)],
        "verdict": ["base", *(side.verdict for side in sides)],
        "why": [None, *(side.why or side.expected or None for side in sides)],
    }


def _bare_differences(sides: Sequence[Against]) -> Rows:
    """Where outputs part from the base's; no columns where none is known to."""
    found = [side.difference for side in sides]
    if not any(found):
        return {}
    return {
        "differs row": [None, *(each.row if each else None for each in found)],
        "differs token": [None, *(each.token if each else None for each in found)],
        "differs margin base": [None, *(each.margins[0] if each else None for each in found)],
        "differs margin side": [None, *(each.margins[1] if each else None for each in found)],
    }


# -- words


def _header(comparison: Comparison, quote: str) -> Iterator[str]:
    for place, side in enumerate(comparison.sides):
        made = side.typical.provenance.utc if side.typical is not None else "no result"
        role = " (base)" if place == 0 else ""
        name = side.name.replace("|", "\\|").replace("\n", " ")
        yield f"{letters(place)} = {quote}{name}{quote}{role}, {made}"
    if any(len(side.samples("e2e_ms")) > 1 for side in comparison.sides):
        yield f"{MEDIANS} (a run's own summary shows its round of median e2e_ms)"


def _closing(comparison: Comparison, verbose: bool) -> Iterator[list[str]]:
    """Sections: a title, then lines."""
    yield ["outputs", *output_lines(comparison)]
    yield ["verdicts", *verdict_lines(comparison)]
    for title, values in (("settings", comparison.settings), ("provenance", comparison.provenance)):
        yield [f"{title} that differ", *(list(differing_lines(values)) or ["none"])]
    if lines := [*warning_lines(comparison, verbose)]:
        yield ["warnings", *lines]


def warning_lines(comparison: Comparison, verbose: bool) -> Iterator[str]:
    """The warnings with their sides' letters: of those that differ in a phase or in figures alone one, unless verbose.

    Each is whole in its result's JSON.
    """
    called = {side.name: letters(place) for place, side in enumerate(comparison.sides)}
    kinds: dict[str, dict[str, Sequence[str]]] = {}
    for said, names in comparison.warnings.items():
        kinds.setdefault(said if verbose else _VARYING.sub("#", said), {})[said] = names
    for alike in kinds.values():
        meant = {name for names in alike.values() for name in names}
        more = f" (and {len(alike) - 1} more of the kind: --verbose)" if len(alike) > 1 else ""
        yield f"{', '.join(called[name] for name in called if name in meant)}: {next(iter(alike))}{more}"


def verdict_lines(comparison: Comparison) -> Iterator[str]:
    """A sentence each side: the verdict, and what it rests on."""
    for place, side in enumerate(comparison.against, 1):
        said = side.why
        if side.ratio and side.ratio.judged:
            said = (
                f"e2e_ms is {side.ratio.value:.4f} times A's ({_PERCENT} interval {_shown_interval(side)}, "
                f"Welch on logarithms, n {side.ratio.n[0]} and {side.ratio.n[1]})"
            )
        yield f"{letters(place)}: {side.verdict}: {said}"


def output_lines(comparison: Comparison) -> Iterator[str]:
    """Whether all sides generated the same tokens; where not, which did, and where the others part from A."""
    yield outputs_line(comparison)
    for place, against in enumerate(comparison.against, 1):
        if against.expected:
            yield f"{letters(place)} has other tokens than A, as it may: {against.expected}"
        elif (found := against.difference) is not None:
            yield _shown_difference(found, letters(place))


def _shown_difference(found: Difference, side: str) -> str:
    names = "A", side
    margins = [f"{m:.4g} in {name}" for name, m in zip(names, found.margins, strict=True) if m is not None]
    if margins:
        said = f"the largest logit is above the next there by {' and '.join(margins)}"
    else:
        said = "no margin was kept, which tells a near tie: run both with --temperature 0 --verify-rows 2 or more"
    return (
        f"{side} parts from A in row {found.row} at new token {found.token} (position {found.position}): "
        f"token {found.tokens[1]} against token {found.tokens[0]}; {said}"
    )


def outputs_line(comparison: Comparison) -> str:
    """Whether all sides generated the same tokens, and which did where not."""
    found = {digest and digest[:12]: places for digest, places in outputs_of(comparison).items()}
    if are_equal(found):
        return f"equal: all {len(comparison.sides)} sides generated the same tokens (sha256 {next(iter(found))})"
    groups = [f"{', '.join(map(letters, places))} {digest or 'no result'}" for digest, places in found.items()]
    return f"not equal: {'; '.join(groups)}"


def differing_lines(values: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    for name, found in values.items():
        yield f"{name}: " + ", ".join(f"{letters(place)} {shown_setting(value)}" for place, value in enumerate(found))
