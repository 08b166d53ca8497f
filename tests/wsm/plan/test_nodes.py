"""Several nodes a row in the plan: room for their KV, all of it on the device, or one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plans import ROOMY, inputs_for
from wsm.errors import DoesNotFit
from wsm.plan.advice import check_fits
from wsm.plan.hardware import GIB
from wsm.plan.inputs import RunShape
from wsm.plan.plan import make_plan
from wsm.settings import Settings


def test_a_row_has_room_for_the_nodes_behind_its_last_token() -> None:
    inputs = inputs_for(shape=RunShape(1, 224, 32, 224))
    assert inputs.kv_tokens == 256
    assert replace(inputs, verify_rows=2).kv_tokens == 512
    rows = {nodes: replace(inputs, verify_rows=nodes).nodes for nodes in (1, 2, 24, 25)}
    assert rows == {1: 1, 2: 8, 24: 24, 25: 32}, "those that fill up a multiple are computed, and take memory, too"
    one, many = (make_plan(replace(inputs, verify_rows=nodes)).gpu_bytes for nodes in (1, 64))
    assert many - one > 63 * inputs.config.vocab_size * 4, "logits of every node"


def test_kv_below_the_device_is_what_several_nodes_do_not_fit_with() -> None:
    tight = replace(ROOMY, gpu_total_bytes=24 * GIB, gpu_available_bytes=24 * GIB)
    settings = Settings(mode="stream", gpu_cached_layers=4)
    inputs = inputs_for(settings=settings, shape=RunShape(8, 8000, 100, 64000), hardware=tight, kv_device="/kv")
    below = make_plan(inputs)
    assert below.fits
    assert below.kv.below
    nodes = make_plan(replace(inputs, verify_rows=8))
    assert not nodes.kv.below
    assert not nodes.fits
    assert any("--verify-rows needs all KV on the device" in note for note in nodes.notes)
    with pytest.raises(DoesNotFit, match=r"it fits with .*--batch-size"):
        check_fits(nodes)
