"""Small sums over ranks whose GPUs reach each other's memory over NVLink: torch's symmetric memory, one kernel a sum.

A decode pass has two sums a layer of some kilobytes. NCCL takes some 20 us for each, whatever it holds; here each rank
writes its part where the others can read, waits for theirs, and adds them up itself, in the order of the ranks: so all
ranks have the same bits. The kernels can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time

import torch
import torch.distributed as dist
from torch import Tensor

from llama.parallel.watch import GRACE_S
from llama.parallel.world import World
from wsm.threads import Thread

SMALL_BYTES = 512 << 10
"""Of a sum: beyond it each rank reads too much of the others', and NCCL's rings are faster."""
_DTYPES = (torch.float32, torch.bfloat16)
_AGREE_S = 30.0
"""For all ranks to have opened each other's memory, which takes milliseconds."""


class NearSums:
    """``SMALL_BYTES`` of each rank's GPU memory that all others have mapped. Made by :func:`near_sums`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self._group, self._device, self._releasing = group.group_name, device, threading.Event()
        whole = symmetric.empty(SMALL_BYTES // 4, dtype=torch.float32, device=device)
        self._shared = symmetric.rendezvous(whole, self._group)
        self._buffers = {dtype: whole.view(dtype) for dtype in _DTYPES}
        for dtype in _DTYPES:  # their kernels are loaded now, before memory is measured
            self.sum_(torch.zeros(8, dtype=dtype, device=device))

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is summed here: the same answer on all ranks, which have tensors of one shape and dtype."""
        return x.dtype in _DTYPES and x.nbytes <= SMALL_BYTES and x.nbytes % 16 == 0

    def sum_(self, x: Tensor) -> Tensor:
        """``x``, contiguous, summed over the ranks, in place, in the order of the current stream."""
        buffer = self._buffers[x.dtype][: x.numel()].view(x.shape)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, x, "sum", self._group, x)
        return x

    def release(self) -> None:
        """Let this GPU's sums go on without the other ranks, for a job that ends: what they give then means nothing.

        A sum waits on the GPU for a flag of each other rank to be set in its own memory, and for its own in theirs to
        be taken. Both are done here, again and again on a stream of its own, while an orderly end may take.
        """
        if not self._releasing.is_set():
            self._releasing.set()
            Thread(target=self._release, name="release-sums", daemon=True).start()

    def _release(self) -> None:
        shared, until = self._shared, time.monotonic() + GRACE_S
        with contextlib.suppress(RuntimeError), torch.cuda.stream(torch.cuda.Stream(self._device)):
            flags = [self._flags(rank) for rank in range(shared.world_size)]
            mine = [flags[shared.rank][:, rank] for rank in range(shared.world_size) if rank != shared.rank]
            theirs = [flags[rank][:, shared.rank] for rank in range(shared.world_size) if rank != shared.rank]
            while time.monotonic() < until:
                for column in mine:
                    column.fill_(1)
                for column in theirs:
                    column.zero_()
                time.sleep(1e-4)

    def _flags(self, rank: int) -> Tensor:
        """``[blocks of a kernel, ranks]``: by whom a flag in that rank's memory is set."""
        ranks = self._shared.world_size
        flags: Tensor = self._shared.get_signal_pad(rank).view(torch.int32)
        return flags[: len(flags) // ranks * ranks].view(-1, ranks)


def near_sums(world: World, group: dist.ProcessGroup, device: torch.device) -> NearSums | None:
    """For all ranks or for none, None: they share a host and every pair of their GPUs NVLink, and torch can.

    Every rank of ``group`` calls it. RuntimeError where it works on some of the ranks alone.
    """
    if not all(text == "true" for text in world.exchange(json.dumps(_could(world, device)))):
        return None
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed, and not to be had on every host
    try:
        made, why = NearSums(group, device), ""
    except (RuntimeError, ImportError) as error:
        made, why = None, f"{type(error).__name__}: {error}".splitlines()[0]
    said = world.exchange(why, _AGREE_S)
    if any(said) and not all(said):
        reasons = (f"rank {rank}: {text or 'it did not answer'}" for rank, text in enumerate(said) if text != "")
        raise RuntimeError(f"memory of the GPUs is shared over NVLink on some ranks alone ({'; '.join(reasons)})")
    return made


def _could(world: World, device: torch.device) -> bool:
    """Whether this rank sees all of the job's GPUs, each linked to each by NVLink."""
    ranks = world.shard.size
    if len(set(world.hosts)) > 1 or world.local.size != ranks or torch.cuda.device_count() < ranks:
        return False
    try:
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]

        links = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    except (ImportError, RuntimeError):  # a torch without it, or a driver that does not tell
        return False
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    return device.index < ranks and all(links[a][b] > 0 for a, b in pairs)
