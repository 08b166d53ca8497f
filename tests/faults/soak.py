"""Does memory grow? The built-in model in ``mixed``, round after round, and the process's memory every few seconds.

    python tests/faults/soak.py --minutes 60

Prints memory after the first minute, at the end, the most, and the slope; exit 1 where the most is over 50 MB above
what the first minute had taken, or where the run fails. Arguments behind ``--`` go to the run.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MOST_GROWTH_MB = 50.0
LOOK_S, SETTLED_S, END_S = 5.0, 60.0, 60.0
ENDLESS = 10**9


def anonymous_MB(pid: int) -> float:
    """Memory of a process without mapped files, which the page cache lends."""
    found = psutil.Process(pid).memory_info()
    return float(found.rss - found.shared) / 1e6


def soak(minutes: float, more: Sequence[str], folder: Path) -> tuple[int, list[tuple[float, float]]]:
    """The run's exit code, and its memory (MB) by the seconds since its start."""
    run = [sys.executable, str(ROOT / "bench_infer.py"), "--device", "cpu", "--prompt-len", "32", "--ignore-eos"]
    run += ["--temperature", "0", "--repeats", str(ENDLESS), "--out-json", str(folder / "soak.json"), *more]
    looks = []
    with (folder / "out").open("w") as out, subprocess.Popen(run, stdout=out, stderr=out) as process:
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < 60 * minutes:
            time.sleep(LOOK_S)
            try:
                looks.append((time.monotonic() - began, anonymous_MB(process.pid)))
            except psutil.Error:
                break
        process.send_signal(signal.SIGTERM)  # which no shell lets its background jobs ignore, as SIGINT
        try:
            code = process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    print((folder / "out").read_text()[-2000:])
    return code, looks


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Follows the memory of a long run of the built-in model.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("more", nargs="*", help="arguments of the run, behind --")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        code, looks = soak(options.minutes, options.more, Path(folder))
    settled = [(at, mb) for at, mb in looks if at >= SETTLED_S]
    if len(settled) < 2:
        print(f"soak: it ended with exit {code} before it had settled, after {looks[-1][0] if looks else 0:.0f} s")
        return 1
    first, last, most = settled[0][1], settled[-1][1], max(mb for _, mb in settled)
    slope = statistics.linear_regression([at / 3600 for at, _ in settled], [mb for _, mb in settled]).slope
    print(
        f"soak: {settled[-1][0] / 60:.1f} min, exit {code}; after the first minute {first:.1f} MB, at the end "
        f"{last:.1f} MB, most {most:.1f} MB ({most - first:+.1f} MB), slope {slope:+.1f} MB an hour"
    )
    ended_as_asked = code == 143  # finished rounds are saved
    return 0 if ended_as_asked and most - first <= MOST_GROWTH_MB else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
