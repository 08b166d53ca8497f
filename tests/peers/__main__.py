"""This project beside others, on one machine, in one shape.

    python -m tests.peers OUT [part …] [--limit 540]     measure: rows are printed at once, and kept in OUT/peers.json
    python -m tests.peers --table docs/results/peers/*.json [--into docs/PERFORMANCE.md]        the rows as Markdown

Each part has a process and a time limit of its own. What a peer cannot do leaves a row with its error. Parts, in order
(all of them without a choice), and the seconds that each takes on an H100 with 16 cores, about: see ``--help``.
Peers run at their best settings that were found, not as they come: where the two differ, both are rows. One warm-up,
then the median. Needed: accelerate and transformers; bitsandbytes; deepspeed; LLAMA_BENCH=llama.cpp's llama-bench. One
CUDA device, 64 GiB of CPU memory, 14 GB on ${FAST:-/dev/shm}, and 36 GB on ${DRIVE:-/tmp} for ``accelerate_disk``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from llama.config import PRESETS
from tests.gpu.performance import put_into
from tests.peers import llama_bench, ours
from tests.peers.rows import MARK, Row, Work, emit, one_line

ROOT = Path(__file__).resolve().parents[2]
FAST = Path(os.environ.get("FAST", "/dev/shm")) / "wsm-peers"
DRIVE = Path(os.environ.get("DRIVE", "/tmp")) / "wsm-peers"


def _torch_peer(name: str) -> Callable[[Work, Path], None]:
    def part(work: Work, out: Path) -> None:
        from tests.peers import torch_peers

        getattr(torch_peers, name)(work)

    return part


def _disk(work: Work, out: Path) -> None:
    from tests.peers.torch_peers import accelerate_disk

    accelerate_disk(work, out, DRIVE)


PARTS: dict[str, tuple[int, int, Callable[[Work, Path], None]]] = {
    "ours": (120, 190, ours.four_bits),
    "llama_cpp": (140, 210, lambda work, out: llama_bench.measure(work, FAST / "model.gguf")),
    "ours_bf16": (60, 110, ours.bf16),
    "accelerate": (50, 80, _torch_peer("accelerate")),
    "accelerate_partly": (30, 50, _torch_peer("accelerate_partly")),
    "bitsandbytes": (45, 80, _torch_peer("bitsandbytes")),
    "deepspeed": (45, 80, _torch_peer("deepspeed")),
    "accelerate_disk": (125, 200, _disk),
}
"""Name -> seconds that it takes, about; its limit; what it does."""


BEGIN = "<!-- made by `python -m tests.peers --table docs/results/peers/*.json --into docs/PERFORMANCE.md` -->"
END = "<!-- end of what the peers' table is -->"


def rows_of(command: Sequence[str], log: Path, limit: float) -> Generator[Row, None, None]:
    """The rows that a part writes, as they come; one more, if it ends badly or is stopped, that says so."""
    part, stopped = log.stem, threading.Event()
    with (
        log.open("w") as words,
        log.with_suffix(".out").open("w") as others,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=words, text=True, cwd=ROOT, start_new_session=True
        ) as process,
    ):

        def stop() -> None:
            stopped.set()
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)

        clock = threading.Timer(limit, stop)
        clock.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    yield replace(Row(**json.loads(line.removeprefix(MARK))), part=part)
                else:
                    others.write(line)
            process.wait()
        finally:
            clock.cancel()
            if (
                process.poll() is None
            ):  # whoever reads the rows was interrupted: a session of its own hears of no Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        why = f"stopped at its limit of {limit:.0f} s" if stopped.is_set() else f"ended: {lines[-1][:300]}"
        yield Row(part, "", "", 0, "", could_not=why, part=part)


def measure(work: Work, out: Path, parts: Sequence[str], limit: float) -> None:
    began, rows, path = time.monotonic(), list[Row](), out / "peers.json"
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        rows = [row for row in load(path) if row.part not in parts]
    for name in parts:
        expected, most, _ = PARTS[name]
        left = limit - (time.monotonic() - began)
        print(f"{name}: about {expected} s of {left:.0f} s left", flush=True)
        command = [sys.executable, "-m", "tests.peers", str(out), "--only", name]
        command += ["--shape", json.dumps(asdict(work))]
        began_part = time.monotonic()
        if left < expected:
            found: Iterator[Row] = iter(
                [Row(name, "", "", 0, "", could_not=f"not begun: {left:.0f} s were left", part=name)]
            )
        else:
            found = rows_of(command, out / f"{name}.log", min(most, left))
        try:
            for row in found:
                rows.append(row)
                print("  " + spoken(row), flush=True)
                path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        finally:
            shutil.rmtree(FAST, ignore_errors=True)
            shutil.rmtree(DRIVE, ignore_errors=True)
        print(f"{name}: {time.monotonic() - began_part:.0f} s", flush=True)
    print(table(rows))


def spoken(row: Row) -> str:
    took = row.could_not or f"{row.s_a_pass:.4f} s a pass, {row.tok_s:.2f} tok/s"
    return f"{row.peer}: {row.scene}, {row.form}, B={row.batch}, {row.settings}: {took}"


def load(path: Path) -> list[Row]:
    names = {field.name for field in fields(Row)}
    return [Row(**{key: value for key, value in row.items() if key in names}) for row in json.loads(path.read_text())]


def beside(row: Row, rows: Sequence[Row]) -> Row | None:
    """This project's row of the same scene and batch: of its format, or else the first, whose format is then said."""
    mine = [r for r in rows if r.peer == ours.NAME and (r.scene, r.batch) == (row.scene, row.batch) and r.s_a_pass]
    return next((r for r in mine if r.form == row.form), next(iter(mine), None))


def table(rows: Sequence[Row]) -> str:
    """What was measured, a table for each scene, in the order of batch and time; then what could not be."""
    text = []
    measured = [row for row in rows if row.s_a_pass]
    for scene in dict.fromkeys(row.scene for row in measured):
        found = sorted((r for r in measured if r.scene == scene), key=lambda r: (r.batch, r.s_a_pass or 0))
        lines = [HEADERS, ["---"] * len(HEADERS), *(_cells(r, rows) for r in found)]
        text += [f"**{scene}**", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]
    for row in rows:
        if row.could_not:
            what = ", ".join(word for word in (row.scene, row.form, row.settings) if word)
            text.append(f"* {row.peer} ({what or 'part'}): {row.could_not}")
    return "\n".join(text)


HEADERS = ["who", "format", "B", "s a pass", "time of ours", "tok/s", "GB moved", "GPU GiB", "settings"]


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    mine = beside(row, rows)
    assert row.s_a_pass
    assert row.tok_s
    ratio = ""
    if mine and mine.s_a_pass and mine is not row:
        ratio = f"{row.s_a_pass / mine.s_a_pass:.2f} ×" + (f" {mine.form}" if mine.form != row.form else "")
    moved = (
        ""
        if row.moved_bytes is None
        else f"{row.moved_bytes / 1e9:.2f} ({row.moved_bytes / row.s_a_pass / 1e9:.1f} GB/s)"
    )
    gpu = "" if row.gpu_GiB is None else f"{row.gpu_GiB:.1f}"
    who = f"{row.peer} {row.version}".strip()
    return [who, row.form, str(row.batch), f"{row.s_a_pass:.4f}", ratio, f"{row.tok_s:.2f}", moved, gpu, row.settings]


def main(arguments: Sequence[str] | None = None) -> None:
    told = ", ".join(f"{name} {seconds}" for name, (seconds, _, _) in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.peers",
        description=__doc__,
        epilog=f"parts and their seconds: {told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, nargs="?", help="the folder for the results")
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all parts together")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script, with a small --name")
    parser.add_argument("--name", default=Work.name, choices=PRESETS, help="whose shape")
    parser.add_argument("--layers", type=int, nargs=2, default=(Work.few, Work.many), help="few and many")
    parser.add_argument("--prompt-len", type=int, default=Work.prompt)
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print such files as Markdown, no more")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put them between the comments of this page")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    known = parser.parse_intermixed_args(arguments)
    if known.table:
        made = table([row for path in known.table for row in load(path)])
        if known.into is not None:
            put_into(known.into, made, BEGIN, END)
        print(made)
        return
    if known.out is None:
        parser.error("name the folder for the results")
    if known.only:
        try:
            PARTS[known.only][2](Work(**known.shape), known.out)
        except Exception as error:
            traceback.print_exc()
            emit(Row(known.only, "", "", 0, "", could_not=one_line(error)))
        return
    if unknown := set(known.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    few, many = known.layers
    held = {"held_bf16": many * 11 // 24, "held_4bit": many // 2, "most_4bit": many * 14 // 24}
    work = replace(Work(known.name, few, many, device=known.device, prompt=known.prompt_len), **held)
    measure(work, known.out.resolve(), known.parts or tuple(PARTS), known.limit)


if __name__ == "__main__":
    main()
