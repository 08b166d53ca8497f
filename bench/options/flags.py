"""The command line: verbs and flags, read from their declarations into frozen options. Imports no torch."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from bench.options.about import models_text, version_text
from bench.options.program import called
from bench.options.run_flags import PlanOptions, RunOptions
from bench.options.verb_flags import LISTED, VERBS, Options, SweepOptions, is_split, sweep_of
from llama.options import BuildOptions
from wsm.errors import UnusableInput
from wsm.option import SWITCH, Kind, Option, meant, negated, options_of
from wsm.settings import read_variables

GROUPS = ("", "model", "paging", "speculation", "work", "output", "another machine")
_PROGRAM = "bench_infer.py"
_HELP_COLUMN = 30


class _Parser(argparse.ArgumentParser):
    """Hands its complaints on as one sentence instead of printing usage and exiting; guesses no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, max_help_position=_HELP_COLUMN)

        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=formatter, **options)

    @property
    def flags(self) -> frozenset[str]:
        return frozenset(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        raise UnusableInput(f"{self._mended(message)} (see {self.prog} --help)")

    def _mended(self, message: str) -> str:
        """What argparse says, with what to give; its words for a value that is not allowed are ours."""
        told = {"/".join(action.option_strings) or str(action.metavar): action for action in self._actions}
        if found := _NO_VALUE.fullmatch(message):
            action = told[found[1]]
            return f"{found[1]} needs a value: {action.option_strings[-1]} {action.metavar}"
        if found := _A_VALUE.fullmatch(message):
            return f"{found[1]} takes no value: leave {found[2]} out"
        if found := _LACKS.fullmatch(message):
            needed = " and ".join(_named(told[name]) for name in found[1].split(", "))
            return f"{self.prog.rpartition(' ')[2]} needs {needed}"
        return message


_NO_VALUE = re.compile(r"argument (\S+): expected (?:at least )?one argument")
_A_VALUE = re.compile(r"argument (\S+): ignored explicit argument (.+)")
_LACKS = re.compile(r"the following arguments are required: (.+)")
"""argparse's own sentences that say what is wrong and not what to give."""


def _named(action: argparse.Action) -> str:
    """A flag or argument with what it is: ``--manifest FILE (where …)``."""
    words = [*action.option_strings[-1:], str(action.metavar)]
    return f"{' '.join(words)} ({(action.help or '').replace('%%', '%')})"


class _Program(_Parser):
    """Whose help has the verbs, then the flags of the default one."""

    of_verb: dict[str, _Parser]

    def format_help(self) -> str:
        flags = self.of_verb["run"].format_help().split("\n\n", 2)[2]  # less usage and --help
        return f"{super().format_help()}\nFlags of run and plan:\n\n{flags}"


class _Answer(argparse.Action):
    """Prints what ``const`` makes, and ends, as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(self.const())
        parser.exit()


class _Given(argparse.Action):
    """Keeps flags and their texts in the order of the command line."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        # The flag itself, for which there may be a short form of one letter.
        namespace.given.append((max(self.option_strings, key=len), "on" if values is None else str(values)))


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
    plain_switch = declared.kind is SWITCH and declared.default is not None
    told = f" ({declared.default_text})" if declared.default_text and not plain_switch else ""
    shown: dict[str, Any] = {"help": declared.meaning.replace("`", "").replace("%", "%%") + told}
    if declared.kind is not SWITCH or listed:
        shown["metavar"] = metavar_of(declared, listed=listed)
    if listed:
        to.add_argument(*names, action=_Given, nargs="?" if declared.kind is SWITCH else None, **shown)
    elif declared.positional:
        to.add_argument(declared.name, type=_reader(declared.kind), nargs="+", **shown)
    elif declared.kind is SWITCH and declared.default is None:
        to.add_argument(*names, action=argparse.BooleanOptionalAction, default=None, **shown)
    elif declared.kind is SWITCH:
        to.add_argument(*names, action="store_true", **shown)
    else:
        if declared.alone:
            shown |= {"nargs": "?", "const": declared.alone}
        to.add_argument(*names, type=_reader(declared.kind), required=declared.required, **shown)


def build_parser() -> _Program:
    """The parser of all verbs; ``run`` is the default one, see :func:`parse`."""
    parser = _Program(
        prog=_PROGRAM,
        usage=f"{_PROGRAM} [VERB] [FLAGS]",
        description="Runs LLaMA models larger than the GPU and tells where the time went.",
    )
    verbs = parser.add_subparsers(
        dest="verb", required=True, parser_class=_Parser, title="verbs, each with --help of its own", metavar="VERB"
    )
    parser.of_verb = {}
    for verb, (cls, text) in VERBS.items():
        declared = options_of(cls)
        usage = f"{_PROGRAM} {verb} {''.join(map(_needed, declared.values()))}[FLAGS]"
        one = parser.of_verb[verb] = verbs.add_parser(verb, prog=f"{_PROGRAM} {verb}", help=text, usage=usage)
        for group, found in in_groups(declared.values()).items():
            to = one.add_argument_group(group) if group and cls is not SweepOptions else one
            for each in found:
                _add(to, each)
        if cls is SweepOptions:
            one.set_defaults(given=[])
            lists = one.add_argument_group("of a run, each a list: A,B,C or the flag several times")
            for each in LISTED.values():
                _add(lists, each, listed=True)
        if cls is RunOptions:
            asked = one.add_argument_group("answered, and nothing else done")
            asked.add_argument(
                "--version", action=_Answer, nargs=0, const=version_text, help="of this program and torch"
            )
            asked.add_argument(
                "--list-models", action=_Answer, nargs=0, const=models_text, help="what --synthetic takes"
            )
    return parser


def _needed(declared: Option) -> str:
    """What has to be given, as the line of usage has it."""
    if not declared.required:
        return ""
    return f"{metavar_of(declared)} ... " if declared.positional else f"{declared.spelled} {metavar_of(declared)} "


def parse(argv: Sequence[str], environ: Mapping[str, str] = MappingProxyType({})) -> tuple[str, Options]:
    """The verb (``run`` if the first argument is none) and its options; a flag beats its variable in ``environ``.

    Raises UnusableInput for an argument or a variable that cannot be used, in one sentence.
    """
    if not argv or (argv[0][:1] == "-" and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    parser = build_parser()
    _check_known(argv, parser.of_verb)
    found, left = parser.parse_known_args(list(argv))
    if left:
        parser.of_verb[found.verb].error(_left_over(argv, left, found.verb))
    values: dict[str, Any] = vars(found)
    verb = str(values.pop("verb"))
    if verb == "sweep":
        values["sweep"] = sweep_of(values.pop("given"))
    cls = VERBS[verb][0]
    if issubclass(cls, BuildOptions):
        values = {**read_variables(environ), **values}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    options: Options = cls(**values)
    if isinstance(options, BuildOptions):
        options.check_together()
    return verb, options


def _check_known(argv: Sequence[str], of_verb: Mapping[str, _Parser]) -> None:
    """Raises UnusableInput, with what was most likely meant, for a verb or a flag that there is not."""
    verb, *words = argv
    if verb[:1] == "-":  # --help alone
        return
    if verb not in of_verb:
        hint = _of_a_file(argv) or meant(verb, of_verb)
        raise UnusableInput(f"there is no verb {verb}{hint} (see {_PROGRAM} --help)")
    known = of_verb[verb].flags
    for word in words:
        if word == "--":
            return
        # As argparse does: what has a space in it, or is a negative number, is a value.
        if word[:1] != "-" or word == "-" or " " in word or word[1] in ".0123456789":
            continue
        flag = word.partition("=")[0] if word[:2] == "--" else word[:2]
        if flag not in known:
            others = [other for other, parser in of_verb.items() if flag in parser.flags]
            hint = f", but of {' and '.join(others)}" if others else meant(flag, known)
            raise UnusableInput(f"{flag} is no flag of {verb}{hint} (see {_PROGRAM} {verb} --help)")


def _of_a_file(argv: Sequence[str]) -> str:
    """What most likely was meant by a command that begins with a file."""
    for endings, words in (((".json", ".jsonl"), ["compare"]), ((".gguf",), ["--checkpoints"])):
        if argv[0].endswith(endings):
            return f"; did you mean {shlex.join([*called(), *words, *argv])}"
    return ""


def _left_over(argv: Sequence[str], left: Sequence[str], verb: str) -> str:
    """The sentence for words that belong to nothing."""
    words = " ".join(left)
    if listed := [declared for declared in options_of(VERBS[verb][0]).values() if declared.positional]:
        return f"{words}: {verb} takes every {metavar_of(listed[0])} in one place, before the flags or behind them"
    if verb == "run" and (late := [word for word in left if word in VERBS]):
        flags = list(argv[1:])
        flags.remove(late[0])
        return f"{late[0]} is a verb and comes first: {shlex.join([*called(), late[0], *flags])}"
    return f"{verb} takes no argument {words}{_unquoted(argv, left) or ', only flags and their values'}"


def _unquoted(argv: Sequence[str], left: Sequence[str]) -> str:
    """What to type where the words that are left follow a flag and its value: a shell cuts a name at its blanks."""
    at = argv.index(left[0]) if left[0] in argv else 0
    flag, value = argv[at - 2 : at] if at >= 2 else ("", "")
    if flag[:1] != "-" or value[:1] == "-" or list(argv[at : at + len(left)]) != list(left):
        return ""
    return f"; put a name or text with blanks in quotes: {flag} {shlex.quote(' '.join([value, *left]))}"


def swept_flags(argv: Sequence[str] | None = None) -> list[str]:
    """The names of all settings that a sweep may vary, or of those that these arguments give."""
    given = None if argv is None else {word.partition("=")[0] if word[:2] == "--" else word[:2] for word in argv}
    return [each.name for flag, each in LISTED.items() if given is None or given & {flag, negated(flag), *each.flags}]


def check_point(argv: Sequence[str]) -> None:
    """Raises UnusableInput, naming the flag, where a run does not take these arguments or find what they name."""
    _, options = parse(["run", *argv])
    assert isinstance(options, RunOptions)
    for name in ("checkpoints", "prompts", "manifest"):
        named = getattr(options, name)
        if named is not None and not named.exists():
            raise UnusableInput(f"--{name} {named} does not exist: nothing was run")


_OF_PLAN_ALONE = {
    each.spelled for name, each in options_of(PlanOptions).items() if each != options_of(RunOptions).get(name)
}


def kept_command(argv: Sequence[str], chosen: Sequence[str]) -> str:
    """``argv`` with, in place of ``--auto``, what it has chosen (``--flag value`` each): to keep and to share."""
    flags = [text.split(" ", 1) for text in chosen]
    replaced = {flag for flag, _ in flags}
    if argv[:1] == ["plan"]:
        replaced |= _OF_PLAN_ALONE
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
    return shlex.join([*called(), *kept, *(word for pair in flags for word in pair)])
