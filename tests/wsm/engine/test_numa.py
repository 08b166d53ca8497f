"""Page-locked memory beside the GPU, on machines that have a choice."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from wsm.engine import arena, numa
from wsm.engine.arena import PageLockedArena
from wsm.engine.device import CpuDevice
from wsm.engine.numa import bind_to_gpu

GPU = torch.device("cuda", 1)


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nodes 0 and 1; GPU 1 sits beside node 1, with this process's first core."""
    core = min(os.sched_getaffinity(0))
    files = {
        "devices/system/node/online": "0-1",
        "devices/system/node/node1/cpulist": f"{core},4096-4099",
        "bus/pci/devices/0000:9a:00.0/numa_node": "1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(numa, "_SYS", tmp_path)
    monkeypatch.setattr(numa, "_pci_address", {1: "0000:9A:00.0"}.get)
    return tmp_path


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    asked: list[int] = []
    monkeypatch.setattr(numa, "_prefer_memory_of", lambda node: asked.append(node) or True)
    return asked


@pytest.mark.usefixtures("two_nodes")
def test_memory_of_the_gpus_node_is_preferred(preferred: list[int]) -> None:
    assert bind_to_gpu(GPU) == 1
    assert preferred == [1]


@pytest.mark.usefixtures("two_nodes")
def test_where_policies_are_forbidden_the_thread_moves_to_the_nodes_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "_prefer_memory_of", lambda node: False)
    mine = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as pool:  # the binding is the thread's own
        assert pool.submit(bind_to_gpu, GPU).result() == 1
        assert pool.submit(os.sched_getaffinity, 0).result() == {min(mine)}
    assert os.sched_getaffinity(0) == mine


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("devices/system/node/online", "0"),
        ("bus/pci/devices/0000:9a:00.0/numa_node", "-1"),
        ("bus/pci/devices/0000:9a:00.0/numa_node", ""),
    ],
)
def test_without_a_choice_nothing_is_bound(two_nodes: Path, preferred: list[int], name: str, text: str) -> None:
    (two_nodes / name).write_text(text)
    assert bind_to_gpu(GPU) is None
    assert preferred == []


@pytest.mark.usefixtures("two_nodes")
def test_the_cpu_and_an_unknown_gpu_are_not_bound(preferred: list[int]) -> None:
    assert bind_to_gpu(torch.device("cpu")) is None
    assert bind_to_gpu(torch.device("cuda", 7)) is None
    assert preferred == []


def test_the_kernel_takes_the_policy_or_refuses_it_without_harm() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(numa._prefer_memory_of, 0).result() in (True, False)
        assert pool.submit(numa._prefer_memory_of, 4000).result() is False


def test_the_threads_that_touch_an_arenas_pages_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "bind_to_gpu", lambda device: 1)
    memory = PageLockedArena(1 << 20, CpuDevice())
    assert memory.numa_node == 1
    memory.close()


def test_a_manager_says_which_node_its_memory_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.wsm.engine.test_engine import FakeSource, plan_for, running
    from wsm.settings import Settings

    monkeypatch.setattr(arena, "bind_to_gpu", lambda device: 1)
    settings = Settings(mode="preload")  # whose only arena is given back once all is loaded
    with running(plan_for(4, settings), settings, FakeSource()) as manager:
        manager.wait_loaded()
        assert manager.numa_node == 1
