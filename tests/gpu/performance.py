"""The table of docs/PERFORMANCE.md: 70B in 24 GiB by weight format, rows of the batch and draft.

    python tests/gpu/performance.py OUT [ROW ...] [--seconds N] [-- FLAGS of bench_infer.py]
    python tests/gpu/performance.py --table docs/results [--into docs/PERFORMANCE.md]

A row is a run of the program in a process of its own, with a limit of its own. It leaves OUT/ROW.json, OUT/ROW.log and
OUT/small/ROW.json, which has what the table needs and belongs in docs/results/; a run that fails leaves its sentence.
ROW is a name or a pattern, 'int4_*'; without any all are run, the most useful first. Small, on the CPU:
performance.py OUT int4_b1 --target Llama-3.2-1B:layers=2 --draft Llama-3.2-1B:layers=1 -- --device cpu
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- made by `python tests/gpu/performance.py --table docs/results --into docs/PERFORMANCE.md` -->"
END = "<!-- end of what it made -->"
NOTHING = "No row has been measured with this script yet."
LIMIT_S = {"bf16": 200, "exact": 170, "fp8": 120, "int8": 120, "int4": 100, "q4_K": 100}
DRAFT = "--draft synthetic:{draft}:agree=0.8,second=0.1 --draft-weight-format int4"
FORMS = {  # what a name says behind its format: rows of the batch, or a shape of a decode pass and how it is called
    "chain12": (f"{DRAFT} --draft-depth 12 --draft-width 1 --verify-rows 13", "chain, depth 12"),
    "tree64": (f"{DRAFT} --draft-depth 12 --verify-rows 64", "tree, 64 nodes"),
    "none13": ("--verify-rows 13", "none, 13 rows"),
    "none64": ("--verify-rows 64", "none, 64 rows"),
}
FORMATS, DRAFTED = ("int4", "exact", "q4_K", "bf16", "int8", "fp8"), ("int4", "exact", "q4_K", "int8")
STEPS = ("b1", "tree64", "b32", "chain12", "b128", "b8")
ORDER = [f"{name}_{form}" for form in STEPS for name in (DRAFTED if form in FORMS else FORMATS)]  # by usefulness
ORDER += ["int4_none13", "int4_none64"]  # the tokens of chain and tree, without a draft
IN_TABLE = [f"{name}_{form}" for name in LIMIT_S for form in ("b1", *FORMS, "b8", "b32", "b128")]
MACHINE = ("gpu", "pcie_gen", "pcie_width", "driver", "torch", "cuda", "cpu", "cpu_cores", "ram_bytes")
PLACE = re.compile(r"""(?<![^\s"'=:(,])/\w[^\s"':;,)\\]*""")
"""A path from the root on, in a command, a warning or a sentence."""
RATE = ("value", "median", "unit", "spread_pct")
COLUMNS = ["format", "B", "draft", "s a token [a pass]", "tok/s", "floor, s a pass", "ratio", "link GB/s", "idle %"]
COLUMNS += ["tokens a pass", "GB a token", "page-locked GiB", "GPU GiB", "run"]


@dataclass(frozen=True)
class Row:
    """One line of the table, by its name: ``int4_b32``, ``exact_tree64``."""

    name: str

    @property
    def weight_format(self) -> str:
        return self.name.rpartition("_")[0]

    @property
    def form(self) -> str:
        return self.name.rpartition("_")[2]

    @property
    def batch_size(self) -> int:
        return 1 if self.form in FORMS else int(self.form[1:])

    @property
    def limit_s(self) -> int:
        """Long enough for a first run on a machine, whose kernels are compiled in it."""
        return LIMIT_S[self.weight_format] + (90 if self.form in FORMS or self.batch_size > 32 else 0)

    def flags(self, target: str, draft: str) -> list[str]:
        """One short warm-up round (a prefill and two passes) stays: in it kernels are compiled and residents arrive."""
        shape, more, tokens = target, f"--batch-size {self.batch_size}", 8
        if self.form in FORMS:  # fewer tokens do not settle an agreement
            shape, more, tokens = f"{target}:cycle", FORMS[self.form][0].format(draft=draft), 256
        stored = "auto" if self.weight_format == "bf16" else self.weight_format
        work = f"--synthetic {shape} --weight-format {stored} --mode stream --gpu-mem-gb 24 --auto --embedding cpu"
        return f"{work} --temperature 0 --prompt-len 128 --max-new-tokens {tokens} {more}".split()


def chosen(patterns: Iterable[str]) -> list[Row]:
    """The rows that a pattern names, in the order of their usefulness; all without one."""
    names = list(patterns) or ["*"]
    for pattern in names:
        if not fnmatch.filter(ORDER, pattern):
            raise SystemExit(f"performance.py: no row is called {pattern}; there are {', '.join(ORDER)}")
    return [Row(name) for name in ORDER if any(fnmatch.fnmatchcase(name, pattern) for pattern in names)]


def run_row(row: Row, known: argparse.Namespace, more: list[str]) -> Json:
    """What is kept of the row's run: the figures of the table, or why there are none."""
    command = [*row.flags(known.target, known.draft), *more]
    result, log = known.out / f"{row.name}.json", known.out / f"{row.name}.log"
    result.unlink(missing_ok=True)
    began, utc = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    places = ["--cache-dir", str(known.cache.resolve()), "--out-json", str(result.resolve())]
    argv = [sys.executable, "bench_infer.py", *command, "--quiet", *places]
    with open(log, "w", encoding="utf-8") as said:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        code = ended(process, row.limit_s)
    kept: Json = {"row": row.name, "weight_format": row.weight_format, "batch_size": row.batch_size}
    kept |= {"draft": FORMS.get(row.form, ("", "none"))[1], "target": known.target}
    kept |= {"command": shlex.join(["bench_infer.py", *command]), "utc": utc}
    kept |= {"took_s": round(time.monotonic() - began, 1), "exit": code, "sentence": None}
    if code == 0:
        kept |= figures(json.loads(result.read_text(encoding="utf-8")))
        kept["machine"]["commit"] = known.commit or kept["machine"]["commit"]
    else:
        stopped = f"stopped at its limit of {row.limit_s} s"
        kept["sentence"] = stopped if code is None else f"exit {code}: {sentence_of(log)}"
    return kept


def ended(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None for a run that was stopped at its limit."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it writes what it has
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return None


def sentence_of(log: Path) -> str:
    """The program's own sentence about its end, or the last line of a run that had none."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line.partition(": ")[2] for line in lines if line.startswith("bench_infer.py: ")]
    return (own or lines or ["it said nothing"])[-1][:400]


def figures(result: Json) -> Json:
    """The figures of a result, times in ms of a mean decode pass, and where they come from."""
    decode, prefill, memory = result["phases"]["decode"], result["phases"]["prefill"], result["memory"]
    passes, wall, idle = decode["passes"], decode["wall_ms"], decode["idle_ms"]["h2d"]
    moved = decode["bytes_moved"]["weight_h2d"] + decode["bytes_moved"]["kv_h2d"]
    tokens = result["decode_tokens_total"] - result["batch_size"]  # a row's first takes no pass
    reserved, speculation = memory["gpu_peak_reserved_bytes"], result["speculation"]
    measured: Json = {
        "pass_ms": wall / passes,
        "pass_p50_ms": result["tpot_ms"]["p50"],
        "passes": passes,
        "floor_ms": decode["floor_ms"] / passes,
        "ratio": wall / decode["floor_ms"],
        "bound_by": decode["bound_by"],
        "decode_tok_s": result["decode_tok_s"],
        "tokens_a_pass": tokens / result["batch_size"] / passes,
        "link_bytes_a_token": (decode["bytes"]["weight_h2d"] + decode["bytes"]["kv_h2d"]) / tokens,
        "link_GBps": None if idle is None or not moved else moved / (wall - idle) / 1e6,
        "link_idle_pct": None if idle is None else 100 * idle / wall,
        "page_locked_bytes": memory["cpu_page_locked_peak_bytes"],
        "gpu_bytes": None if reserved is None else reserved + memory["gpu_context_bytes"],
        "gpu_layers": result["residency"]["gpu"]["layers"],
        "prefill_ms": prefill["wall_ms"],
        "prefill_floor_ms": prefill["floor_ms"],
        "from_process_start_s": result["load_s"]["from_process_start_s"],
        "sha256": result["output"]["sha256"],
    }
    measured = {name: round(value, 4) if isinstance(value, float) else value for name, value in measured.items()}
    if speculation is not None:
        measured["drafting_ms"] = speculation["drafting_ms"]
        measured["drafting_hidden_pct"] = speculation["drafting_hidden_pct"]
        measured["agreement"] = speculation["synthetic_agreement"]
    origin = result["provenance"]
    commit = str(origin["git_commit"])[:10] + (" and changes" if origin["git_dirty"] else "")
    return {
        "measured": measured,
        "ceilings": {name: {key: rate[key] for key in RATE} for name, rate in result["ceilings"].items()},
        "conditions": result["conditions"],
        "warnings": result["warnings"],
        "machine": {"commit": commit, **{name: origin[name] for name in MACHINE}},
    }


def run_all(known: argparse.Namespace, more: list[str]) -> int:
    """Run the chosen rows until the time is over; a line for each. Returns the exit code."""
    (known.out / "small").mkdir(parents=True, exist_ok=True)
    began, kept, left = time.monotonic(), list[Json](), list[str]()
    for row in chosen(known.row):
        if known.but is not None and (known.but / f"{row.name}.json").exists():
            continue
        if time.monotonic() - began > known.seconds:
            left.append(row.name)
            continue
        kept.append(run_row(row, known, more))
        write(known.out, {"machine": None, **kept[-1]})
        print(f"{row.name}: {kept[-1]['took_s']} s, {summary(kept[-1])}", flush=True)
    machines = [entry["machine"] for entry in kept if "machine" in entry]
    for entry in kept:  # where a run failed, the machine is that of the others of this call
        write(known.out, {"machine": machines[0] if machines else None, **entry})
    if left:
        print(f"not started, the time being over: {' '.join(left)}")
    return 0 if machines or not kept else 1


def write(out: Path, entry: Json) -> None:
    """The small file of a row. It is published, so the folders of this machine have no names in it."""
    text = PLACE.sub("…", json.dumps(entry, indent=1, ensure_ascii=False))
    (out / "small" / f"{entry['row']}.json").write_text(f"{text}\n", encoding="utf-8")


def summary(entry: Json) -> str:
    """A line about a row that has just ended."""
    if entry["sentence"]:
        return str(entry["sentence"])
    m = entry["measured"]
    return (
        f"a pass {m['pass_ms']:.1f} ms (p50 {m['pass_p50_ms']:.1f}), {m['ratio']:.3f} x floor ({m['bound_by']}), "
        f"{m['decode_tok_s']:.3f} tok/s, {m['sha256'][:8]}, {m['from_process_start_s']:.1f} s before the timed round"
    )


def table(folder: Path) -> str:
    """The Markdown table of the rows that ``folder`` has, and below it where each was measured."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    entries = [found[name] for name in IN_TABLE if name in found]
    if not entries:
        return NOTHING
    runs: dict[str, list[Json]] = {}
    for entry in sorted(entries, key=lambda entry: str(entry["utc"])):
        runs.setdefault(place_of(entry), []).append(entry)
    letters = {place: chr(ord("a") + number) for number, place in enumerate(runs)}
    cells = [line(entry, letters[place_of(entry)]) for entry in entries]
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *cells)] + [""]
    for place, of_it in runs.items():
        times = [entry["utc"][:16].replace("T", " ") for entry in of_it]
        lines.append(f"* **{letters[place]}**: {place}; {times[0]} to {times[-1]} UTC")
    lines.append(f"* The first row is `{entries[0]['command']}`; `docs/results/` has the command of each.")
    return "\n".join(lines)


def line(entry: Json, letter: str) -> list[str]:
    """A row's cells; of one that failed the last is what the program said."""
    head = [entry["weight_format"], str(entry["batch_size"]), entry["draft"]]
    if entry["sentence"]:
        return [*head, *["-"] * (len(COLUMNS) - len(head) - 1), f"{letter}: {entry['sentence']}".replace("|", "\\|")]
    m = entry["measured"]
    a_pass, a_token = m["pass_ms"] / 1e3, m["pass_ms"] / m["tokens_a_pass"] / 1e3
    return [
        *head,
        f"{a_token:.4f}" if m["tokens_a_pass"] == 1 else f"{a_token:.4f} [{a_pass:.4f}]",
        f"{m['decode_tok_s']:.4g}",
        f"{m['floor_ms'] / 1e3:.4f}",
        f"{m['ratio']:.3f}",
        shown(m["link_GBps"], 1),
        shown(m["link_idle_pct"], 1),
        f"{m['tokens_a_pass']:.3g}",
        f"{m['link_bytes_a_token'] / 1e9:.3f}",
        f"{m['page_locked_bytes'] / 2**30:.1f}",
        shown(m["gpu_bytes"], 2, 2**30),
        letter,
    ]


def shown(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def place_of(entry: Json) -> str:
    """Machine, versions and code of a row, in a line."""
    if (m := entry["machine"]) is None:
        return f"{entry['target']}, on a machine where no row ran"
    link = f" (PCIe {m['pcie_gen']} x{m['pcie_width']}, driver {m['driver']})" if m["gpu"] else ""
    return (
        f"{entry['target']}; {m['gpu'] or 'no GPU'}{link}; {m['cpu']}, {m['cpu_cores']} cores, "
        f"{m['ram_bytes'] / 2**30:.0f} GiB; torch {m['torch']}, CUDA {m['cuda']}; commit {m['commit']}"
    )


def put_into(page: Path, made: str, begin: str = BEGIN, end: str = END) -> None:
    """Put ``made`` between two comments of ``page``."""
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{made}\n\n{end}{after}", encoding="utf-8")


def main() -> int:
    own, more = sys.argv[1:], list[str]()
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("row", nargs="*", metavar="ROW")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row is started when they are over")
    parser.add_argument("--but", type=Path, metavar="DIR", help="leave out the rows that have a file in DIR")
    parser.add_argument("--commit", help="of the code, where git there does not know it")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "wsm-performance", metavar="DIR")
    parser.add_argument("--target", default="Llama-3.1-70B", help="another shape than the table's")
    parser.add_argument("--draft", default="Llama-3.2-1B")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of DIR's files, and run nothing")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the table between the comments of this page")
    known = parser.parse_intermixed_args(own)
    if known.table is not None:
        made = table(known.table)
        if known.into is not None:
            put_into(known.into, made)
        print(made)
        return 0
    if known.out is None:
        parser.error("OUT, the folder for the results, or --table")
    return run_all(known, more)


if __name__ == "__main__":
    sys.exit(main())
