"""The short form of the campaign of signals: no hang, no traceback, no finished round lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.signals import in_commands, in_programs
from tests.tiny import hf_directory, hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("model"), hf_model())


def wrong(found: Counter[str]) -> list[str]:
    return [what for what in found if what.startswith("WRONG")]


def test_a_signal_at_any_time_ends_a_run_in_order_with_every_finished_round(model: Path) -> None:
    found = in_commands(12, 3, model)
    assert wrong(found) == []
    assert found["with rounds kept"] > 0


def test_keyboard_interrupt_at_any_time_leaves_nothing_that_waits_for_ever(model: Path) -> None:
    found = in_programs(25, 3, model)
    assert wrong(found) == []
    assert found["in use"] > 0
