"""What went on beside the timed rounds: seen where there is something to see, null with a warning where not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.run import conditions
from bench.run.conditions import Conditions, Watch

OURS, OTHERS = "aaaa-1", "bbbb-2"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An nvidia-smi that answers as told, on a machine where torch's GPU has the UUID ``OURS``."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=OURS))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answers(*, field: str = conditions.CLOCK_FIELDS[0], masks: str = "", apps: str = "") -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(
            "#!/bin/sh\n"
            f"case \"$*\" in *compute-apps*) printf '{apps}'; exit;; esac\n"
            f'case "$1" in *{field}) ;; *) exit 6;; esac\n'
            f"printf '{masks}'\n"
            'case "$*" in *--loop-ms*) exec sleep 60;; esac\n'
        )
        script.chmod(0o755)

    return answers


def watched(device: str = "cuda", targets: tuple[str, ...] = (), during: Callable[[], Any] = lambda: None) -> Watch:
    with Watch(torch.device(device), targets) as watch:
        during()
    return watch


def looked_at() -> None:
    """Long enough for the fake's first lines to be written."""
    time.sleep(0.3)


# -- clocks


@pytest.mark.parametrize("field", conditions.CLOCK_FIELDS)
def test_throttled_clocks_are_counted_named_and_warned_of(nvidia_smi: Callable[..., None], field: str) -> None:
    nvidia_smi(field=field, masks=f"GPU-{OURS}, 0x04\\nGPU-{OTHERS}, 0x40\\nGPU-{OURS}, 0x01\\n")
    watch = watched(during=looked_at)
    seen = watch.conditions
    assert (seen.clock_samples, seen.throttled_samples, seen.throttle_reasons) == (2, 1, ["power cap"])
    assert any("throttled in 1 of 2 looks (power cap)" in line for line in watch.warnings)


def test_an_idle_gpu_is_not_throttled(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(masks=f"GPU-{OURS}, 0x0000000000000001\\nGPU-{OURS}, [N/A]\\n", apps=f"GPU-{OURS}, {os.getpid()}")
    watch = watched(during=looked_at)
    assert (watch.conditions.clock_samples, watch.conditions.throttled_samples) == (1, 0)
    assert watch.conditions.throttle_reasons == []
    assert [line for line in watch.warnings if "GPU" in line] == []


def test_clocks_that_nobody_tells_of_are_null_with_a_warning(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(field="no.such.field")
    watch = watched()
    assert watch.conditions.clock_samples is None
    assert any("conditions.clock_samples could not be had" in line for line in watch.warnings)


# -- others on the GPU


@pytest.mark.parametrize(
    ("apps", "others"),
    [
        (f"GPU-{OURS}, {os.getpid()}\\nGPU-{OTHERS}, 7\\n", 0),
        (f"GPU-{OURS}, {os.getpid()}\\nGPU-{OURS}, 7\\n", 1),
        (f"GPU-{OURS}, 8\\nGPU-{OURS}, 7\\n", 1),  # a container that numbers processes otherwise
        (f"GPU-{OTHERS}, 7\\n", None),
        ("", None),
    ],
    ids=["ours", "another's", "in a container", "of another GPU", "none"],
)
def test_other_processes_on_the_gpu_are_counted(nvidia_smi: Callable[..., None], apps: str, others: int | None) -> None:
    nvidia_smi(apps=apps)
    watch = watched()
    assert watch.conditions.gpu_other_processes == others
    said = [line for line in watch.warnings if "other process(es)" in line or "gpu_other_processes" in line]
    assert bool(said) == (others != 0)


def test_without_a_gpu_nothing_is_asked_and_nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "output_of", lambda *command: pytest.fail(f"{command} was run"))
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
    monkeypatch.setattr(conditions._Cpu, "_busy_s", staticmethod(lambda: next(busy_s)))
    monkeypatch.setattr(conditions, "time", SimpleNamespace(monotonic=lambda: next(now)))
    watch = watched("cpu")
    assert watch.conditions.cpu_other_pct == pytest.approx(50)
    assert any("took 50 % of the CPU" in line for line in watch.warnings)


def test_what_is_seen_survives_an_interrupted_round() -> None:
    watch = Watch(torch.device("cpu"), ())
    with pytest.raises(KeyboardInterrupt), watch:
        raise KeyboardInterrupt
    assert watch.conditions.cpu_other_pct is not None
