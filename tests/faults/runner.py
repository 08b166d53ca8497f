"""Runs faults and judges what came of them."""

from __future__ import annotations

import json
import random
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
"""A command that takes longer hangs: one takes some tenths of a second, the first some ten seconds more."""
LONGEST = 1000
"""Characters of a sentence: what a file holds is quoted in it only so far."""
DOCUMENTED = (0, 2, 3, 4)


@dataclass(frozen=True)
class Ran:
    """What a command did; ``code`` is None where it raised, or was killed since it went on for too long."""

    code: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Step:
    """A command, and what is wrong with what it did besides what is wrong with any; None if nothing is."""

    argv: Sequence[str]
    check: Callable[[Ran], str | None] = lambda ran: None
    sentences: bool = False
    """Whether there may be several of them, as ``verify`` has one a group."""
    codes: Sequence[int] = DOCUMENTED
    streams: Sequence[str] = ()
    """What standard input, output and error are, where the command has a process of its own: "open", or how broken."""


@dataclass(frozen=True)
class Fault:
    """``what`` was done to the files, and the commands that meet it."""

    what: str
    steps: Sequence[Step]


class Family(Protocol):
    """Makes one sort of faults; its undamaged files are made once."""

    def fault(self, rng: random.Random, place: Path) -> Fault:
        """A fault drawn by ``rng``, its files in the empty directory ``place``."""


class Worker:
    """The process of worker.py; killed and started anew when a command hangs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, argv: Sequence[str], streams: Sequence[str] = ()) -> Ran:
        if self._process is None:
            command = [sys.executable, "-m", "tests.faults.worker"]
            self._process = subprocess.Popen(
                command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps([list(argv), list(streams)]) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], LIMIT_S)[0]:
            self.close()
            return Ran(None, "", "hang")
        if answer := process.stdout.readline():
            return Ran(*json.loads(answer))
        code = process.wait()
        said = process.stderr.read()[-2000:]
        self._process = None
        return Ran(code, "", said)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def judged(step: Step, ran: Ran) -> str | None:
    """What is wrong, in a word or two; None if all is right."""
    said = [line for line in ran.err.splitlines() if line.strip()]
    if ran.err == "hang":
        return "hang"
    if "Traceback" in ran.err + ran.out:
        return "traceback"
    if ran.code not in step.codes:
        return f"exit {ran.code}"
    hears = not step.streams or step.streams[2] == "open"
    if ran.code != 0 and hears and (not said or (len(said) != 1 and not step.sentences)):
        return f"{len(said)} sentences"
    if any(len(line) > LONGEST for line in said):
        return "a long sentence"
    return step.check(ran)


@dataclass
class Report:
    """What came of a campaign: outcomes by family, and each finding with what repeats it."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A row a family, in Markdown."""
        columns = [*(f"exit {code}" for code in sorted({*DOCUMENTED, 1})), "findings"]
        rows = [["faults in", "faults", *columns], ["---"] * (len(columns) + 2)]
        for name, counts in [*self.outcomes.items(), ("all", sum(self.outcomes.values(), Counter()))]:
            rows.append([name, str(sum(counts.values())), *(str(counts[column]) for column in columns)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_campaign(families: Mapping[str, Family], faults: int, seed: int, place: Path, *, first: int = 0) -> Report:
    """``faults`` of the families in turn, each drawn by its own seed, so that one alone can be repeated."""
    report, worker = Report({name: Counter() for name in families}), Worker()
    names, told = list(families), 0
    try:
        for number in range(first, first + faults):
            name = names[number % len(names)]
            own = place / f"fault-{number}"
            own.mkdir()
            fault = families[name].fault(random.Random(f"{seed} {number}"), own)
            outcome = _outcome(worker, fault, f"{name} {number} (seed {seed}): {fault.what}", report.findings)
            report.outcomes[name][outcome] += 1
            shutil.rmtree(own)
            if number % 100 == 99:
                print(f"{number + 1 - first} of {faults}: {len(report.findings)} findings", file=sys.stderr)
            for finding in report.findings[told:]:
                print(finding, file=sys.stderr)
            told = len(report.findings)
    except KeyboardInterrupt:
        print("broken off", file=sys.stderr)
    finally:
        worker.close()
    return report


def _outcome(worker: Worker, fault: Fault, named: str, findings: list[str]) -> str:
    outcome = ""
    for step in fault.steps:
        ran = worker.run(step.argv, step.streams)
        if wrong := judged(step, ran):
            findings.append(f"{named}\n  {wrong}: {' '.join(step.argv)}\n  {ran.err.strip()[-1500:]}")
            return "findings"
        outcome = outcome or f"exit {ran.code}"
    return outcome
