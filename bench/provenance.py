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

_ROOT = Path(__file__).resolve().parent.parent


def _run(*command: str, cwd: Path | None = None) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=cwd)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _git() -> dict[str, Any]:
    if _run("git", "rev-parse", "--show-toplevel", cwd=_ROOT) != str(_ROOT):
        return {"git_commit": None, "git_dirty": None}  # installed somewhere inside another project
    commit = _run("git", "rev-parse", "HEAD", cwd=_ROOT)
    changes = _run("git", "status", "--porcelain", "--untracked-files=no", cwd=_ROOT)
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def _gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver and link of the GPU, from torch and nvidia-smi."""
    fields = (
        "driver_version",
        "pcie.link.gen.current",
        "pcie.link.gen.max",
        "pcie.link.width.current",
        "pcie.link.width.max",
    )
    names = ("driver", "pcie_gen", "pcie_gen_max", "pcie_width", "pcie_width_max")
    if device.type != "cuda":
        return {"gpu": None, **dict.fromkeys(names)}
    query = f"--query-gpu={','.join(fields)}"
    answer = _run("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={device.index or 0}")
    values = [value.strip() for value in answer.split(",")] if answer else []
    found: dict[str, Any] = dict.fromkeys(names)
    if len(values) == len(names):
        found = {
            "driver": values[0],
            **{n: int(v) if v.isdecimal() else None for n, v in zip(names[1:], values[1:], strict=True)},
        }
    return {"gpu": torch.cuda.get_device_name(device), **found}


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return None
    return platform.processor() or None


def drive_of(path: Path) -> dict[str, Any] | None:
    """The block device behind a file, or a device itself: its name, model and whether it rotates."""
    try:
        status = os.stat(path)
        number = status.st_rdev if _is_block(status.st_mode) else status.st_dev
        entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    except OSError:
        return None
    disk = entry.parent if (entry / "partition").exists() else entry

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
    }


def _is_block(mode: int) -> bool:
    return stat.S_ISBLK(mode)


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
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "ram_bytes": psutil.virtual_memory().total,
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
    gen, most = found["pcie_gen"], found["pcie_gen_max"]
    width, widest = found["pcie_width"], found["pcie_width_max"]
    if None not in (width, widest) and width < widest:
        warnings.append(f"the PCIe link runs at x{width} of x{widest}: h2d figures are the link's; check the slot")
    if None not in (gen, most) and gen < most:
        warnings.append(f"the PCIe link reports generation {gen} of {most} (some GPUs lower it while idle)")
    return found, warnings
