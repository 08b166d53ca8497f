"""Tokens a second at an acceptance that the user names."""

from __future__ import annotations

import pytest

from llama.checkpoint.builtin import BUILTIN as CONFIG
from wsm.plan.speculated import tokens_a_pass
from wsm.plan.time import decode_work


@pytest.mark.parametrize(("acceptance", "depth", "tokens"), [(0, 8, 1), (1, 8, 9), (0.5, 2, 1.75), (0.8, 12, 4.725)])
def test_a_chain_gives_one_token_and_those_before_its_first_wrong_one(
    acceptance: float, depth: int, tokens: float
) -> None:
    assert tokens_a_pass(acceptance, depth) == pytest.approx(tokens, abs=1e-3)


def test_nodes_cost_operations_and_no_bytes_of_weights() -> None:
    one, many = (decode_work(CONFIG, {100.0: 2}, 3, 2, 512, nodes) for nodes in (1, 24))
    assert many.flops == pytest.approx(24 * one.flops)
    assert many.hbm_bytes == one.hbm_bytes
