"""Where a result comes from: code, libraries, machine. What cannot be had is None, with a line of warning."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from llama.checkpoint import Checkpoint

_ROOT = Path(__file__).resolve().parents[2]


def output_of(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, stripped; None if it is not there, fails or takes over 20 s."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=cwd)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _git() -> dict[str, Any]:
    if output_of("git", "rev-parse", "--show-toplevel", cwd=_ROOT) != str(_ROOT):
        return {"git_commit": None, "git_dirty": None}  # installed somewhere inside another project
    commit = output_of("git", "rev-parse", "HEAD", cwd=_ROOT)
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=_ROOT)
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def _gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver and link of the GPU, from torch and nvidia-smi.

    The two number GPUs differently (CUDA_VISIBLE_DEVICES, fastest first): the UUID says which is meant.
    """
    fields = (
        "uuid",
        "driver_version",
        "pcie.link.gen.current",
        "pcie.link.gen.max",
        "pcie.link.width.current",
        "pcie.link.width.max",
    )
    names = ("driver", "pcie_gen", "pcie_gen_max", "pcie_width", "pcie_width_max")
    if device.type != "cuda":
        return {"gpu": None, **dict.fromkeys(names)}
    answer = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in (answer or "").splitlines()]
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    own = [row for row in rows if len(row) == len(fields) and (len(rows) == 1 or row[0].endswith(uuid))]
    found: dict[str, Any] = dict.fromkeys(names)
    if own:
        _, driver, *link = own[0]
        numbers = [int(value) if value.isdecimal() else None for value in link]
        found = {"driver": driver, **dict(zip(names[1:], numbers, strict=True))}
    return {"gpu": torch.cuda.get_device_name(device), **found}


def cpu_model() -> str | None:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return None
    return platform.processor() or None


def drive_of(path: Path) -> dict[str, Any] | None:
    """The block device behind a file, or a device itself: its name, model, whether it rotates, its filesystem.

    ``device`` is None where no single one is behind it (tmpfs, overlay, btrfs), ``filesystem`` for a device itself;
    all is None where there is no such path.
    """
    try:
        filesystem = None if stat.S_ISBLK(os.stat(path).st_mode) else _filesystem(path)
    except OSError:
        return None
    entry = _block_entry(path)
    if entry is None:
        return {"device": None, "model": None, "rotational": None, "filesystem": filesystem}
    disk = _whole(entry)

    def read(name: str) -> str | None:
        try:
            return (disk / name).read_text().strip()
        except OSError:
            return None

    rotational = read("queue/rotational")
    return {
        "device": entry.name,
        "model": read("device/model"),
        "rotational": None if rotational is None else rotational == "1",
        "filesystem": filesystem,
    }


def disk_of(path: Path) -> str | None:
    """The kernel's name of the whole disk that ``path`` lies on, or is; None where no single one is known."""
    entry = _block_entry(path)
    return None if entry is None else _whole(entry).name


def _block_entry(path: Path) -> Path | None:
    """What sysfs has of the block device that ``path`` lies on, or is."""
    try:
        status = os.stat(path)
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    except OSError:
        return None


def _whole(entry: Path) -> Path:
    return entry.parent if (entry / "partition").exists() else entry


def _filesystem(path: Path) -> str | None:
    """The type of what is mounted at the innermost directory above ``path``."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    real = path.resolve()
    return next((mounts[place] for place in (real, *real.parents) if place in mounts), None)


def collect(
    checkpoint: Checkpoint, device: torch.device, seed: int, store: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """The ``provenance`` part of a result, and a warning for each thing that could not be had."""
    sources = checkpoint.sources()
    found: dict[str, Any] = {
        **_git(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **_gpu(device),
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "ram_bytes": psutil.virtual_memory().total,
        "numa_node": None,
        "drive": drive_of(store) if store is not None else None,
        "kernel": platform.release(),
        "seed": seed,
        "model_digest": "+".join(source.digest for source in sources) or None,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    expected = {"git_commit", "cpu", "model_digest"}
    if device.type == "cuda":
        expected |= {"driver", "pcie_gen", "pcie_width"}
    if store is not None:
        expected.add("drive")
    warnings = [f"provenance.{name} could not be had" for name in sorted(expected) if found[name] is None]
    if found["drive"] is not None and found["drive"]["device"] is None:
        place = found["drive"]["filesystem"] or "an unknown filesystem"
        warnings.append(f"provenance.drive: the store lies on {place}, which tells of no drive behind it")
    gen, most = found["pcie_gen"], found["pcie_gen_max"]
    width, widest = found["pcie_width"], found["pcie_width_max"]
    if None not in (width, widest) and width < widest:
        warnings.append(
            f"the PCIe link runs at x{width} of x{widest}: h2d figures, and the floor where the link bounds it, are "
            "this link's; put the card in a slot of its width"
        )
    if None not in (gen, most) and gen < most:
        warnings.append(
            f"the PCIe link reports generation {gen} of {most} (some GPUs lower it while idle): where ceilings.h2d is "
            "low too, h2d figures are this link's; look at the slot, and at the link speed in the BIOS"
        )
    return found, warnings
