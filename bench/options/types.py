"""What a flag's value may be; each raises what argparse turns into a sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def read(text: str) -> int:
        value = int(text)
        if not least <= value < 1 << 63:
            raise argparse.ArgumentTypeError(f"must be {least} or more, and below 2^63, not {value}")
        return value

    read.__name__ = "whole number"
    return read


def number(above: float, most: float = float("inf"), *, or_equal: bool = False) -> Callable[[str], float]:
    """A finite number above ``above`` (or equal to it), at most ``most``."""

    def read(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or not (above < value <= most or (or_equal and value == above)):
            bounds = f"{'at least' if or_equal else 'above'} {above:g}" + (
                f" and at most {most:g}" if most < 1e308 else ""
            )
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    read.__name__ = "number"
    return read


def boolean(text: str) -> bool:
    """True or False, as people write them."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be True or False, not {text}")
    return values[text.lower()]


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    found = tuple(text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, not {text!r}")
    return found


def topk(text: str) -> int:
    """KV blocks: 0 for all, or at least 2."""
    value = int(text)
    if value < 0 or value == 1:
        raise argparse.ArgumentTypeError(f"must be 0 (all blocks) or at least 2, not {value}")
    return value


def path(text: str) -> Path:
    """A path, ``~`` expanded."""
    return Path(text).expanduser()
