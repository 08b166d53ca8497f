"""What the results of tests/gpu/parallel.sh prove, a line each: python tests/gpu/parallel_summary.py OUTDIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def read(out: Path, name: str) -> Result | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def decode_line(name: str, result: Result) -> str:
    """The pass, the floor over all links, and the share of collectives."""
    phase, parallel = result["phases"]["decode"], result["parallel"]
    line = f"{name}: p50 {result['tpot_ms']['p50']:.2f} ms a token, {result['decode_tok_s']:.4g} tok/s"
    if phase["floor_ms"]:
        ratio = phase["wall_ms"] / phase["floor_ms"]
        line += f", {ratio:.3f} x the floor ({phase['bound_by']})"
    if parallel is not None:
        job = parallel["phases"]["decode"]
        if job["collectives_ms"] is not None:
            line += f", collectives {job['collectives_ms']:.1f} ms = {job['collectives_pct']:.1f} % of the phase"
        links = [rank["ceilings_MBps"].get("h2d") for rank in parallel["ranks"]]
        line += f", links at once {[round(link / 1e3, 1) for link in links if link]} GB/s"
    return line


def scaling_line(name: str, one: Result, two: Result) -> str:
    """Tokens a second against 0.95 x (both links at once / one alone) x one GPU's."""
    at_once = sum(rank["ceilings_MBps"]["h2d"] for rank in two["parallel"]["ranks"])
    alone = one["ceilings"]["h2d"]["value"]
    wanted = 0.95 * at_once / alone * one["decode_tok_s"]
    rate, fraction = two["decode_tok_s"], two["decode_tok_s"] / wanted
    return f"{name}: {rate:.4g} tok/s, at least {wanted:.4g} wanted ({at_once / alone:.3f} links): {fraction:.3f} of it"


def main(out: Path) -> None:
    names = ("one", "two", "two_layers", "full1", "full2", "all80", "int4_80", "exact_80")
    found = {name: result for name in names if (result := read(out, name)) is not None}
    for name, result in found.items():
        print(decode_line(name, result))
        print(*(f"    warning: {warning}" for warning in result["warnings"]), sep="\n")
    for name in ("two", "two_layers"):
        if "one" in found and name in found:
            print(scaling_line(name, found["one"], found[name]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
