"""What a weight format costs: the distance of a model from its reference, window by window; imports no torch."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
from tabulate import tabulate

from bench.result.fields import Part
from bench.result.results import significant
from wsm.words import counted


class WindowQuality(Part, frozen=True):
    """One window of text, teacher-forced: sums over its predicted tokens, in nats where they are of probabilities."""

    tokens: int
    reference_nll: float
    nll: float
    kl: float
    equal_argmax: int


class Spread(Part, frozen=True):
    """A figure, and its standard error over the windows (None for one window)."""

    value: float
    standard_error: float | None


class Quality(Part, frozen=True, kw_only=True):
    """The whole text. ``kl`` is the mean of KL(reference || model) in nats; perplexities are e^(mean nll)."""

    model: str
    weight_format: str
    reference: str
    text: str
    windows: int
    window_tokens: int
    predicted_tokens: int
    reference_perplexity: float
    perplexity: float
    kl: Spread
    equal_argmax_pct: Spread
    argv: list[str]


def _over_windows(totals: Sequence[float], tokens: Sequence[int]) -> Spread:
    """The mean per token, and the standard error of that ratio over windows (Cochran 1977, section 2.11)."""
    mean = math.fsum(totals) / sum(tokens)
    if len(tokens) < 2:
        return Spread(mean, None)
    rest = [total - mean * count for total, count in zip(totals, tokens, strict=True)]
    error = statistics.stdev(rest, xbar=0.0) / math.sqrt(len(rest)) / statistics.fmean(tokens)
    return Spread(mean, error)


def summed(windows: Sequence[WindowQuality], **facts: Any) -> Quality:
    """All windows together; ``facts`` are the fields that say what was compared."""
    tokens = [window.tokens for window in windows]
    nll, kl = (_over_windows([getattr(window, name) for window in windows], tokens) for name in ("nll", "kl"))
    equal = _over_windows([100.0 * window.equal_argmax for window in windows], tokens)
    reference = _over_windows([window.reference_nll for window in windows], tokens)
    return Quality(
        windows=len(windows),
        predicted_tokens=sum(tokens),
        reference_perplexity=math.exp(reference.value),
        perplexity=math.exp(nll.value),
        kl=kl,
        equal_argmax_pct=equal,
        **facts,
    )


def _cells(found: Quality) -> dict[str, Any]:
    return {
        "model": found.model,
        "weight_format": found.weight_format,
        "reference": found.reference,
        "tokens": found.predicted_tokens,
        "reference_perplexity": significant(found.reference_perplexity),
        "perplexity": significant(found.perplexity),
        "kl": significant(found.kl.value),
        "kl_standard_error": significant(found.kl.standard_error),
        "equal_argmax_pct": significant(found.equal_argmax_pct.value),
    }


def as_json(found: Quality) -> str:
    """On one line."""
    return json.dumps(significant(msgspec.to_builtins(found)))


def as_row(found: Quality, output: str) -> str:
    """``md``, ``csv`` (both with a header line) or ``json``."""
    if output == "json":
        return as_json(found)
    cells = _cells(found)
    if output == "md":
        shown = ["-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else cell for cell in cells.values()]
        return str(tabulate([shown], list(cells), "github", disable_numparse=True))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cells, cells.values()])
    return text.getvalue().rstrip("\n")


def as_text(found: Quality) -> str:
    """For people: what was compared, then what it costs."""

    def beside(spread: Spread, unit: str = "") -> str:
        error = "" if spread.standard_error is None else f" ± {spread.standard_error:.2g} (standard error)"
        return f"{spread.value:.4g}{unit}{error}"

    lines = {
        "model": f"{found.model}, {found.weight_format} against {found.reference}",
        "text": f"{found.text}: {counted(found.predicted_tokens, 'token')} in {counted(found.windows, 'window')} of "
        f"{found.window_tokens}",
        "perplexity": f"{found.perplexity:.4f}, of the reference {found.reference_perplexity:.4f}",
        "KL divergence": beside(found.kl, " nats a token"),
        "equal first choice": beside(found.equal_argmax_pct, " %"),
    }
    return "\n".join(["", "=== Quality ===", *(f"{name:>20}: {line}" for name, line in lines.items())])
