"""On two CUDA devices: ranks over NCCL give one rank's tokens, each moves its share, and a killed one ends the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SCRIPT = Path(__file__).resolve().parents[2] / "bench_infer.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PLACES = ["--gpu-cached-layers", "2", "--cpu-cache-layers", "3", "--prefetch-distance", "2"]
FLAGS = ["--synthetic", "Llama-3.2-1B:layers=8", "--dtype", "float32", "--temperature", "0", "--ignore-eos", *PLACES]


def command(cache: Path, out: Path, *flags: str, ranks: bool = True) -> list[str]:
    launcher = TORCHRUN if ranks else []
    places = ["--cache-dir", str(cache), "--out-json", str(out), "--prompt-len", "64"]
    return [sys.executable, *launcher, str(SCRIPT), *FLAGS, *places, *flags]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def result(cache: Path, tmp_path: Path, *flags: str, ranks: bool = True) -> dict[str, Any]:
    out = tmp_path / "result.json"
    subprocess.run(command(cache, out, *flags, ranks=ranks), check=True, capture_output=True, timeout=180)
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("flags", [("--mode", "full"), ("--mode", "stream"), ("--mode", "full", "--verify-rows", "4")])
def test_one_rank_on_the_second_gpu_gives_the_tokens_of_the_first(
    flags: tuple[str, ...], cache: Path, tmp_path: Path
) -> None:
    """Kernels, graphs and events are those of the model's device, not of the process's first."""
    first, second = (
        result(cache, tmp_path, *flags, "--device", device, "--max-new-tokens", "12", ranks=False)
        for device in ("cuda:0", "cuda:1")
    )
    assert second["output"]["sha256"] == first["output"]["sha256"]


@pytest.mark.parametrize("mode", ["full", "preload", "stream", "mixed"])
def test_two_ranks_give_the_tokens_of_one_and_move_half_each(mode: str, cache: Path, tmp_path: Path) -> None:
    one = result(cache, tmp_path, "--mode", mode, "--max-new-tokens", "12", ranks=False)
    two = result(cache, tmp_path, "--mode", mode, "--max-new-tokens", "12")
    assert two["output"]["sha256"] == one["output"]["sha256"]
    ranks = two["parallel"]["ranks"]
    assert [rank["device"] for rank in ranks] == ["cuda:0", "cuda:1"]
    for phase in ("prefill", "decode"):
        job = two["parallel"]["phases"][phase]
        in_graphs = phase == "decode" and mode in ("full", "preload")
        assert job["collectives_ms"] is None if in_graphs else job["collectives_ms"] > 0
        assert job["bytes"]["weight_h2d"] == pytest.approx(one["phases"][phase]["bytes"]["weight_h2d"], rel=0.01)
    assert sum(rank["cpu_page_locked_bytes"] for rank in ranks) == pytest.approx(
        one["memory"]["cpu_page_locked_bytes"], rel=0.01, abs=64 << 20
    )
    assert not [warning for warning in two["warnings"] if "planned" in warning]


@pytest.mark.parametrize(
    ("mode", "says", "after_s"), [("stream", "Weight streaming enabled", 5), ("full", "[MODE-DECISION]", 20)]
)
def test_a_rank_killed_in_decode_ends_the_other_within_30_s(
    mode: str, says: str, after_s: int, cache: Path, tmp_path: Path
) -> None:
    """Also where it waits inside of a CUDA graph, in ``full``."""
    flags = ("--mode", mode, "--max-new-tokens", "1900", "--no-probe", "--warmup-rounds", "0", "--repeats", "50")
    job = subprocess.Popen(
        command(cache, tmp_path / "r.json", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    for line in job.stdout:
        if says in line:
            break
    time.sleep(after_s)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(sorted(children, key=int)[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, err = job.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    said = [line for line in err.splitlines() if line.startswith("bench_infer.py: ")]
    assert len(said) == 1
    assert "rank 1" in said[0]
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
