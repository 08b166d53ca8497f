"""``python -m tests.faults --faults 2000 --seed 1``: a campaign; exit code 1 if it finds anything."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.families import FAMILIES
from tests.faults.runner import run_campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--faults", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault: with --faults 1 that alone")
    parser.add_argument("--only", choices=sorted(FAMILIES), action="append", help="families; all of them without")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        families = {}
        for family, make in FAMILIES.items():
            if not options.only or family in options.only:
                (home := Path(name) / family).mkdir()
                families[family] = make(home)
        report = run_campaign(families, options.faults, options.seed, Path(name), first=options.first)
    print(report.table())
    print(f"\n{options.faults} faults, seed {options.seed}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
