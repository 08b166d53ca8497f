"""What went on beside the timed rounds: seen where there is something to see, null with a warning where not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.result.types_machine import Conditions
from bench.run import conditions
from bench.run.conditions import Watch
from tests.bench.run.fake_nvml import CLOCK_FUNCTIONS, FIRST, SECOND, FakeGpu, FakeNvml, NoDriver, gpu_machine


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "SAMPLE_S", 0.001)


def watched(device: str = "cuda", targets: tuple[str, ...] = (), during: Callable[[], Any] = lambda: None) -> Watch:
    with Watch(torch.device(device), targets) as watch:
        during()
    return watch


def looked_at(gpu: FakeGpu) -> None:
    """Until everything was seen that the GPU's clocks show."""
    while gpu.masks:
        time.sleep(0.001)


# -- clocks


@pytest.mark.parametrize("function", CLOCK_FUNCTIONS)
def test_throttled_clocks_are_counted_named_and_warned_of(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    ours, other = FakeGpu(masks=[0x04, 0x01]), FakeGpu(FIRST, masks=[0x40])
    gpu_machine(monkeypatch, FakeNvml([other, ours], lacks=[name for name in CLOCK_FUNCTIONS if name != function]))
    watch = watched(during=lambda: looked_at(ours))
    seen = watch.conditions
    assert (seen.clock_samples, seen.throttled_samples, seen.throttle_reasons) == (2, 1, ["power cap"])
    assert any("throttled in 1 of 2 looks (power cap)" in line for line in watch.warnings)


def test_an_idle_gpu_is_not_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = FakeGpu(masks=[0x1, None], processes=[os.getpid()])
    gpu_machine(monkeypatch, FakeNvml([ours]))
    watch = watched(during=lambda: looked_at(ours))
    assert (watch.conditions.clock_samples, watch.conditions.throttled_samples) == (1, 0)
    assert watch.conditions.throttle_reasons == []
    assert [line for line in watch.warnings if "GPU" in line] == []


@pytest.mark.parametrize("nvml", [FakeNvml([FakeGpu()], lacks=CLOCK_FUNCTIONS), NoDriver(), None])
def test_clocks_that_nobody_tells_of_are_null_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None
) -> None:
    gpu_machine(monkeypatch, nvml)
    watch = watched()
    assert watch.conditions.clock_samples is None
    assert any("conditions.clock_samples could not be had" in line for line in watch.warnings)


# -- others on the GPU


@pytest.mark.parametrize(
    ("here", "elsewhere", "others"),
    [
        ([os.getpid()], [7], 0),
        ([os.getpid(), 7], [], 1),
        ([8, 7], [], 1),  # a container that numbers processes otherwise
        ([], [7], None),
        ([], [], None),
    ],
    ids=["ours", "another's", "in a container", "of another GPU", "none"],
)
def test_other_processes_on_the_gpu_are_counted(
    monkeypatch: pytest.MonkeyPatch, here: Sequence[int], elsewhere: Sequence[int], others: int | None
) -> None:
    gpu_machine(monkeypatch, FakeNvml([FakeGpu(FIRST, processes=elsewhere), FakeGpu(SECOND, processes=here)]))
    watch = watched()
    assert watch.conditions.gpu_other_processes == others
    said = [line for line in watch.warnings if "had the GPU open" in line or "gpu_other_processes" in line]
    assert bool(said) == (others != 0)


def test_processes_are_counted_where_the_driver_is_older(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([FakeGpu()], lacks=["nvmlDeviceGetComputeRunningProcesses_v3"])
    nvml.nvmlDeviceGetComputeRunningProcesses_v2 = lambda gpu: [SimpleNamespace(pid=n) for n in (os.getpid(), 7)]
    gpu_machine(monkeypatch, nvml)
    assert watched().conditions.gpu_other_processes == 1


def test_without_a_gpu_nothing_is_asked_and_nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "Gpu", lambda device: pytest.fail("the GPU was asked"))
    watch = watched("cpu")
    assert watch.conditions == Conditions(cpu_other_pct=watch.conditions.cpu_other_pct)
    assert [line for line in watch.warnings if "GPU" in line or "clock" in line] == []


# -- others on the drive


class Counters:
    """A drive whose counters, and this process's, stand where they are put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drive, self.own = [0, 0], [0, 0]
        monkeypatch.setattr(conditions, "disk_of", lambda path: "nvme7n1")
        monkeypatch.setattr(conditions.psutil, "disk_io_counters", lambda **options: {"nvme7n1": self._of(self.drive)})
        process = conditions.psutil.Process
        times = process().cpu_times
        fake = SimpleNamespace(io_counters=lambda: self._of(self.own), cpu_times=times)
        monkeypatch.setattr(conditions.psutil, "Process", lambda: fake)

    @staticmethod
    def _of(counts: list[int]) -> SimpleNamespace:
        return SimpleNamespace(read_bytes=counts[0], write_bytes=counts[1])

    def move(self, read: int, own_read: int, written: int = 0, own_written: int = 0) -> None:
        self.drive, self.own = [read, written], [own_read, own_written]


@pytest.mark.parametrize(
    ("moved", "others", "warned"),
    [
        ((1000 << 20, 1000 << 20), 0, False),
        ((1040 << 20, 1000 << 20), 40 << 20, False),  # 4 %
        ((1100 << 20, 1000 << 20), 100 << 20, True),
        ((1000 << 20, 1000 << 20, 90 << 20), 90 << 20, True),
        ((7 << 20, 0), 7 << 20, False),  # too little to matter
        ((10 << 20, 20 << 20), 0, False),
    ],
)
def test_others_bytes_on_the_drive_are_its_own_less_ours(
    monkeypatch: pytest.MonkeyPatch, moved: tuple[int, ...], others: int, warned: bool
) -> None:
    counters = Counters(monkeypatch)
    watch = watched("cpu", ("/dev/nvme7n1p4",), lambda: counters.move(*moved))
    assert watch.conditions.drive_other_bytes == others
    assert any("store's drive" in line for line in watch.warnings) == warned


def test_a_drive_without_counters_is_null_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "disk_of", lambda path: None)
    watch = watched("cpu", ("/tmpfs/store",))
    assert watch.conditions.drive_other_bytes is None
    assert any("drive_other_bytes could not be had" in line for line in watch.warnings)


# -- others on the CPU


def test_others_on_the_cpu_are_a_share_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = conditions.psutil.cpu_count()
    busy_s, now = iter([0.0, 5.0 * cores]), iter([100.0, 110.0])
    monkeypatch.setattr(conditions, "_busy_s", lambda: next(busy_s))
    monkeypatch.setattr(conditions, "time", SimpleNamespace(monotonic=lambda: next(now)))
    watch = watched("cpu")
    assert watch.conditions.cpu_other_pct == pytest.approx(50)
    assert any("took 50 % of the CPU" in line for line in watch.warnings)


def test_what_is_seen_survives_an_interrupted_round() -> None:
    watch = Watch(torch.device("cpu"), ())
    with pytest.raises(KeyboardInterrupt), watch:
        raise KeyboardInterrupt
    assert watch.conditions.cpu_other_pct is not None
