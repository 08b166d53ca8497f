"""Ranks for tests: processes with torchrun's variables, forked from a server that has torch and fairscale loaded.

So a group of four costs a second, not a launcher and four imports. The keeper of the job's store is rank 0.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks", "llama.parallel.ranks", "bench_infer", "torch.nn.attention.bias"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, size: int, port: int, directory: Path, work: Callable[..., int], arguments: Sequence[Any]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(directory / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.exit(work(*arguments))


@dataclass(slots=True)
class Ranks:
    """Started ranks and what they said."""

    processes: list[BaseProcess]
    directory: Path

    def codes(self, limit_s: float) -> list[int | None]:
        """Exit codes; None for a rank that has not ended within ``limit_s`` from now."""
        until = time.monotonic() + limit_s
        for process in self.processes:
            process.join(timeout=max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> list[str]:
        """The script's sentences on a rank's stderr, after making sure that there is no traceback."""
        err = (self.directory / f"err{rank}").read_text()
        assert "Traceback" not in err, err
        return [
            line.removeprefix("bench_infer.py: ") for line in err.splitlines() if line.startswith("bench_infer.py:")
        ]

    def out(self, rank: int) -> str:
        return (self.directory / f"out{rank}").read_text()

    def wait_for(self, text: str, rank: int = 0, limit_s: float = 60) -> None:
        """Until a rank has printed ``text``."""
        until = time.monotonic() + limit_s
        while text not in self.out(rank):
            alive = self.processes[rank].is_alive() and time.monotonic() < until
            assert alive, f"rank {rank} never said {text!r}: {self.out(rank)} {self.said(rank)}"
            time.sleep(0.02)


@contextlib.contextmanager
def started(
    directory: Path,
    size: int,
    work: Callable[..., int],
    arguments: Callable[[int], Sequence[Any]],
    only: Sequence[int] | None = None,
) -> Iterator[Ranks]:
    """``size`` ranks (or ``only`` some of them) run ``work(*arguments(rank))``; killed if they outlive the test."""
    port = free_port()
    directory.mkdir(parents=True, exist_ok=True)
    ranks = range(size) if only is None else only
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=_rank, args=(rank, size, port, directory, work, arguments(rank))) for rank in ranks
    ]
    for rank in ranks:
        (directory / f"out{rank}").touch()  # read before the rank itself opens it
    for process in processes:
        process.start()
    try:
        yield Ranks(processes, directory)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def impatient_script(*argv: str) -> int:
    """As :func:`script`, waiting less long for signs of life."""
    import bench.run.job
    import llama.parallel.ranks
    import llama.parallel.watch

    llama.parallel.ranks.START_S = 2.0
    llama.parallel.watch.LOST_S = bench.run.job.LOST_S = 4.0
    llama.parallel.watch.GRACE_S = bench.run.job.GRACE_S = 3.0
    return script(*argv)


def script(*argv: str) -> int:
    """The script's command line in this process."""
    from bench_infer import command_line as main

    return main([str(word) for word in argv])


def answers(directories: Sequence[Path], cache: Path, out: Path, size: int, weight_format: str = "auto") -> int:
    """Greedy tokens and logits of every model in every mode, saved by each rank; 0 if all went well."""
    from bench.run.job import Job
    from tests.parallel_models import PLACES, PROMPTS
    from wsm.settings import read_ranks

    job = Job(read_ranks(os.environ))
    job.join()
    found = {}
    for directory in directories:
        for mode in ("full", "preload", "stream", "mixed"):
            config = {**PLACES, "cache_dir": cache, "weight_format": weight_format}
            found[f"{directory.name} {mode}"] = answer(directory, mode, config, job.world, PROMPTS)
    torch.save(found, out / f"answers-{size}-{job.world.shard.rank}.pt")
    return job.end(0, None)[0]


def answer(directory: Path, mode: str, config: dict[str, Any], world: Any, prompts: Sequence[Sequence[int]]) -> Any:
    """Tokens, logits of the first prompt, and page-locked bytes, of a model in a mode."""
    from llama.llm import LLaMA

    sizes = {"device": "cpu", "max_seq_len": 128, "max_batch_size": 2, "world": world}
    with LLaMA.build(directory, mode=mode, mode_config=config, **sizes) as llm:
        tokens = llm.generate(prompts, max_new_tokens=6, temperature=0.0, ignore_eos=True).tokens
        sampled = None
        if mode == "stream":
            sampled = llm.generate(
                prompts, max_new_tokens=4, temperature=0.9, top_p=0.95, seed=3, ignore_eos=True
            ).tokens
        logits = llm.logits([prompts[0]])
        page_locked = llm.manager.memory.page_locked_bytes if llm.manager is not None else 0
        return {"tokens": tokens, "sampled": sampled, "logits": logits, "page_locked": page_locked, "kv": llm.kv.nbytes}
