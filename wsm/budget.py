"""What memory there is, and what a run takes of it, line by line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from llama.config import ModelConfig

GIB = 1 << 30
LIBRARIES_BYTES = 192 << 20
"""cuBLAS workspaces, and the rounding of torch's allocator to whole 2 MiB pages."""


class MemoryLine(NamedTuple):
    """One thing that takes memory."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """Memory of this machine, in bytes; the GPU's is None where the compute device is the CPU.

    ``gpu_available_bytes`` is what this process may take in all, its CUDA context included.
    """

    device: str
    gpu_total_bytes: int | None
    gpu_available_bytes: int | None
    gpu_context_bytes: int
    cpu_available_bytes: int


def cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left under the container's memory limit, of cgroup version 2 or 1; None without a limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (root / limit_name).read_text().strip(), (root / used_name).read_text().strip()
        except OSError:
            continue
        if limit != "max" and int(limit) < 1 << 60:
            return max(0, int(limit) - int(used))
    return None


def cpu_available(available_bytes: int, total_bytes: int, cgroup_bytes: int | None) -> int:
    """The smaller of free memory and the container's limit, less max(4 GiB, 5 %) for everything else."""
    free = available_bytes if cgroup_bytes is None else min(available_bytes, cgroup_bytes)
    return max(0, free - max(4 * GIB, total_bytes // 20))


def measure_hardware(device: torch.device) -> Hardware:
    """The memory of this machine now. On CUDA this creates the context, whose size shows in what it leaves free."""
    memory = psutil.virtual_memory()
    cpu = cpu_available(memory.available, memory.total, cgroup_free())
    if device.type != "cuda":
        return Hardware(str(device), None, None, 0, cpu)
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    context = min(max(0, total - free - held), GIB)
    return Hardware(str(device), total, free + held + context, context, cpu)


def limit_device_memory(device: torch.device, allowed_bytes: int | None, context_bytes: int) -> None:
    """Make torch fail beyond ``allowed_bytes``, so that a large GPU stands in for a small one."""
    if device.type != "cuda" or allowed_bytes is None:
        return
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (allowed_bytes - context_bytes) / total)), device)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def chunk_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """The most that is alive besides the residual while a chunk of ``tokens`` is computed (see ``llama.model``).

    The largest of: a norm in float32; attention with queries, keys, values, RoPE's float32 halves and its output; the
    feed-forward block with both branches.
    """
    dim, q_dim, kv_dim = config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    norm = dim * (2 * 4 + 2 * itemsize)
    attention = dim * 2 * itemsize + q_dim * (2 * itemsize + 6) + 2 * kv_dim * itemsize
    feed_forward = 2 * dim * itemsize + 2 * config.ffn_dim * itemsize
    return tokens * max(norm, attention, feed_forward)


def activation_bytes(config: ModelConfig, *, chunk_tokens: int, wave_tokens: int, batch: int, itemsize: int) -> int:
    """An upper bound of the activations: residual and rotary angles of a wave, one chunk, logits and sampling."""
    residual = wave_tokens * (config.dim * itemsize + config.head_dim * 4)
    sampling = batch * config.vocab_size * (6 * 4 + 8)
    return residual + chunk_bytes(config, min(chunk_tokens, max(wave_tokens, batch)), itemsize) + sampling


def table(title: str, lines: Sequence[MemoryLine], budget_bytes: int | None) -> str:
    """A budget, a line each, with its sum."""
    total = sum(line.nbytes for line in lines)
    width = max([len(line.name) for line in lines] + [len("in all")])
    rows = [f"  {line.name:<{width}} {line.nbytes / GIB:10.3f} GiB" for line in lines]
    rows.append(f"  {'in all':<{width}} {total / GIB:10.3f} GiB")
    if budget_bytes is not None:
        rows.append(f"  {'budget':<{width}} {budget_bytes / GIB:10.3f} GiB")
    return "\n".join([title, *rows])
