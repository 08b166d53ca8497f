"""Typed reading of a checkpoint's JSON: each field of the kind and size that a model can have, or a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from wsm.errors import UnusableInput

MOST_WHOLE = 2**31 - 1
_BEYOND_ANY_MODEL = 1e15  # so products of two fields stay finite


def is_positive(value: object) -> bool:
    """Whether ``value`` is a number above 0 that a model can have; a boolean is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _BEYOND_ANY_MODEL


def whole(value: object, what: str, most: int = MOST_WHOLE) -> int:
    """``value`` if it is a whole number from 1 to ``most``; else UnusableInput that names it ``what``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnusableInput(f"{what} must be a whole number above 0, not {value!r:.60}")
    if value > most:
        raise UnusableInput(f"{what} must be at most {most}: no model has more")
    return value


def number(value: Any, what: str) -> float:
    """``value`` as a float if it is a number above 0; else UnusableInput that names it ``what``."""
    if not is_positive(value):
        raise UnusableInput(f"{what} must be a number above 0, not {value!r:.60}")
    return float(value)


class Fields(NamedTuple):
    """A JSON object of a checkpoint; a field that is absent or null takes its default, if it has one."""

    values: Mapping[str, Any]
    file: str

    def whole(self, field: str, default: int | None = None) -> int:
        return whole(self._value(field, default), f"{self.file}: field {field}")

    def number(self, field: str, default: float | None = None) -> float:
        return number(self._value(field, default), f"{self.file}: field {field}")

    def flag(self, field: str) -> bool:
        """False where it is absent."""
        value = self._value(field, False)
        if not isinstance(value, bool):
            raise UnusableInput(f"{self.file}: field {field} must be true or false, not {value!r:.60}")
        return value

    def part(self, field: str) -> Fields | None:
        """An object inside it; None where it is absent or empty."""
        value = self.values.get(field)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise UnusableInput(f"{self.file}: field {field} must be an object, not {value!r:.60}")
        return Fields(value, f"{self.file} ({field})")

    def _value(self, field: str, default: float | None) -> Any:
        value = self.values.get(field)
        value = default if value is None else value
        if value is None:
            raise UnusableInput(
                f"{self.file}: field {field} is missing; take the file from the original checkpoint again"
            )
        return value
