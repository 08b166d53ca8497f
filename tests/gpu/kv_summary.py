"""What the results of `tests/gpu/figures.sh OUT kv_kinds kv_drive` come to: python tests/gpu/kv_summary.py OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Result = dict[str, Any]
NAMES = ("kv_topk8", "kv_topk4", "kv_int8", "kv_disk", "kv_drive")


def lines(name: str, result: Result) -> list[str]:
    """A decode pass against its floor, what it moved, and how fast; the ceilings of the same run."""
    phase, ceilings = result["phases"]["decode"], result["ceilings"]
    passes, moved, busy = phase["passes"], phase["bytes_moved"], phase["busy_ms"]
    floor = (phase["floor_ms"] or 0.0) / passes
    p50, mean = result["tpot_ms"]["p50"], phase["wall_ms"] / passes
    found = [
        f"{name}: {p50:.1f} ms p50, {mean:.1f} mean, predicted {(phase['predicted_ms'] or 0.0) / passes:.1f}, "
        f"floor {floor:.1f} ({phase['bound_by']}): "
        f"{100 * floor / p50:.1f} % by p50, {100 * floor / mean:.1f} % by the mean; "
        f"sha {result['output']['sha256'][:8]}"
    ]
    for way in ("weight_h2d", "kv_h2d", "kv_d2h", "kv_read", "kv_write"):
        if moved[way]:
            took = busy["h2d" if way == "weight_h2d" else way]
            rate = f"{moved[way] / took / 1e6:.1f} GB/s while busy" if took else "not timed"
            found.append(f"    {way}: {moved[way] / passes / 1e6:.0f} MB a pass, {rate}")
    link = (
        (moved["weight_h2d"] + moved["kv_h2d"]) / max(1e-9, phase["wall_ms"] - (phase["idle_ms"]["h2d"] or 0.0)) / 1e6
    )
    idle, stalls = phase["idle_ms"], phase["stall_ms"]
    found.append(
        f"    link: {link:.1f} GB/s while it moved anything, idle {(idle['h2d'] or 0) / passes:.2f} ms a pass; "
        f"computing {(busy['compute'] or 0) / passes:.1f} ms, stalled {(stalls['h2d'] or 0) / passes:.1f} by weights, "
        f"{(stalls['kv'] or 0) / passes:.1f} by KV"
    )
    rates = (
        f"{way} {rate['value'] / 1e3:.1f} ({rate['spread_pct']:.0f} %)"
        for way, rate in ceilings.items()
        if rate["unit"] == "MBps"
    )
    found.append(f"    ceilings, GB/s and spread: {', '.join(rates)}")
    return found + [f"    warning: {warning}" for warning in result["warnings"]]


def against_8(four: Result, eight: Result) -> str:
    """The time that 4 blocks save, as a part of what their bytes save at the link's rate of the same run."""
    sides = [(r["tpot_ms"]["p50"], r["phases"]["decode"], r["ceilings"]["h2d"]["value"]) for r in (four, eight)]
    times = [p50 for p50, _, _ in sides]
    moved = [(p["bytes_moved"]["weight_h2d"] + p["bytes_moved"]["kv_h2d"]) / p["passes"] for _, p, _ in sides]
    return (
        f"4 blocks against 8: {times[0] / times[1]:.3f} of the time, {moved[0] / moved[1]:.3f} of the bytes; "
        f"{times[0] / times[1] / (moved[0] / moved[1]):.3f} of one another, 0.95 to 1.05 wanted"
    )


def main(out: Path) -> None:
    found = {name: json.loads(path.read_text()) for name in NAMES if (path := out / f"{name}.json").exists()}
    for name, result in found.items():
        print(*lines(name, result), sep="\n")
    if {"kv_topk4", "kv_topk8"} <= found.keys():
        print(against_8(found["kv_topk4"], found["kv_topk8"]))
    if {"kv_disk", "kv_topk8"} <= found.keys():
        same = found["kv_disk"]["output"]["sha256"] == found["kv_topk8"]["output"]["sha256"]
        print(f"the tokens with --kv-device are {'those' if same else 'NOT those'} of KV in CPU memory")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
