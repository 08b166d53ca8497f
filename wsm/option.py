"""How a flag or variable is declared: once, as a field; reading, checks and docs/FLAGS.md follow. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from wsm.errors import UnusableInput

_TOO_LARGE = 1 << 63
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Kind(NamedTuple):
    """What a value may be: in words, as a test, and read from text (ValueError or KeyError where it cannot be).

    ``words``: all that are allowed, where they can be listed. ``mend`` ends the sentence that refuses a text, where it
    knows better than the nearest of them.
    """

    says: str
    allows: Callable[[Any], bool]
    read: Callable[[str], Any]
    metavar: str
    words: tuple[str, ...] = ()
    mend: Callable[[str], str] = lambda text: ""

    def parse(self, text: str, say: Callable[[], Exception]) -> Any:
        """The value that ``text`` says; raises what ``say`` makes for one that is not allowed."""
        try:
            if self.allows(value := self.read(text)):
                return value
        except (ValueError, KeyError):
            pass
        raise say()

    def instead_of(self, text: str) -> str:
        """The end of the sentence that refuses ``text``."""
        large = text.isdecimal() and len(text) > 18
        hint = self.mend(text) or meant(text, self.words)
        return f"must be {self.says}{' and below 2^63' if large else ''}, not {text or 'empty'}{hint}"


def meant(text: str, known: Iterable[str], alike: float = 0.6) -> str:
    """The end of a sentence that refuses ``text``: the known word that is most like it, or nothing.

    ``alike``: how much of both has to be the same, 0 to 1.
    """
    asked, spelled = text.strip("'\"").lower(), {word.lower(): word for word in known}
    close = difflib.get_close_matches(asked, spelled, n=max(1, len(spelled)), cutoff=alike)
    if not close:
        return ""

    def apart(word: str) -> tuple[float, int]:
        """First in letters, then in the numbers of both: int3 is nearer to int4 than to int8."""
        numbers = [map(int, re.findall("[0-9]+", each)) for each in (asked, word)]
        unlike = 1 - difflib.SequenceMatcher(None, word, asked).ratio()
        return unlike, sum(abs(one - other) for one, other in zip(*numbers, strict=False))

    return f"; did you mean {spelled[min(close, key=apart)]}?"


def whole(least: int) -> Kind:
    """A whole number of at least ``least``, and below 2^63."""
    return Kind(f"a whole number of at least {least}", lambda n: type(n) is int and least <= n < _TOO_LARGE, int, "N")


def number(least: float, most: float = math.inf, *, above: bool = False, says: str = "", metavar: str = "X") -> Kind:
    """A finite number of at least ``least`` (with ``above``: above it) and at most ``most``."""

    def allows(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        return is_number and least <= value <= most and not (above and value == least)

    words = f"a number {'above' if above else 'of at least'} {least:g}" + (f" and at most {most:g}" * (most < math.inf))
    return Kind(says or words, allows, float, metavar)


def one_of(*words: str) -> Kind:
    """One of the words."""
    return Kind(f"{', '.join(words[:-1])} or {words[-1]}", words.__contains__, str, f"{{{','.join(words)}}}", words)


def _is_a(*types: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, types)


def _filled(text: str) -> str:
    """An empty text is most likely a variable of a shell that is not set; as a path it would be the current folder."""
    if not text:
        raise ValueError(text)
    return text


SWITCH = Kind("0 or 1", _is_a(bool), {"0": False, "1": True}.__getitem__, "")
TRUTH = Kind("True or False", _is_a(bool), lambda text: _TRUTHS[text.lower()], "BOOL")
NAME = Kind("a name", _is_a(str, Path), _filled, "NAME")
TEXT = Kind("a text", _is_a(str, Path), _filled, "TEXT")
"""Which may hold commas, as a NAME does not."""
PATH = Kind("a path", _is_a(str, Path), lambda text: Path(_filled(text)).expanduser(), "FILE")
NAMES = Kind("names with commas between them", all, lambda text: tuple(text.split(",")), "NAME[,NAME]")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """What is declared of a field; ``help`` is for docs/FLAGS.md too, where ``code`` and docs/PAGE.md are marked up.

    ``shown`` is the default in words, where the value does not say it; ``flags`` are other spellings than
    ``--the-name``, and ``alone`` is what the flag means without a value. ``positional``: not a flag, but the arguments
    themselves; ``by_variable``: set by ``WSM_THE_NAME`` and by no flag; ``swept``: whether ``sweep`` takes it as a
    list.
    """

    kind: Kind
    help: str
    group: str = ""
    metavar: str = ""
    shown: str = ""
    flags: tuple[str, ...] = ()
    alone: str = ""
    positional: bool = False
    by_variable: bool = False
    swept: bool = True
    name: str = ""
    default: Any = None

    @property
    def spelled(self) -> str:
        """How the user gives it: the flag, or the variable."""
        return f"WSM_{self.name.upper()}" if self.by_variable else f"--{self.name.replace('_', '-')}"

    @property
    def meaning(self) -> str:
        """What it does, and what it means without a value."""
        return f"{self.help}; without a value `{self.alone}`" if self.alone else self.help

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def default_text(self) -> str:
        """The default as the user would give it; empty where there is none."""
        value = self.default
        if self.shown or value is None or self.required:
            return self.shown
        if isinstance(value, bool):
            return str(int(value)) if self.by_variable else "off"
        return f"{value:g}" if isinstance(value, float) else str(value)

    def check(self, value: Any) -> None:
        """Raises UnusableInput for a value that is not allowed; None is where it is the default."""
        if not (self.kind.allows(value) if value is not None else self.default is None):
            raise UnusableInput(f"{self.spelled} {self.kind.instead_of(repr(value))}")


def negated(flag: str) -> str:
    """What turns a switch off that is on or off by what else is given: its default is None."""
    return f"--no-{flag.removeprefix('--')}"


def option(default: Any, kind: Kind, help: str, **more: Any) -> Any:
    """A dataclass's field; with ``dataclasses.MISSING`` it has to be given. ``more``: the rest of :class:`Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(kind, help, **more)})


def same(cls: type, name: str, default: Any = None, **changes: Any) -> Any:
    """A field declared as ``name`` is in ``cls``, but for ``changes``."""
    found = dataclasses.replace(options_of(cls)[name], **changes)
    return dataclasses.field(default=found.default if default is None else default, metadata={"option": found})


def unused(cls: type, name: str) -> Any:
    """A field that ``cls`` declares and that means nothing here: always its default, and no flag."""
    return dataclasses.field(default=options_of(cls)[name].default, init=False)


def is_default(options: Any, name: str) -> bool:
    """Whether a declared field has the value that it has when it is left out."""
    return bool(getattr(options, name) == options_of(type(options))[name].default)


def options_of(cls: type) -> Mapping[str, Option]:
    """The declarations of a dataclass by name, its bases' first; fields that are no options are left out."""
    return _declared(cls)


@cache
def _declared(cls: type) -> Mapping[str, Option]:
    """Made once, and shared: a planner asks thousands of times."""
    found = {
        field.name: dataclasses.replace(field.metadata["option"], name=field.name, default=field.default)
        for field in dataclasses.fields(cls)
        if "option" in field.metadata
    }
    return MappingProxyType(found)
