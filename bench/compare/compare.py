"""Sides against the first one: figures, the one test, what differs, and what forbids comparing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from bench.compare.sides import Side, device_of, differing, mixed_devices, mixed_within, provenance_of, settings_of
from bench.compare.verdict import FEWEST, Ratio, ratio_of
from bench.result.types import METRICS, LinkRates, Result
from bench.result.types_phases import Busy, Idle, Stall, Traffic
from wsm.errors import UnusableInput

Cell = float | str | None
_TIMES = {
    "busy_ms": Busy.__struct_fields__,
    "stall_ms": Stall.__struct_fields__,
    "idle_ms": Idle.__struct_fields__,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of every side; ``name`` carries its unit."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Against:
    """A side against the base.

    Attributes:
        obstacles: what forbids comparing the two; then the ratio says nothing, and there is no verdict.
    """

    side: Side
    ratio: Ratio | None
    obstacles: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """In words, for every case."""
        if self.obstacles:
            return "not comparable"
        if self.ratio is None or self.ratio.judged is None:
            return "no verdict"
        return self.ratio.judged

    @property
    def judged(self) -> bool:
        return not self.obstacles and self.ratio is not None and self.ratio.judged is not None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that ``compare`` says; ``sides[0]`` is the base."""

    sides: tuple[Side, ...]
    figures: tuple[Row, ...]
    where_time_went: tuple[Row, ...]
    against: tuple[Against, ...]
    settings: Mapping[str, Sequence[Any]]
    provenance: Mapping[str, Sequence[Any]]
    warnings: tuple[tuple[str, str], ...]


def compare(sides: Sequence[Side]) -> Comparison:
    """The comparison of every side with the first.

    Raises:
        UnusableInput: for fewer than two sides.
    """
    if len(sides) < 2:
        raise UnusableInput(f"compare needs two sides or more, and {sides[0].source if sides else 'nothing'} is one")
    typical = [side.typical for side in sides]
    return Comparison(
        sides=tuple(sides),
        figures=tuple(_figures(sides)),
        where_time_went=tuple(_where(typical)),
        against=tuple(_against(sides[0], side) for side in sides[1:]),
        settings=_differing(typical, settings_of),
        provenance=_differing(typical, provenance_of),
        warnings=tuple(_warnings(sides)),
    )


def _differing(typical: Sequence[Result | None], of: Callable[[Result], dict[str, Any]]) -> dict[str, list[Any]]:
    """What differs, with each side's value; None for a side without a result."""
    found = [None if result is None else of(result) for result in typical]
    names = differing([values for values in found if values is not None])
    return {name: [None if values is None else values.get(name) for values in found] for name in names}


# -- figures


def _figures(sides: Sequence[Side]) -> Iterator[Row]:
    yield Row("n", tuple(f"{len(side.samples('e2e_ms'))} {side.sampled}" for side in sides))
    for metric in METRICS:
        yield Row(f"median {metric}", tuple(_of_samples(side, metric, statistics.median) for side in sides))
    yield Row("stdev e2e_ms", tuple(_of_samples(side, "e2e_ms", statistics.stdev, 2) for side in sides))
    typical = [side.typical for side in sides]
    for link in LinkRates.__struct_fields__:
        row = _row(f"io {link}", typical, attrgetter(f"io_bw_MBps.{link}"))
        if link == "weight_h2d_MBps" or any(cell is not None for cell in row.cells):
            yield row
    yield _row("gpu allocated_GB", typical, lambda result: result.gpu_mem_GB.allocated_GB)
    yield _row("page_locked_MB", typical, lambda result: result.memory.cpu_page_locked_bytes / 1e6)


def _row(name: str, typical: Sequence[Result | None], read: Callable[[Result], Cell]) -> Row:
    return Row(name, tuple(None if result is None else read(result) for result in typical))


def _of_samples(side: Side, metric: str, of: Callable[[list[float]], float], fewest: int = 1) -> Cell:
    samples = side.samples(metric)
    return of(samples) if len(samples) >= fewest else None


def _where(typical: Sequence[Result | None]) -> Iterator[Row]:
    """Each phase of the results of median e2e_ms: its time, its bytes, and what each tier did meanwhile."""
    for phase in ("prefill", "decode"):
        for key in ("wall_ms", "floor_ms", "roofline_pct", "bound_by"):
            yield _row(f"{phase} {key}", typical, attrgetter(f"phases.{phase}.{key}"))
        if phase == "prefill":
            yield _row("prefill passes", typical, lambda result: result.phases.prefill.passes)
        else:
            yield _row("decode tpot_ms", typical, lambda result: result.tpot_ms.mean if result.tpot_ms else None)
        for tier in Traffic.__struct_fields__:
            moved = _row(f"{phase} {tier} MB", typical, attrgetter(f"phases.{phase}.bytes_moved.{tier}"))
            if any(moved.cells):  # a tier that none of them used says nothing
                yield Row(moved.name, tuple(cell / 1e6 if isinstance(cell, int) else None for cell in moved.cells))
        for group, tiers in _TIMES.items():
            rows = (_row(f"{phase} {t} {group}", typical, attrgetter(f"phases.{phase}.{group}.{t}")) for t in tiers)
            yield from (row for row in rows if any(row.cells))


# -- verdicts


def _against(base: Side, side: Side) -> Against:
    obstacles = tuple(_obstacles(base, side))
    if not base.results or not side.results:
        return Against(side, None, obstacles)
    return Against(side, ratio_of(base.samples("e2e_ms"), side.samples("e2e_ms")), obstacles)


def _obstacles(base: Side, side: Side) -> Iterator[str]:
    for one in (base, side):
        if one.typical is None:
            reasons = "; ".join(f"exit {failure.exit_code}: {failure.reason}" for failure in one.failures)
            yield f"{one.name} gave no result ({reasons})"
            continue
        if devices := mixed_devices(one):
            yield f"{one.name} mixes compute devices: {', '.join(map(_short, devices))}"
        if len(hashes := {result.output.sha256 for result in one.results}) > 1:
            yield f"{one.name} gave {len(hashes)} different outputs from the same settings"
    if base.typical is not None and side.typical is not None:
        yield from _unlike(base.typical, side.typical)


def _unlike(base: Result, side: Result) -> Iterator[str]:
    """What has to be equal for a time to mean the same. Unequal outputs are named where nothing else explains them."""
    looked_at: dict[str, Callable[[Result], Any]] = {
        "model": lambda r: r.config.resolved["model"],
        "model digest": lambda r: r.provenance.model_digest,
        "batch_size": lambda r: r.batch_size,
        "prompt tokens": lambda r: r.prompt_lens,
        "new tokens": lambda r: r.decode_tokens_total,
        "compute device": device_of,
    }
    found = False
    for name, of in looked_at.items():
        before, now = of(base), of(side)
        if before != now:
            found = found or name != "compute device"
            yield f"{name}: {_short(before)} against {_short(now)}"
    if not found and base.output.sha256 != side.output.sha256:
        first, second = base.output.sha256[:12], side.output.sha256[:12]
        yield f"unequal outputs: {first} against {second}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def why_unjudged(against: Against) -> str:
    """Why there is no verdict, in words."""
    if against.obstacles:
        return "; ".join(against.obstacles)
    if against.ratio is not None and against.ratio.judged is None:
        return f"n is {against.ratio.n[0]} and {against.ratio.n[1]}, and a verdict needs {FEWEST} a side"
    return ""


def regressions(comparison: Comparison, threshold_pct: float) -> list[Against]:
    """The sides that are slower than the base by more than the threshold.

    Raises:
        UnusableInput: where a side could not be judged: then nobody knows, and silence would look like success.
    """
    for against in comparison.against:
        if not against.judged:
            raise UnusableInput(f"--threshold cannot be judged for {against.side.name}: {why_unjudged(against)}")
    return [
        against
        for against in comparison.against
        if against.ratio is not None and against.verdict == "slower" and against.ratio.value > 1 + threshold_pct / 100
    ]


def _warnings(sides: Sequence[Side]) -> Iterator[tuple[str, str]]:
    """Each side's warnings once, with its name, what its results differ in, and its failed processes."""
    for side in sides:
        for warning in dict.fromkeys(line for result in side.results for line in result.warnings):
            yield side.name, warning
        for name, values in mixed_within(side).items():
            yield side.name, f"its results differ in {name}: {', '.join(map(_short, values))}"
        for failure in side.failures:
            yield side.name, f"a process failed with exit {failure.exit_code}: {failure.reason}"
