"""Where a rank runs: parsing and refusing, on a fake sysfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from wsm import numa
from wsm.numa import bind_to_gpu, bind_to_node, parse_cpus


def nodes(root: Path, *cpus: str) -> Path:
    for number, text in enumerate(cpus):
        (root / f"node{number}").mkdir(parents=True)
        (root / f"node{number}" / "cpulist").write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0-1,4-5\n", {0, 1, 4, 5})]
)
def test_a_cpu_list_is_read(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


def test_the_thread_moves_to_the_nodes_cpus_and_prefers_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: moved.append(cpus))
    monkeypatch.setattr(numa, "_prefer_memory_of", moved.append)
    assert bind_to_node(1, nodes(tmp_path, "0-1", "2-7")) == 1
    assert moved == [{2, 3}, 1]


@pytest.mark.parametrize(
    ("node", "cpus"), [(None, ("0", "1")), (0, ("0-7",)), (1, ("0", "64-127")), (7, ("0", "1")), (1, ("0", "x"))]
)
def test_nothing_changes_where_the_node_is_unknown_alone_not_ours_or_unreadable(
    node: int | None, cpus: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: pytest.fail("moved"))
    assert bind_to_node(node, nodes(tmp_path, *cpus)) is None


def test_the_cpu_as_compute_device_has_no_node() -> None:
    assert bind_to_gpu(torch.device("cpu")) is None


def test_the_systems_call_for_memory_is_accepted_for_node_0() -> None:
    """Every Linux has a node 0; a refusal (a container's filter) changes nothing either."""
    numa._prefer_memory_of(0)
    assert torch.ones(1 << 20).sum() == 1 << 20
