"""A collective that is captured in a CUDA graph is not timed, and its failure is one of the ranks' like any other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from llama.parallel import ranks
from llama.parallel.ranks import CollectiveBroken, FairscaleCollective
from wsm.engine.device import Device
from wsm.engine.telemetry import Telemetry
from wsm.layout.model import Shard

ON_CUDA = cast(Tensor, SimpleNamespace(is_cuda=True))


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Telemetry:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return Telemetry(Device())


def timed(timer: Telemetry, monkeypatch: pytest.MonkeyPatch, x: Tensor) -> int:
    """How many of one sum are counted."""
    took = list[Any]()
    monkeypatch.setattr(timer, "took", lambda *marks: took.append(marks))
    monkeypatch.setattr(ranks, "reduce_from_model_parallel_region", lambda given: given)
    assert FairscaleCollective(Shard(0, 2), timer).reduce_(x) is x
    return len(took)


def test_a_captured_sum_is_not_timed(timer: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(timer, monkeypatch, ON_CUDA) == 0
    assert timed(timer, monkeypatch, torch.ones(1)) == 1


@pytest.mark.parametrize("x", [ON_CUDA, torch.ones(1)])
def test_a_sum_that_fails_is_broken_also_while_it_is_captured(
    x: Tensor, timer: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(given: Tensor) -> Tensor:
        raise RuntimeError("NCCL communicator was aborted on rank 1.")

    monkeypatch.setattr(ranks, "reduce_from_model_parallel_region", fails)
    with pytest.raises(CollectiveBroken, match="aborted"):
        FairscaleCollective(Shard(0, 2), timer).reduce_(x)
