"""What memory this machine has: of the GPU, of the CPU, and what a container leaves of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    import torch

MIB, GIB = 1 << 20, 1 << 30
MODULES_BYTES = 192 << 20
"""Kernels that CUDA loads when they are first used, outside torch's allocator; measured on one H200: 180 MB."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Memory of a machine, in bytes; the GPU's is None where the compute device is the CPU.

    ``gpu_available_bytes`` is what this process may take in all, its CUDA context included; ``gpu_context_bytes`` is
    what the context takes of it once all kernels are loaded. ``elsewhere``: its GPU is not this machine's,
    and no run here measures it.
    """

    device: str
    gpu_total_bytes: int | None
    gpu_available_bytes: int | None
    gpu_context_bytes: int
    cpu_available_bytes: int
    elsewhere: bool = False

    @property
    def has_gpu(self) -> bool:
        """Whether the GPU tier is memory of its own; otherwise both tiers share the CPU's."""
        return self.gpu_total_bytes is not None


class CgroupMemory(NamedTuple):
    """A container's memory limit and what is left under it, in bytes."""

    limit: int
    free: int


_UNLIMITED = 1 << 60


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> CgroupMemory | None:
    """The tightest memory limit of this process's cgroup and its parents, of version 2 or 1; None without a limit."""
    found = [memory for directory in _cgroup_directories(root, own) if (memory := _read_cgroup(directory))]
    return min(found, key=lambda memory: memory.free, default=None)


def _cgroup_directories(root: Path, own: Path) -> Iterator[Path]:
    lines = own.read_text().splitlines() if own.exists() else []
    lines += ["0::/", "0:memory:/"]  # inside a container the path may be the host's, and the root its own
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        relative = PurePosixPath(path.lstrip("/"))
        yield from (base / part for part in (relative, *relative.parents))


def _read_cgroup(directory: Path) -> CgroupMemory | None:
    for limit_file, used_file in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = int((directory / limit_file).read_text()), int((directory / used_file).read_text())
            cached = _cached_bytes(directory / "memory.stat")
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
        if limit < _UNLIMITED:
            return CgroupMemory(limit, max(0, limit - max(0, used - cached)))
    return None


def _cached_bytes(file: Path) -> int:
    """The page cache, which is not counted as used: the kernel gives it back before it refuses memory."""
    counters = dict(line.split() for line in file.read_text().splitlines()) if file.exists() else {}
    files = ("inactive_file", "active_file")
    return max(sum(int(counters.get(whole + name, 0)) for name in files) for whole in ("", "total_"))


def cpu_available(available_bytes: int, total_bytes: int, cgroup: CgroupMemory | None) -> int:
    """The smaller of free memory and what the container has left, less max(4 GiB, 5 %) for everything else."""
    if cgroup is not None:
        available_bytes, total_bytes = min(available_bytes, cgroup.free), min(total_bytes, cgroup.limit)
    return max(0, available_bytes - max(4 * GIB, total_bytes // 20))


def measure_hardware(device: torch.device, ranks_here: int = 1, most_context_bytes: int = GIB) -> Hardware:
    """The memory of this machine now, the CPU's divided among the ranks that run on it.

    On CUDA this creates the context and takes its size from what it leaves free. To be called before the first
    computation: no kernel is loaded then.
    """
    memory = psutil.virtual_memory()
    cpu = cpu_available(memory.available, memory.total, cgroup_memory()) // ranks_here
    if device.type != "cuda":
        return Hardware(str(device), None, None, 0, cpu)
    import torch

    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    # What others hold of this GPU looks like context; no context is larger than 1 GiB, NCCL's buffers aside.
    context = min(max(0, total - free - held), most_context_bytes)
    return Hardware(str(device), total, free + held + context, context + MODULES_BYTES, cpu)


def tightest(mine: Hardware, all_ranks: Sequence[Hardware]) -> Hardware:
    """This rank's hardware with the least memory that any rank has: all of them have to come to the same plan."""
    gpus = [rank.gpu_available_bytes for rank in all_ranks if rank.gpu_available_bytes is not None]
    return replace(
        mine,
        gpu_available_bytes=min(gpus) if gpus else None,
        gpu_context_bytes=max(rank.gpu_context_bytes for rank in all_ranks),
        cpu_available_bytes=min(rank.cpu_available_bytes for rank in all_ranks),
    )


_limits: dict[str, dict[object, float]] = {}
"""By device: the fractions of it that are allowed, what was before them first; the last one counts."""


def limit_device_memory(device: torch.device, allowed_bytes: int | None, context_bytes: int) -> Callable[[], None]:
    """Make torch fail beyond ``allowed_bytes``: a large GPU stands in for a small one.

    What is returned lifts the limit, once: then the last one counts of those that are left, in whatever order they go.
    """
    if device.type != "cuda" or allowed_bytes is None:
        return lambda: None
    import torch

    set_fraction, mine, held = torch.cuda.set_per_process_memory_fraction, object(), _limits.setdefault(str(device), {})
    if not held:
        # Younger than the setter: where it is missing, torch's default is taken for what was before.
        read = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
        held[None] = read(device)
    _, total = torch.cuda.mem_get_info(device)
    held[mine] = min(1.0, max(0.0, (allowed_bytes - context_bytes) / total))
    set_fraction(held[mine], device)

    def lift() -> None:
        if held.pop(mine, None) is not None:
            set_fraction([*held.values()][-1], device)
            if len(held) == 1:
                held.clear()

    return lift
