"""Provenance: what it tells is this machine's, and what it cannot tell is None with a warning."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from bench.result.types_machine import Drive
from bench.run import provenance
from bench.run.provenance import collect, drive_of
from llama.checkpoint import Checkpoint, synthetic_checkpoint
from tests.bench.run.fake_nvml import FIRST, SECOND, FakeGpu, FakeNvml, NoDriver, gpu_machine


def checkpoint() -> Checkpoint:
    return synthetic_checkpoint("Llama-3.2-1B:layers=1", seed=0, dtype=torch.float32)


def mounted(monkeypatch: pytest.MonkeyPatch, mounts: dict[str, str]) -> None:
    partitions = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts.items()]
    monkeypatch.setattr(provenance.psutil, "disk_partitions", lambda all: partitions)


# -- the GPU


def test_the_link_told_is_that_of_the_gpu_in_use_not_of_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeGpu(FIRST, gen=3, gen_max=3, width=8, width_max=8), FakeGpu(SECOND, gen=5, gen_max=5)
    gpu_machine(monkeypatch, FakeNvml([first, second]), uuid=SECOND)
    found, warnings = collect(checkpoint(), torch.device("cuda"), 0, None)
    assert (found.driver, found.pcie_gen, found.pcie_width) == ("570.1", 5, 16)
    assert not [line for line in warnings if "pcie" in line.lower()]


def test_a_gpu_that_is_alone_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_machine(monkeypatch, FakeNvml([FakeGpu(FIRST)]), uuid="of another spelling")
    found, _ = collect(checkpoint(), torch.device("cuda"), 0, None)
    assert (found.pcie_gen, found.pcie_width_max) == (4, 16)


@pytest.mark.parametrize("nvml", [None, NoDriver(), FakeNvml([]), FakeNvml([FakeGpu(FIRST), FakeGpu(FIRST)])], ids=str)
def test_a_link_that_nobody_tells_is_null_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None
) -> None:
    gpu_machine(monkeypatch, nvml, uuid=SECOND)
    found, warnings = collect(checkpoint(), torch.device("cuda"), 0, None)
    assert {
        getattr(found, name) for name in ("driver", "pcie_gen", "pcie_gen_max", "pcie_width", "pcie_width_max")
    } == {None}
    assert {f"provenance.{name} could not be had" for name in ("driver", "pcie_gen", "pcie_width")} <= set(warnings)


def test_a_field_that_the_driver_does_not_know_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_machine(monkeypatch, FakeNvml([FakeGpu(gen=None, gen_max=None)]))
    found, warnings = collect(checkpoint(), torch.device("cuda"), 0, None)
    assert (found.pcie_gen, found.pcie_width) == (None, 16)
    assert "provenance.pcie_gen could not be had" in warnings


def test_a_driver_version_in_bytes_is_text_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_machine(monkeypatch, FakeNvml([FakeGpu()], driver=b"570.1"))
    found, _ = collect(checkpoint(), torch.device("cuda"), 0, None)
    assert found.driver == "570.1"


def test_a_narrow_link_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_machine(monkeypatch, FakeNvml([FakeGpu(width=4)]))
    _, warnings = collect(checkpoint(), torch.device("cuda"), 0, None)
    (line,) = [line for line in warnings if "x4 of x16" in line]
    assert "h2d figures" in line
    assert "slot" in line


def test_a_link_of_a_lower_generation_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_machine(monkeypatch, FakeNvml([FakeGpu(gen=3, gen_max=5)]))
    _, warnings = collect(checkpoint(), torch.device("cuda"), 0, None)
    (line,) = [line for line in warnings if "generation 3 of 5" in line]
    assert "h2d figures" in line
    assert "BIOS" in line


# -- the drive


def test_a_packed_file_tells_its_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "store"
    place.mkdir()
    (place / "model.wsm").touch()
    mounted(monkeypatch, {"/": "ext4", str(place): "xfs", str(tmp_path / "sto"): "vfat"})
    drive = drive_of(place / "model.wsm")
    assert drive is not None
    assert drive.filesystem == "xfs"


def test_a_link_tells_the_filesystem_of_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "far"
    place.mkdir()
    (place / "model.wsm").touch()
    (tmp_path / "link.wsm").symlink_to(place / "model.wsm")
    mounted(monkeypatch, {"/": "ext4", str(place): "tmpfs"})
    drive = drive_of(tmp_path / "link.wsm")
    assert drive is not None
    assert drive.filesystem == "tmpfs"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_a_store_in_memory_has_no_drive_and_a_warning_says_so() -> None:
    found, warnings = collect(checkpoint(), torch.device("cpu"), 0, Path("/dev/shm"))
    assert found.drive == Drive(device=None, model=None, rotational=None, filesystem="tmpfs")
    assert any("tmpfs" in line for line in warnings)


def test_a_store_that_is_gone_is_null_with_a_warning(tmp_path: Path) -> None:
    found, warnings = collect(checkpoint(), torch.device("cpu"), 0, tmp_path / "gone")
    assert found.drive is None
    assert "provenance.drive could not be had" in warnings


def test_a_device_itself_has_no_filesystem() -> None:
    devices = [Path("/dev") / name for name in sorted(os.listdir("/sys/class/block"))]
    device = next((path for path in devices if path.is_block_device()), None)
    if device is None:
        pytest.skip("no block device here")
    drive = drive_of(device)
    assert drive is not None
    assert (drive.device, drive.filesystem) == (device.name, None)


# -- code and machine


def test_without_git_the_commit_is_null_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_git_says", lambda *command: None)
    found, warnings = collect(checkpoint(), torch.device("cpu"), 0, None)
    assert (found.git_commit, found.git_dirty) == (None, None)
    assert "provenance.git_commit could not be had" in warnings


def test_the_name_of_the_machine_is_not_told() -> None:
    found, _ = collect(checkpoint(), torch.device("cpu"), 7, None)
    assert os.uname().nodename not in {value for value in msgspec.structs.astuple(found) if isinstance(value, str)}
    assert found.seed == 7
    assert found.utc.endswith("+00:00")
