"""Sides against the first one: figures, the one test, what differs, and what forbids comparing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

from msgspec import UNSET

from bench.compare.difference import Difference, first_difference
from bench.compare.sides import Side, differing, mixed_within, once, provenance_of, settings_of
from bench.compare.verdict import FEWEST, Ratio, ratio_of
from bench.compare.work import expected, nodes_of, obstacles, short
from bench.result.types import METRICS, PASS_FIGURES, LinkRates, Result
from bench.result.types_phases import Busy, Idle, Stall, Traffic
from bench.result.types_speculation import Speculation
from wsm.errors import UnusableInput
from wsm.words import plural

Cell = float | str | None
Rows: TypeAlias = dict[str, Sequence[Cell]]
"""A cell for every side, by figures' names, which carry their units."""


@dataclass(frozen=True, slots=True)
class Against:
    """A side against the base; where ``obstacles`` forbid comparing the two, there is no ratio.

    ``difference``: where their outputs part; None for equal ones, and where nobody knows. ``expected``: why they differ
    as they may, a lossy format beside an exact one say; empty for equal ones, and where they should be.
    """

    side: Side
    obstacles: tuple[str, ...]
    ratio: Ratio | None
    difference: Difference | None
    expected: str

    @property
    def verdict(self) -> str:
        """In words, for every case."""
        return (self.ratio.judged or "no verdict") if self.ratio else "not comparable"

    @property
    def why(self) -> str:
        """Why there is no verdict, in words."""
        if self.ratio and not self.ratio.judged:
            return f"n is {self.ratio.n[0]} and {self.ratio.n[1]}, and a verdict needs {FEWEST} a side"
        return "; ".join(self.obstacles)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that ``compare`` says; ``sides[0]`` is the base."""

    sides: Sequence[Side]
    figures: Rows
    where_time_went: Rows
    against: Sequence[Against]
    settings: Mapping[str, Sequence[Any]]
    provenance: Mapping[str, Sequence[Any]]
    warnings: Mapping[str, Sequence[str]]


def compare(sides: Sequence[Side]) -> Comparison:
    """The comparison of every side with the first; raises UnusableInput for fewer than two."""
    if len(sides) < 2:
        raise UnusableInput(
            f"compare needs two sides or more, and {sides[0].source if sides else 'nothing'} is one: name another "
            "result or folder beside it"
        )
    typical = [side.typical for side in sides]
    return Comparison(
        sides=sides,
        figures=dict(_figures(sides, typical)),
        where_time_went=dict(_where(typical)),
        against=[_against(sides[0], side) for side in sides[1:]],
        settings=differing([None if result is None else _settings_run(result) for result in typical]),
        provenance=differing([None if result is None else provenance_of(result) for result in typical]),
        warnings=_warnings(sides),
    )


def _settings_run(result: Result) -> dict[str, Any]:
    """With the rows of a pass that were run where --verify-rows left them open."""
    return {**settings_of(result), "verify_rows": nodes_of(result)}


# -- figures


def _figures(sides: Sequence[Side], typical: Sequence[Result | None]) -> Iterator[tuple[str, Sequence[Cell]]]:
    yield "n", [side.sampled for side in sides]
    for metric in (*PASS_FIGURES, *METRICS):
        found = [side.samples(metric) for side in sides]
        yield f"median {metric}", [statistics.median(samples) if samples else None for samples in found]
    if any(rates := [tokens_a_pass(result) for result in typical]):
        yield "tokens a pass", rates
    found = [side.samples("e2e_ms") for side in sides]
    yield "stdev e2e_ms", [statistics.stdev(samples) if len(samples) > 1 else None for samples in found]
    for link in LinkRates.__struct_fields__:
        rates = _cells(typical, f"io_bw_MBps.{link}")
        if link == "weight_h2d_MBps" or any(rate is not None for rate in rates):
            yield f"io {link}", rates
    yield "gpu allocated_GB", _cells(typical, "gpu_mem_GB.allocated_GB")
    yield "page_locked_MB", _cells(typical, "memory.cpu_page_locked_bytes", 1e6)


def tokens_a_pass(result: Result | None) -> float | None:
    """Of a row; None without a draft."""
    return result.speculation.tokens_a_pass if result and isinstance(result.speculation, Speculation) else None


def _cells(typical: Sequence[Result | None], path: str, unit: float = 1) -> list[Any]:
    """What the results have at ``path``, in ``unit``; None for a side without one, or without a figure there."""
    found = [None if result is None else attrgetter(path)(result) for result in typical]
    return found if unit == 1 else [None if value is None else value / unit for value in found]


def _where(typical: Sequence[Result | None]) -> Iterator[tuple[str, Sequence[Cell]]]:
    """Each phase of the results of median e2e_ms: its time, its bytes, and what each tier did meanwhile."""
    for phase in ("prefill", "decode"):
        for key in ("wall_ms", "floor_ms", "roofline_pct", "bound_by"):
            yield f"{phase} {key}", _cells(typical, f"phases.{phase}.{key}")
        if phase == "prefill":
            yield "prefill passes", _cells(typical, "phases.prefill.passes")
        paths = {f"{tier} MB": (f"bytes_moved.{tier}", 1e6) for tier in Traffic.__struct_fields__}
        for group, tiers in {"busy_ms": Busy, "stall_ms": Stall, "idle_ms": Idle}.items():
            paths |= {f"{tier} {group}": (f"{group}.{tier}", 1) for tier in tiers.__struct_fields__}
        for name, (path, unit) in paths.items():
            if any(cells := _cells(typical, f"phases.{phase}.{path}", unit)):  # what none of them used says nothing
                yield f"{phase} {name}", cells


# -- verdicts


def _against(base: Side, side: Side) -> Against:
    found = tuple(obstacles(base, side))
    ratio = None if found else ratio_of(base.samples("e2e_ms"), side.samples("e2e_ms"))
    both = base.typical, side.typical
    return Against(side, found, ratio, first_difference(*both), expected(*both))


Outputs: TypeAlias = dict[str | None, list[int]]


def outputs_of(comparison: Comparison) -> Outputs:
    """The places of the sides that generated each output, by its digest; under None those that gave no result."""
    found: Outputs = {}
    for place, side in enumerate(comparison.sides):
        for digest in dict.fromkeys(result.output.sha256 for result in side.results) or (None,):
            found.setdefault(digest, []).append(place)
    return found


def are_equal(outputs: Outputs) -> bool:
    """Whether all sides generated the same tokens."""
    return len(outputs) == 1 and None not in outputs


def regressions(comparison: Comparison, threshold_pct: float) -> Iterator[tuple[Side, float]]:
    """The sides that are slower than the base by more than the threshold, and by how many percent.

    Raises UnusableInput where a side could not be judged: then nobody knows, and silence would look like success.
    """
    for against in comparison.against:
        if against.why:
            raise UnusableInput(f"--threshold cannot be judged for {against.side.name}: {against.why}")
    for against in comparison.against:
        assert against.ratio is not None
        percent = 100 * (against.ratio.value - 1)
        if against.verdict == "slower" and percent > threshold_pct:
            yield against.side, percent


def undecided(comparison: Comparison, threshold_pct: float) -> Iterator[tuple[Side, Ratio]]:
    """The sides that are no regression and whose interval rules none out: silence would be a claim."""
    most = 1 + threshold_pct / 100
    for against in comparison.against:
        ratio = against.ratio
        shown = against.verdict == "slower" and ratio is not None and ratio.value > most
        if ratio is not None and ratio.high is not None and ratio.high > most and not shown:
            yield against.side, ratio


def _warnings(sides: Sequence[Side]) -> dict[str, list[str]]:
    """Each warning with its sides' names; what a side's results differ in, and its failed processes, are some too."""
    named: dict[str, list[str]] = {}
    for side, of_copies in zip(sides, copied(sides), strict=True):
        said = [*dict.fromkeys(line for result in side.results for line in result.warnings)]
        for name, values in mixed_within(side).items():
            said.append(f"its results differ in {name}: {', '.join(map(short, values))}")
        said += [f"a process failed with {failure}" for failure in side.failures]
        said += [*of_copies, *_other_matmul(sides[0].typical, side.typical)]
        for warning in said:
            named.setdefault(warning, []).append(side.name)
    return named


def copied(sides: Sequence[Side]) -> list[list[str]]:
    """Of each side what of it is there twice: within it, or on a side before it."""
    held = [once(side.results).keys() for side in sides]
    return [
        [*_copies_within(side), *_shared_with(sides[:place], held[place], held)] for place, side in enumerate(sides)
    ]


def _copies_within(side: Side) -> Iterator[str]:
    if side.copies:
        are = plural(side.copies, "is a copy", "are copies")
        yield f"{side.copies} of its results {are} of another one: each process counts once"


def _shared_with(others: Sequence[Side], own: AbstractSet[Any], held: Sequence[AbstractSet[Any]]) -> Iterator[str]:
    for other, theirs in zip(others, held, strict=False):
        if shared := len(theirs & own):
            are = plural(shared, "is that", "are those")
            yield f"{shared} of its results {are} of {other.name}: a process on both sides compares nothing"


def _other_matmul(base: Result | None, side: Result | None) -> Iterator[str]:
    """A line where arithmetic bounds a phase and only one of two has the rate that lasts apart from that from rest."""
    both = [result for result in (base, side) if result is not None]
    if len({result.ceilings.matmul_burst is UNSET for result in both}) < 2:
        return
    for phase in ("prefill", "decode"):
        if any(getattr(result.phases, phase).bound_by == "compute" for result in both):
            yield (
                f"its {phase} floor counts arithmetic at another kind of ceiling (an older program's `matmul` was "
                "measured from rest): compare times, not roofline_pct"
            )
