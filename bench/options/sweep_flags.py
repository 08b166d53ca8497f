"""The command line of ``sweep``: every flag of a run takes a list.

A comma stands between the values of a list, or the flag is given several times. Flags whose own value may hold a comma
(a text, a path, the devices of a striped store) are never split: for those, give the flag several times.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.options.types import path, whole
from bench.result.sweep_folder import Point, Sweep
from wsm.errors import UnusableInput

UNSPLIT = ("--raw-device", "--prompt", "--checkpoints", "--prompts", "--manifest", "--cache-dir", "--kv-device")
_OWN = ("--help", "--out-json", "--trace", "--output", "--repeats", "--verbose", "--tp")
"""Flags of a run that a sweep sets itself, has in a sense of its own, or (--tp: torchrun's) cannot use."""


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What is swept, how often, and where it goes.

    Attributes:
        repeats: processes a point. inner_repeats: timed rounds in each.
    """

    sweep: Sweep
    repeats: int
    inner_repeats: int
    out_dir: Path
    retry_failed: bool
    verbose: bool


class _Given(argparse.Action):
    """Keeps flags and their texts in the order of the command line, which decides the order of the points."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        namespace.given.append((_long_name(self), "on" if values is None else str(values)))


def _long_name(action: argparse.Action) -> str:
    return next(name for name in action.option_strings if name.startswith("--"))


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


def add_sweep(parser: argparse.ArgumentParser, run: argparse.ArgumentParser) -> None:
    """The flags of a run, as lists, and the sweep's own."""
    parser.set_defaults(given=[], switches=frozenset(_long_name(a) for a in run._actions if _is_switch(a)))
    parser.add_argument("--repeats", type=whole(1), default=1, metavar="N", help="processes a point, interleaved (1)")
    parser.add_argument("--inner-repeats", type=whole(1), default=1, metavar="N", help="timed rounds in each (1)")
    parser.add_argument("--out-dir", type=path, default=Path("sweep"), metavar="DIR", help="a new or the same (sweep)")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    parser.add_argument("--verbose", action="store_true", help="give tracebacks")
    lists = parser.add_argument_group("of a run, each a list: A,B,C or the flag several times")
    for action in run._actions:
        if not action.option_strings or _long_name(action) in _OWN:
            continue
        switch = _is_switch(action)
        shown = {"metavar": "on,off", "nargs": "?"} if switch else {"metavar": _listed(action)}
        lists.add_argument(*action.option_strings, action=_Given, default=argparse.SUPPRESS, help=action.help, **shown)  # type: ignore[arg-type]


def _listed(action: argparse.Action) -> str:
    one = action.metavar if isinstance(action.metavar, str) else "VALUE"
    if action.choices is not None:
        one = "|".join(map(str, action.choices))
    return one if _long_name(action) in UNSPLIT else f"{one}[,…]"


def sweep_options(values: dict[str, Any]) -> SweepOptions:
    """What the parser found.

    Raises:
        UnusableInput: for an empty or repeated value.
    """
    switches, texts = values.pop("switches"), dict[str, list[str]]()
    for flag, text in values.pop("given"):
        texts.setdefault(flag, []).extend([text] if flag in UNSPLIT else text.split(","))
    for flag, found in texts.items():
        _check_list(flag, found, is_switch=flag in switches)
    axes = {flag: tuple(found) for flag, found in texts.items() if len(found) > 1}
    fixed = [word for flag, found in texts.items() if len(found) == 1 for word in _typed(flag, found[0], switches)]
    points = []
    for number, chosen in enumerate(itertools.product(*axes.values()), 1):
        named = dict(zip(axes, chosen, strict=True))
        argv = [*fixed, *(word for flag, value in named.items() for word in _typed(flag, value, switches))]
        points.append(Point(number, named, tuple(argv)))
    return SweepOptions(sweep=Sweep(axes, tuple(fixed), tuple(points)), **values)


def _check_list(flag: str, values: Sequence[str], *, is_switch: bool) -> None:
    # An empty text is a prompt like another; elsewhere it is a comma too many.
    if flag not in UNSPLIT and not all(values):
        raise UnusableInput(f"{flag} {','.join(values)} has an empty value: a comma too many?")
    if len(set(values)) < len(values):
        raise UnusableInput(f"{flag} {','.join(values)} names a value twice: for several runs of a point use --repeats")
    if is_switch and not set(values) <= {"on", "off"}:
        raise UnusableInput(f"{flag} {','.join(values)} cannot be used: in a sweep a switch is on, off, or on,off")


def _typed(flag: str, value: str, switches: frozenset[str]) -> list[str]:
    """A flag with its value, as one types it for a run."""
    if flag in switches:
        return [flag] if value == "on" else []
    return [f"{flag}={value}"]
