"""This project's rows: ``bench_infer.py`` on the shapes that the others get."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.peers.rows import Work, attempt

ROOT = Path(__file__).resolve().parents[2]
NAME = "this project"
STREAM = ("--mode", "stream", "--max-new-tokens", "12")


def run(work: Work, out: Path, cache: Path, name: str, *flags: str) -> dict[str, Any]:
    """The result of one run, kept as ``OUT/ours_NAME.json``."""
    command = [
        sys.executable,
        str(ROOT / "bench_infer.py"),
        "--prompt-len",
        str(work.prompt),
        "--temperature",
        "0",
        *flags,
    ]
    command += ["--device", work.device, "--cache-dir", str(cache), "--no-probe", "--quiet"]
    if work.device != "cpu":
        command += ["--gpu-mem-gb", str(work.gpu_GiB)]
    path = out / f"ours_{name}.json"
    done = subprocess.run([*command, "--out-json", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
    return dict(json.loads(path.read_text()))


def measure(
    work: Work,
    out: Path,
    scene: str,
    form: str,
    batch: int,
    *flags: str,
    moved: str = "weight_h2d",
    cache: Path | None = None,
) -> None:
    name = "".join(c if c.isalnum() else "_" for c in f"{scene}_{form}_b{batch}")
    with attempt(NAME, scene, form, batch, " ".join(flags)) as row:
        result = run(work, out, cache or out / "cache", name, *flags, "--batch-size", str(batch))
        row.version = str(result["provenance"]["git_commit"])[:7]
        row.s_a_pass = result["tpot_ms"]["p50"] / 1e3
        row.passes = result["tpot_ms"]["n"]
        row.moved_bytes = result["plan"]["bytes_per_pass"][moved]


def synthetic(work: Work, layers: int) -> list[str]:
    return ["--synthetic", f"{work.name}:layers={layers}"]


def bf16(work: Work, out: Path) -> None:
    plain = [*STREAM, "--dtype", "bfloat16", "--gpu-cached-layers"]
    for batch in (1, 32):
        measure(work, out, work.bare, "bf16", batch, *synthetic(work, work.few), *plain, "0")
    fitted = [str(work.held_bf16), "--group-prefetch-depth", "2", "--embedding", "cpu"]
    measure(work, out, work.partly, "bf16", 1, *synthetic(work, work.many), *plain, *fitted)


def four_bits(work: Work, out: Path) -> None:
    many = synthetic(work, work.many)
    for form in ("q4_0", "int4"):
        flags = [*STREAM, "--weight-format", form, "--gpu-cached-layers", str(work.held_4bit)]
        for batch in (1, 8, 24):
            measure(work, out, work.half, form, batch, *many, *flags)
    flags = [*STREAM, "--weight-format", "int4", "--gpu-cached-layers", str(work.most_4bit), "--embedding", "cpu"]
    for batch in (1, 8, 24):
        measure(work, out, work.most, "int4", batch, *many, *flags)
    flags = ["--mode", "full", "--max-new-tokens", "32", "--weight-format", "int4"]
    for batch in (1, 8):
        measure(work, out, work.whole, "int4", batch, *many, *flags)


def drive(work: Work, out: Path, folder: Path) -> None:
    """From the machine's drive, the packed store in ``folder``."""
    flags = ["--mode", "mixed", "--dtype", "bfloat16", "--gpu-cached-layers", "0", "--cpu-cache-layers", "2"]
    flags += ["--prefetch-distance", "2", "--max-new-tokens", "4", "--warmup-rounds", "0"]
    measure(work, out, work.drive, "bf16", 1, *synthetic(work, work.few), *flags, moved="ssd_read", cache=folder)
