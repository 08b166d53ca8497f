"""The verb ``report``: results as one HTML page, and its plots as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.compare.sides import read_sides
from bench.options.program import called
from bench.options.verb_flags import ReportOptions
from bench.report.charts import overview_charts, side_charts, sweep_charts
from bench.report.timeline import timelines_of
from wsm.disk.atomic import check_folder, nearest, write_atomically
from wsm.disk.files import begins_with
from wsm.errors import UnusableInput
from wsm.words import counted


def run_report(options: ReportOptions) -> int:
    """Write the page, and with ``--png`` a file for every plot; nothing, and UnusableInput, without matplotlib."""
    sides = read_sides(options.paths)
    _check_places(options.out, options.png, options.paths)
    try:
        from bench.report.draw import write_png
        from bench.report.page import page, twice_lines
    except ModuleNotFoundError as error:
        raise UnusableInput(f"report needs {error.name}: {called()[0]} -m pip install matplotlib") from None
    write_atomically(options.out, page(sides))
    print(f"[INFO] {counted(len(sides), 'side')} in {options.out}")
    for line in twice_lines(sides):
        print(f"[WARNING] {line}")
    if options.png is not None:
        options.png.mkdir(parents=True, exist_ok=True)
        charts = [*sweep_charts(sides), *overview_charts(sides)]
        charts += [chart for side in sides for chart in (*timelines_of(side), *side_charts(side))]
        for number, chart in enumerate(charts, 1):
            write_png(chart, options.png, number)
        print(f"[INFO] {counted(len(charts), 'plot')} in {options.png}")
    return 0


def _check_places(out: Path, png: Path | None, read: Sequence[Path]) -> None:
    """Nothing that holds measurements may be written over: no JSON, whatever folder it is in, and nothing named."""
    if {out.suffix, out.resolve().suffix} & {".json", ".jsonl"}:
        raise UnusableInput(f"--out {out} would be a page named like a result: name a file that ends in .html")
    if out.exists() and (not out.is_file() or any(path.exists() and out.samefile(path) for path in read)):
        raise UnusableInput(f"--out {out} is a folder, a device or one of the results: name another file")
    if out.exists() and not begins_with(out, b"<!doctype html>"):
        raise UnusableInput(f"--out {out} is there and holds no page that can be read: name another, or move it away")
    check_folder(out.absolute().parent, f"--out {out}")
    if png is not None:
        there = nearest(png)
        if not there.is_dir() or png.absolute() == out.absolute():
            raise UnusableInput(f"--png {png} is no folder and cannot become one: name another")
        check_folder(there, f"--png {png}")
