"""Tensor parallel: this process as one rank of several that torchrun started, through torch.distributed and fairscale.

The only module that imports either, and itself imported only where there is more than one rank.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_model_parallel_group,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from llama.parallel.watch import START_S, Ending, RankFailed, Watch
from llama.parallel.world import Collective, World
from wsm import stop
from wsm.engine.telemetry import Telemetry
from wsm.errors import UnusableInput
from wsm.layout.model import Shard
from wsm.settings import Ranks

_LONGEST = timedelta(hours=1)
"""Of a collective. One rank may load for long while another waits; the watch finds lost ranks."""


class CollectiveBroken(RuntimeError):
    """A collective failed, most often because another rank is gone: the watch knows which within seconds."""


class FairscaleCollective(Collective):
    """Sums and gathers over fairscale's model-parallel group.

    On CUDA they are queued in the order of the current stream, as a kernel is: the host never waits. NCCL's can be
    captured in a CUDA graph; what is captured is not timed.
    """

    def __init__(self, shard: Shard, timer: Telemetry) -> None:
        self.shard, self._timer = shard, timer

    def reduce_(self, x: Tensor) -> Tensor:
        return self._timed(reduce_from_model_parallel_region, x)

    def gather(self, x: Tensor) -> Tensor:
        return self._timed(gather_from_model_parallel_region, x)

    def _timed(self, operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
        start = None if captured else self._timer.mark()
        with _broken_if_it_fails():
            found = operation(x)
        if not captured:
            self._timer.took(start, self._timer.mark())
        return found


@contextlib.contextmanager
def _broken_if_it_fails() -> Iterator[None]:
    """Raises CollectiveBroken where a collective fails; what is no failure of the collective stays as it is."""
    try:
        yield
    except (RankFailed, NotImplementedError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        stop.check()
        raise CollectiveBroken(f"a collective failed: {error}") from error


class TorchWorld(World):
    """Several ranks, by :func:`join`: messages go through torchrun's store, collectives through NCCL or gloo."""

    def __init__(self, shard: Shard, local: Shard, store: Store, watch: Watch) -> None:
        super().__init__(shard, local)
        self.watch, self._store, self._asked = watch, store, 0
        self._device: torch.device | None = None

    @property
    def hosts(self) -> list[str]:
        return self.watch.hosts

    # -- messages between the ranks

    def exchange(self, text: str, limit_s: float | None = None) -> list[str | None]:
        keys = [f"exchange/{self._asked}/{rank}" for rank in range(self.shard.size)]
        self._asked += 1
        self._store.set(keys[self.shard.rank], text)
        if self._await(keys, limit_s):
            return [self._store.get(key).decode() for key in keys]
        return [self._store.get(key).decode() if self._store.check([key]) else None for key in keys]

    def _await(self, keys: list[str], limit_s: float | None = None) -> bool:
        """Whether all keys came; a blocking wait of the store would hear neither signals nor the watch."""
        until, pause = math.inf if limit_s is None else time.monotonic() + limit_s, 0.001
        while not self._store.check(keys):
            self.watch.check()
            stop.check()
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return True

    def agree(self, facts: Mapping[str, str]) -> None:
        all_facts = [json.loads(text or "{}") for text in self.exchange(json.dumps(dict(facts)))]
        for name in facts:
            values = [other.get(name, "nothing") for other in all_facts]
            right = Counter(values).most_common(1)[0][0]  # of equally many, the lowest rank's
            for rank, value in enumerate(values):
                if value != right:
                    raise UnusableInput(
                        f"rank {rank} on {self.hosts[rank]} has {name} {value}, the others have {right}: start every "
                        "rank with the same command, on the same checkpoint and store"
                    )

    @contextlib.contextmanager
    def first_here(self) -> Iterator[None]:
        key = f"first/{self._asked}/{self.shard.rank - self.local.rank}"
        self._asked += 1
        if self.local.rank:
            self._await([key])
        yield
        if not self.local.rank:
            self._store.set(key, "")

    # -- what they compute together

    def connect(self, device: torch.device) -> None:
        if model_parallel_is_initialized():
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._device = device
        with _broken_if_it_fails(), contextlib.redirect_stdout(io.StringIO()):  # fairscale prints
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("group", self._store),
                rank=self.shard.rank,
                world_size=self.shard.size,
                timeout=_LONGEST,
            )
            initialize_model_parallel(self.shard.size)
            # NCCL takes its buffers at the first collective of each kind and size: now, before memory is measured.
            for nbytes in (4 << 10, 1 << 20, 32 << 20) if device.type == "cuda" else (4,):
                x = torch.zeros(nbytes, dtype=torch.uint8, device=device)
                dist.all_reduce(x, group=get_model_parallel_group())
                gather_from_model_parallel_region(x[: 1 << 20])
        self.barrier()

    def collective(self, timer: Telemetry) -> Collective:
        return FairscaleCollective(self.shard, timer)

    def barrier(self) -> None:
        assert self._device is not None, "a barrier needs a world that is connected"
        idle = torch.cuda.synchronize if self._device.type == "cuda" else lambda device: None
        with _broken_if_it_fails():
            here = torch.zeros(1, device=self._device)
            idle(self._device)
            dist.all_reduce(here, group=get_model_parallel_group())
            idle(self._device)

    def abandon(self) -> None:
        """NCCL's kernels wait on the GPU, where only an abort reaches them; gloo's calls end with the peer's socket."""
        if self._device is None or self._device.type != "cuda" or not model_parallel_is_initialized():
            return
        for group in (get_model_parallel_group(), dist.group.WORLD):
            with contextlib.suppress(Exception):  # aborted already, or failing: the job ends either way
                if group is not None:
                    group.abort()

    def end(self) -> None:
        """Let go of the process group; after a failure it is better left alone."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join(ranks: Ranks, *, on_failure: Callable[[Ending], None], last_resort: Callable[[Ending], None]) -> TorchWorld:
    """Meet the other ranks in the job's store; nothing is computed yet. For the callables see :class:`Watch`.

    RankFailed, naming a rank that does not come; UnusableInput if there is no store to meet in.
    """
    if not ranks.keeps_store:
        _wait_for_store(ranks.address, ranks.port)

    def connection(keeps: bool) -> Store:
        limit = timedelta(seconds=START_S)
        store = TCPStore(ranks.address, ranks.port, None, keeps, limit, wait_for_workers=False)
        return PrefixStore(f"attempt/{ranks.attempt}", store)

    try:
        # Two connections: the watch must not queue behind somebody's wait.
        store, ours = connection(ranks.keeps_store), connection(False)
    except (RuntimeError, ValueError) as error:
        raise UnusableInput(
            f"rank {ranks.rank} of {ranks.size} found no store at {ranks.address}:{ranks.port} "
            f"({str(error).splitlines()[0]}): start the ranks with torchrun, and name the first host by --master-addr "
            "where there are several"
        ) from error
    watch = Watch(ours, ranks.rank, ranks.size, socket.gethostname(), on_failure=on_failure, last_resort=last_resort)
    watch.start(START_S)
    return TorchWorld(Shard(ranks.rank, ranks.size), Shard(ranks.local_rank, ranks.local_size), store, watch)


def _wait_for_store(address: str, port: int) -> None:
    """Until somebody listens there, or RankFailed; torch's own client would wait twice as long, and say more."""
    until = time.monotonic() + START_S
    while True:
        try:
            return socket.create_connection((address, port), timeout=START_S).close()
        except OSError as error:
            if time.monotonic() > until:
                reason = (
                    f"did not start within {START_S:g} s: nobody keeps the job's store at port {port} "
                    f"({error.strerror or error}); see its own output, and --master-addr where there are several hosts"
                )
                raise RankFailed(Ending(0, address, reason, 1)) from error
            stop.check()
            time.sleep(0.1)
