"""The command line: verbs and flags, read from their declarations into frozen options. Imports no torch."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from bench.options.run_flags import RunOptions
from bench.options.verb_flags import LISTED, VERBS, Options, SweepOptions, is_split, sweep_of
from wsm.errors import UnusableInput
from wsm.option import SWITCH, Kind, Option, options_of
from wsm.settings import read_variables

GROUPS = ("", "model", "paging", "work", "output")


class _Parser(argparse.ArgumentParser):
    """Hands its complaints on as one sentence instead of printing usage and exiting; guesses no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        raise UnusableInput(f"{message} (see {self.prog} --help)")


class _Given(argparse.Action):
    """Keeps flags and their texts in the order of the command line."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        namespace.given.append((self.option_strings[0], "on" if values is None else str(values)))


def _reader(kind: Kind) -> Callable[[str], Any]:
    return lambda text: kind.parse(text, lambda: argparse.ArgumentTypeError(kind.instead_of(text)))


def in_groups(declared: Collection[Option]) -> dict[str, list[Option]]:
    """The flags of each group that has any; what only a variable sets is left out."""
    groups = {group: [each for each in declared if each.group == group and not each.by_variable] for group in GROUPS}
    return {group: found for group, found in groups.items() if found}


def metavar_of(declared: Option, *, listed: bool = False) -> str:
    """What stands for the value; empty for a switch."""
    if declared.kind is SWITCH:
        return "on,off" if listed else ""
    one = declared.metavar or declared.kind.metavar
    return f"{one.strip('{}').replace(',', '|') if '{' in one else one}[,…]" if listed and is_split(declared) else one


def _add(to: argparse._ActionsContainer, declared: Option, *, listed: bool = False) -> None:
    names = sorted([declared.spelled, *declared.flags], key=len)
    told = f" ({declared.default_text})" if declared.default_text and declared.kind is not SWITCH else ""
    shown: dict[str, Any] = {"help": declared.help.replace("`", "").replace("%", "%%") + told}
    if declared.kind is not SWITCH or listed:
        shown["metavar"] = metavar_of(declared, listed=listed)
    if listed:
        to.add_argument(*names, action=_Given, nargs="?" if declared.kind is SWITCH else None, **shown)
    elif declared.positional:
        to.add_argument(declared.name, type=_reader(declared.kind), nargs="+", **shown)
    elif declared.kind is SWITCH:
        to.add_argument(*names, action="store_true", **shown)
    else:
        if declared.alone:
            shown |= {"nargs": "?", "const": declared.alone}
        to.add_argument(*names, type=_reader(declared.kind), required=declared.required, **shown)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; ``run`` is the default one, see :func:`parse`."""
    parser = _Parser(
        prog="bench_infer.py", description="Runs LLaMA models larger than the GPU and tells where the time went."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    for verb, (cls, text) in VERBS.items():
        one = verbs.add_parser(verb, help=text)
        for group, found in in_groups(options_of(cls).values()).items():
            to = one.add_argument_group(group) if group and cls is not SweepOptions else one
            for declared in found:
                _add(to, declared)
        if cls is SweepOptions:
            one.set_defaults(given=[])
            lists = one.add_argument_group("of a run, each a list: A,B,C or the flag several times")
            for declared in LISTED.values():
                _add(lists, declared, listed=True)
    return parser


def parse(argv: Sequence[str], environ: Mapping[str, str] = MappingProxyType({})) -> tuple[str, Options]:
    """The verb (``run`` if the first argument is none) and its options; a flag beats its variable in ``environ``.

    Raises UnusableInput for an argument or a variable that cannot be used, in one sentence.
    """
    if not argv or (argv[0] not in VERBS and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    values: dict[str, Any] = vars(build_parser().parse_args(list(argv)))
    verb = str(values.pop("verb"))
    if verb == "sweep":
        values["sweep"] = sweep_of(values.pop("given"))
    cls = VERBS[verb][0]
    if cls is RunOptions:
        values = {**read_variables(environ), **values}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    options: Options = cls(**values)
    if isinstance(options, RunOptions):
        options.check_together()
    return verb, options


def check_point(argv: Sequence[str]) -> None:
    """Raises UnusableInput, naming the flag, where a run does not take these arguments or find what they name."""
    _, options = parse(["run", *argv])
    assert isinstance(options, RunOptions)
    for name in ("checkpoints", "prompts", "manifest"):
        named = getattr(options, name)
        if named is not None and not named.exists():
            raise UnusableInput(f"--{name} {named} does not exist: nothing was run")


def kept_command(argv: Sequence[str], chosen: Sequence[str]) -> str:
    """``argv`` with, in place of ``--auto``, what it has chosen (``--flag value`` each): to keep and to share."""
    flags = [text.split(" ", 1) for text in chosen]
    replaced = {flag for flag, _ in flags}
    words = list(argv[1:] if argv and argv[0] in VERBS else argv)
    kept: list[str] = []
    while words:
        word = words.pop(0)
        name, has_value, _ = word.partition("=")
        if name in replaced:
            if not has_value:
                words.pop(0)
        elif word != "--auto":
            kept.append(word)
    return shlex.join(["python", "bench_infer.py", *kept, *(word for pair in flags for word in pair)])
