"""Sums over windows, and what is printed of them."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from bench.result.quality import WindowQuality, as_row, as_text, summed

FACTS = {
    "model": "tiny",
    "weight_format": "int4",
    "reference": "here",
    "text": "t.txt",
    "window_tokens": 11,
    "argv": ["quality"],
}


def test_figures_are_means_over_tokens_and_not_over_windows() -> None:
    found = summed([WindowQuality(10, 20.0, 30.0, 1.0, 10), WindowQuality(30, 60.0, 90.0, 7.0, 15)], **FACTS)
    assert found.predicted_tokens == 40
    assert found.reference_perplexity == pytest.approx(math.exp(2.0))
    assert found.perplexity == pytest.approx(math.exp(3.0))
    assert found.kl.value == pytest.approx(8 / 40)
    assert found.equal_argmax_pct.value == pytest.approx(100 * 25 / 40)


def test_the_standard_error_is_that_of_the_mean_of_equal_windows() -> None:
    kls = [1.0, 3.0, 5.0, 7.0]
    found = summed([WindowQuality(10, 1.0, 1.0, kl, 10) for kl in kls], **FACTS)
    deviation = math.sqrt(sum((kl / 10 - 0.4) ** 2 for kl in kls) / 3)
    assert found.kl.standard_error == pytest.approx(deviation / 2)
    assert found.equal_argmax_pct.standard_error == 0


def test_one_window_has_no_standard_error() -> None:
    found = summed([WindowQuality(10, 1.0, 1.0, 2.0, 10)], **FACTS)
    assert found.kl.standard_error is None
    assert "±" not in as_text(found)


def test_rows_hold_the_same_figures_in_every_form() -> None:
    found = summed([WindowQuality(10, 20.0, 30.0, 1.0, 9), WindowQuality(10, 20.0, 30.0, 2.0, 9)], **FACTS)
    [cells] = csv.DictReader(io.StringIO(as_row(found, "csv")))
    read = json.loads(as_row(found, "json"))
    assert float(cells["kl"]) == read["kl"]["value"] == pytest.approx(0.15)
    assert float(cells["equal_argmax_pct"]) == read["equal_argmax_pct"]["value"] == 90
    assert "| 0.15 " in as_row(found, "md")
