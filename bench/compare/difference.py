"""Where two outputs part, and whether it was a near tie there or an error."""

from __future__ import annotations

from dataclasses import dataclass

from bench.result.types import Output, Result


@dataclass(frozen=True, slots=True)
class Difference:
    """The first new token, of the first row, in which two results differ; of each the base's, then the side's."""

    row: int  # from 0
    token: int  # of the row's new ones, from 1
    position: int  # in the row, prompt included, from 0
    tokens: tuple[int, int]
    margins: tuple[float | None, float | None]
    """How far the token's logit was above the largest other; None where nobody looked."""


def first_difference(base: Result | None, side: Result | None) -> Difference | None:
    """None for equal outputs, where either has kept no tokens, and for other models or lengths of prompts.

    A row that is longer in one of them does not part from the other at its end: it was to be longer.
    """
    if base is None or side is None or base.output.sha256 == side.output.sha256 or _work(base) != _work(side):
        return None
    if not base.output.tokens or not side.output.tokens:
        return None
    rows = zip(base.prompt_lens, base.output.tokens, side.output.tokens, strict=False)
    for row, (prompt_len, ours, theirs) in enumerate(rows):
        for place, found in enumerate(zip(ours, theirs, strict=False)):
            if found[0] != found[1]:
                margins = _margin(base.output, row, place), _margin(side.output, row, place)
                return Difference(row, place + 1, prompt_len + place, found, margins)
    return None


def _work(result: Result) -> tuple[object, ...]:
    """What tokens are of: those of two models, or behind other prompts, are not worth a word."""
    return result.config.resolved["model"], result.provenance.model_digest, result.prompt_lens


def _margin(output: Output, row: int, place: int) -> float | None:
    return output.margins[row][place] if output.margins else None
