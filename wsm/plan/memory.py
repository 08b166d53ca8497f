"""What memory there is, and what a run takes of it besides weights and KV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import psutil

from wsm.layout.model import ModelShape

if TYPE_CHECKING:
    import torch

MIB, GIB = 1 << 20, 1 << 30
WORKSPACE_BYTES = 64 << 20
"""What cuBLAS and the attention kernels keep for themselves in torch's allocator."""
MODULES_BYTES = 192 << 20
"""Kernels that CUDA loads when they are first used, outside torch's allocator; measured on one H200: 180 MB."""
SAMPLED_AT_ONCE = 16
"""Rows that are sampled together (``llama.sampling``)."""
SORTED_BYTES = 56
"""Bytes a logit on a GPU while it is sampled: sorting, the nucleus's sums in whole numbers, and a sort's scratch."""


class MemoryLine(NamedTuple):
    """One thing that takes memory."""

    name: str
    nbytes: int


def table(title: str, lines: Sequence[MemoryLine], budget_bytes: int | None) -> str:
    """A budget, a line each, in GiB (2^30) and MB (10^6), with its sum."""
    sums = [MemoryLine("sum", sum(line.nbytes for line in lines))]
    if budget_bytes is not None:
        sums.append(MemoryLine("budget", budget_bytes))
    width = max(len(text) for text in (title, *(line.name for line in (*lines, *sums))))
    rows = [f"{title:<{width + 2}} {'GiB':>10} {'MB':>12}"]
    rows += [f"  {line.name:<{width}} {line.nbytes / GIB:10.3f} {line.nbytes / 1e6:12.1f}" for line in (*lines, *sums)]
    return "\n".join(rows)


# -- what there is


@dataclass(frozen=True, slots=True)
class Hardware:
    """Memory of this machine, in bytes; the GPU's is None where the compute device is the CPU.

    ``gpu_available_bytes`` is what this process may take in all, its CUDA context included; ``gpu_context_bytes`` is
    what the context takes of it once all kernels are loaded.
    """

    device: str
    gpu_total_bytes: int | None
    gpu_available_bytes: int | None
    gpu_context_bytes: int
    cpu_available_bytes: int

    @property
    def has_gpu(self) -> bool:
        """Whether the GPU tier is memory of its own; otherwise both tiers share the CPU's."""
        return self.gpu_total_bytes is not None


class CgroupMemory(NamedTuple):
    """A container's memory limit and what is left under it, in bytes."""

    limit: int
    free: int


_UNLIMITED = 1 << 60
_CACHED = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> CgroupMemory | None:
    """The tightest memory limit of this process's cgroup and its parents, of version 2 or 1; None without a limit.

    The page cache is not counted as used: the kernel gives it back before it refuses memory.
    """
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
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, used = int((directory / limit_file).read_text()), int((directory / used_file).read_text())
            cached = _cached_bytes(directory / "memory.stat")
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
        if limit < _UNLIMITED:
            return CgroupMemory(limit, max(0, limit - max(0, used - cached)))
    return None


def _cached_bytes(file: Path) -> int:
    counters = dict(line.split() for line in file.read_text().splitlines()) if file.exists() else {}
    own = sum(int(counters.get(name, 0)) for name in _CACHED[:2])
    return max(own, sum(int(counters.get(name, 0)) for name in _CACHED[2:]))


def cpu_available(available_bytes: int, total_bytes: int, cgroup: CgroupMemory | None) -> int:
    """The smaller of free memory and what the container has left, less max(4 GiB, 5 %) for everything else."""
    if cgroup is not None:
        available_bytes, total_bytes = min(available_bytes, cgroup.free), min(total_bytes, cgroup.limit)
    return max(0, available_bytes - max(4 * GIB, total_bytes // 20))


def measure_hardware(device: torch.device, ranks_here: int = 1, most_context_bytes: int = GIB) -> Hardware:
    """The memory of this machine now, the CPU's divided among the ranks that run on it.

    On CUDA this creates the context and takes its size from what it leaves free.

    To be called before the first computation, so that no kernel is loaded yet.
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


def limit_device_memory(device: torch.device, allowed_bytes: int | None, context_bytes: int) -> None:
    """Make torch fail beyond ``allowed_bytes``, so that a large GPU stands in for a small one."""
    if device.type != "cuda" or allowed_bytes is None:
        return
    import torch

    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (allowed_bytes - context_bytes) / total)), device)


# -- what the computation takes


class Work(NamedTuple):
    """What is computed at once: tokens of a chunk and of a wave, rows, the longest prompt, tokens of KV a row."""

    chunk_tokens: int
    wave_tokens: int
    batch: int
    prompt_tokens: int
    kv_tokens: int
    itemsize: int
    on_gpu: bool


def chunk_bytes(config: ModelShape, tokens: int, itemsize: int) -> int:
    """The most that is alive besides the residual while a chunk of ``tokens`` is computed (see ``llama.model``).

    The largest of: a norm (three of them in float32, where it is not one kernel); queries, keys and values beside
    their input, RoPE's float32 copy of queries and keys, or the output; both branches of the feed-forward block beside
    their input.
    """
    dim, q_dim, kv_dim = config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    norm = 3 * 4 * dim
    wide = 4 * (q_dim + kv_dim) if itemsize < 4 else 0
    attention = (q_dim + 2 * kv_dim) * itemsize + max(dim * itemsize, wide, q_dim * itemsize)
    feed_forward = (dim + 2 * config.ffn_dim) * itemsize
    return tokens * max(norm, attention, feed_forward)


def activation_bytes(config: ModelShape, work: Work) -> int:
    """An upper bound of the activations: what a whole wave keeps, and the largest of a chunk, the head and sampling."""
    rows, tokens = work.batch, max(work.wave_tokens, work.batch)
    chunk = min(work.chunk_tokens, tokens)
    logits = rows * config.vocab_size * 4
    # The residual, the rotations of its positions (complex64), token ids and positions; and the rotary table.
    kept = tokens * (config.dim * work.itemsize + 4 * config.head_dim + 16) + 4 * config.head_dim * work.kv_tokens
    head = 2 * logits + min(chunk, rows) * (config.vocab_size * work.itemsize + 8 * config.dim)
    # On the CPU a sort needs no scratch.
    sampling = logits + min(rows, SAMPLED_AT_ONCE) * config.vocab_size * (SORTED_BYTES if work.on_gpu else 40)
    computing = chunk_bytes(config, chunk, work.itemsize) + _attention_extra(config, work, chunk) + logits
    return kept + max(computing, head, sampling)


def _attention_extra(config: ModelShape, work: Work, chunk: int) -> int:
    """What attention needs besides its inputs and output, where the kernel is not flash attention alone."""
    q_dim = config.n_heads * config.head_dim
    padding = (
        work.batch * work.kv_tokens * (1 + 2 * work.itemsize)
    )  # the mask of a decode pass, and the comparison it is made from
    if work.on_gpu:
        repeated = 2 * q_dim * work.prompt_tokens * work.itemsize if work.itemsize == 4 else 0
        return max(padding, repeated)
    goes_on = work.wave_tokens > chunk  # a row may be cut: its later part needs a mask of its own
    mask = 12 * min(chunk, work.prompt_tokens) * work.prompt_tokens if goes_on else 0
    return max(padding, mask)


def allocator_bytes(nbytes: int) -> int:
    """What torch's CUDA allocator takes for a tensor: from 10 MiB on whole 2 MiB."""
    return nbytes if nbytes < 10 * MIB else -(-nbytes // (2 * MIB)) * 2 * MIB
