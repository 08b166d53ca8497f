"""Where a result comes from: code, libraries, machine. What cannot be had is None, with a line of warning."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from bench.result.types_machine import Drive, Provenance
from llama.checkpoint import Checkpoint

_ROOT = Path(__file__).resolve().parents[2]
LINK = {
    "pcie_gen": "nvmlDeviceGetCurrPcieLinkGeneration",
    "pcie_gen_max": "nvmlDeviceGetMaxPcieLinkGeneration",
    "pcie_width": "nvmlDeviceGetCurrPcieLinkWidth",
    "pcie_width_max": "nvmlDeviceGetMaxPcieLinkWidth",
}


class Gpu:
    """One GPU as NVML, the driver's management library, sees it; None for what it does not answer.

    Found by its UUID: torch and NVML number GPUs differently (CUDA_VISIBLE_DEVICES, fastest first).
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: ModuleType | None = None
        self._refusals: tuple[type[Exception], ...] = (AttributeError,)  # of a function that the package lacks
        with contextlib.suppress(ImportError):
            import pynvml

            self._nvml, self._refusals = pynvml, (AttributeError, pynvml.NVMLError)
        self._ask("nvmlInit")
        uuid = torch.cuda.get_device_properties(device).uuid
        self._handle = self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}".encode())
        if self._handle is None and self._ask("nvmlDeviceGetCount") == 1:
            self._handle = self._ask("nvmlDeviceGetHandleByIndex", 0)

    def _ask(self, function: str, *args: Any) -> Any:
        with contextlib.suppress(*self._refusals):
            return getattr(self._nvml, function)(*args)
        return None

    def _of_this_gpu(self, *functions: str) -> Any:
        """What the first function answers that there is: its name depends on the driver's age."""
        answers = (self._ask(function, self._handle) for function in functions if self._handle is not None)
        return next((answer for answer in answers if answer is not None), None)

    def driver(self) -> str | None:
        """The driver's version."""
        version = self._ask("nvmlSystemGetDriverVersion") if self._handle is not None else None
        return version.decode() if isinstance(version, bytes) else version

    def link(self) -> dict[str, int | None]:
        """Generation and lanes of the PCIe link: those in use, and the most that card and slot can do."""
        return {name: self._of_this_gpu(function) for name, function in LINK.items()}

    def throttle_mask(self) -> int | None:
        """Why the clocks are now lower than the card could run, one bit for each reason."""
        mask: int | None = self._of_this_gpu(
            "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
        )
        return mask

    def other_processes(self) -> int | None:
        """How many others compute on it; None where none is listed, not even this one (as in some containers)."""
        found = self._of_this_gpu("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")
        here = {process.pid for process in found or ()}
        if not here:
            return None
        # A container may number processes otherwise: then one of them is still this one.
        return len(here - {os.getpid()}) if os.getpid() in here else len(here) - 1


def _git_says(*command: str) -> str | None:
    """What git prints, stripped; None if it is not there, fails or takes over 20 s."""
    try:
        answer = subprocess.run(["git", *command], capture_output=True, text=True, timeout=20, check=True, cwd=_ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _code() -> tuple[str | None, bool | None]:
    """The commit, and whether tracked files were changed since."""
    if _git_says("rev-parse", "--show-toplevel") != str(_ROOT):
        return None, None  # installed somewhere inside another project
    changes = _git_says("status", "--porcelain", "--untracked-files=no")
    return _git_says("rev-parse", "HEAD"), None if changes is None else bool(changes)


def cpu_model() -> str | None:
    """The processor's name."""
    with contextlib.suppress(OSError):
        if named := re.search(r"^model name.*?:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return named[1].strip()
    return platform.processor() or None


def drive_of(path: Path) -> Drive | None:
    """The block device behind a file, or a device itself; None where there is no such path.

    ``device`` is None where no single one is behind it (tmpfs, overlay, btrfs), ``filesystem`` for a device itself.
    """
    if not os.path.exists(path):
        return None
    device, model, rotational, filesystem = None, None, None, None
    if not path.is_block_device():  # what is mounted at the innermost directory above it
        mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
        real = path.resolve()
        filesystem = next((mounts[place] for place in (real, *real.parents) if place in mounts), None)
    if (entry := _block_entry(path)) is not None:
        device = entry.name
        with contextlib.suppress(OSError):
            model = (_whole(entry) / "device/model").read_text().strip()
        with contextlib.suppress(OSError):
            rotational = (_whole(entry) / "queue/rotational").read_text().strip() == "1"
    return Drive(device=device, model=model, rotational=rotational, filesystem=filesystem)


def disk_of(path: Path) -> str | None:
    """The kernel's name of the whole disk that ``path`` is on, or is; None where no single one is known."""
    entry = _block_entry(path)
    return None if entry is None else _whole(entry).name


def _block_entry(path: Path) -> Path | None:
    """What sysfs has of the block device that ``path`` is on, or is."""
    try:
        status = os.stat(path)
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    except OSError:
        return None


def _whole(entry: Path) -> Path:
    return entry.parent if (entry / "partition").exists() else entry


def collect(
    checkpoint: Checkpoint, device: torch.device, seed: int, store: Path | None
) -> tuple[Provenance, list[str]]:
    """The ``provenance`` part of a result, and a warning for each thing that could not be had."""
    git_commit, git_dirty = _code()
    gpu = Gpu(device) if device.type == "cuda" else None
    found = Provenance(
        git_commit=git_commit,
        git_dirty=git_dirty,
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        gpu=torch.cuda.get_device_name(device) if gpu is not None else None,
        driver=gpu.driver() if gpu is not None else None,
        **(gpu.link() if gpu is not None else dict.fromkeys(LINK)),
        cpu=cpu_model(),
        cpu_cores=len(os.sched_getaffinity(0)),
        ram_bytes=psutil.virtual_memory().total,
        drive=drive_of(store) if store is not None else None,
        kernel=platform.release(),
        seed=seed,
        model_digest="+".join(source.digest for source in checkpoint.sources()) or None,
        utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    expected = ["cpu", "git_commit", "model_digest"]
    expected += ["driver", "pcie_gen", "pcie_width"] if gpu is not None else []
    expected += ["drive"] if store is not None else []
    missing = [f"provenance.{name} could not be had" for name in sorted(expected) if getattr(found, name) is None]
    return found, [*missing, *_doubts(found)]


def _doubts(found: Provenance) -> Iterator[str]:
    """A store without a drive, and a PCIe link that is less than card and slot can do."""
    if found.drive is not None and found.drive.device is None:
        place = found.drive.filesystem or "an unknown filesystem"
        yield f"provenance.drive: the store lies on {place}, which tells of no drive behind it"
    width, widest = found.pcie_width, found.pcie_width_max
    if width is not None and widest is not None and width < widest:
        yield (
            f"the PCIe link runs at x{width} of x{widest}: h2d figures, and the floor where the link bounds it, are "
            "this link's; put the card in a slot of its width"
        )
    gen, most = found.pcie_gen, found.pcie_gen_max
    if gen is not None and most is not None and gen < most:
        yield (
            f"the PCIe link reports generation {gen} of {most} (some GPUs lower it while idle): where ceilings.h2d is "
            "low too, h2d figures are this link's; look at the slot, and at the link speed in the BIOS"
        )
