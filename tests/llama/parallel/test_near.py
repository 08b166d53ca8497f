"""Sums over NVLink are for all ranks or none, and for small sums alone. On two GPUs: tests/gpu/test_gpu_parallel.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from llama.parallel import near
from llama.parallel.near import SMALL_BYTES, NearSums, near_sums
from llama.parallel.world import World
from wsm.layout.model import Shard

CUDA = torch.device("cuda", 0)


class Two(World):
    """Rank 0 of two on one host; the other answers what ``others`` says, one answer a question."""

    def __init__(self, *others: str | None) -> None:
        super().__init__(Shard(0, 2), Shard(0, 2))
        self._others = list(others)

    def exchange(self, text: str, limit_s: float | None = None) -> list[str | None]:
        return [text, self._others.pop(0)]


def near_of(world: World, monkeypatch: pytest.MonkeyPatch, made: Callable[..., object], could: bool = True) -> object:
    monkeypatch.setattr(near, "_could", lambda *_: could)
    monkeypatch.setattr(near, "NearSums", made)
    return near_sums(world, cast(Any, None), CUDA)


def fails(*_: object) -> object:
    raise RuntimeError("pidfd_getfd: not permitted\nmore")


def test_sums_are_near_where_every_rank_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert near_of(Two("true", ""), monkeypatch, lambda *_: "made") == "made"


def test_no_rank_sums_near_where_one_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert near_of(Two("false"), monkeypatch, fails) is None
    assert near_of(Two("true"), monkeypatch, fails, could=False) is None


def test_where_it_fails_on_all_ranks_none_sums_near(monkeypatch: pytest.MonkeyPatch) -> None:
    assert near_of(Two("true", "RuntimeError: not permitted"), monkeypatch, fails) is None


@pytest.mark.parametrize(
    ("made", "other", "says"),
    [(fails, "", "rank 0: RuntimeError: pidfd_getfd: not permitted"), (lambda *_: "made", "no", "rank 1: no")],
)
def test_where_it_fails_on_one_rank_the_job_ends(
    made: Callable[..., object], other: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=says) as caught:
        near_of(Two("true", other), monkeypatch, made)
    assert "more" not in str(caught.value)


def test_a_rank_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="rank 1: it did not answer"):
        near_of(Two("true", None), monkeypatch, fails)


def test_ranks_of_two_hosts_or_without_their_gpus_cannot() -> None:
    class Apart(Two):
        @property
        def hosts(self) -> list[str]:
            return ["a", "b"]

    assert not near._could(Apart(), CUDA)
    if torch.cuda.device_count() < 2:
        assert not near._could(Two(), CUDA)


def test_large_sums_and_other_dtypes_are_left_to_nccl() -> None:
    sums = object.__new__(NearSums)
    for dtype in (torch.float32, torch.bfloat16):
        assert sums.takes(torch.empty(SMALL_BYTES // dtype.itemsize, dtype=dtype))
        assert not sums.takes(torch.empty(SMALL_BYTES // dtype.itemsize + 8, dtype=dtype))
        assert not sums.takes(torch.empty(3, dtype=dtype))
    assert not sums.takes(torch.empty(8, dtype=torch.float16))
