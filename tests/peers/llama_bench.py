"""llama.cpp's rows: its own ``llama-bench``, named by the variable LLAMA_BENCH (LLAMA_VERSION says what a
build without git does not know), on a GGUF file of random blocks.

A pass of 8 or 24 tokens is a prompt of so many behind 128, since it decodes one sequence. ``-ngl N`` puts the head and
N - 1 layers on the GPU. Where the rest of the work is done depends on the buffer that holds it:

* as it comes, mapped: the CPUs compute it, 32 tokens and more the GPU, to which the weights are copied for each product
  (so ``--no-op-offload`` changes none of these rows: it says no to what begins at 32);
* ``--no-host 1``: in the CPUs' own order, eight rows side by side, which is faster for several tokens;
* ``GGML_OP_OFFLOAD_MIN_BATCH=1`` and ``-lm none``: page-locked, and always computed by the GPU, as here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.peers.rows import GpuPeak, Row, Work, emit

BY_LINK = {"GGML_OP_OFFLOAD_MIN_BATCH": "1"}


def write(work: Work, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).resolve().parents[1] / "gpu" / "gguf_shape.py"
    subprocess.run([sys.executable, script, work.name, str(work.many), path, "q4_0"], check=True, stdout=sys.stderr)


def measure(work: Work, path: Path) -> None:
    """Half of the layers on the GPU, in each way; then as many as the budget holds, in the last two."""
    program = os.environ.get("LLAMA_BENCH", "")
    if not program:
        raise RuntimeError("LLAMA_BENCH names no llama-bench")
    write(work, path)
    cores = os.cpu_count() or 1
    halves = f"{max(1, cores // 2)},{cores}"
    call = partial(run, program, work, path)
    call(work.half, {}, "-ngl", str(work.held_4bit + 1), "-t", halves)
    call(work.half, {}, "-ngl", str(work.held_4bit + 1), "-t", halves, "--no-host", "1")
    call(work.half, BY_LINK, "-ngl", str(work.held_4bit + 1), "-t", str(cores), "-lm", "none")
    call(work.most, {}, "-ngl", str(work.most_4bit + 1), "-t", str(cores), "--no-host", "1")
    call(work.most, BY_LINK, "-ngl", str(work.most_4bit + 1), "-t", str(cores), "-lm", "none")


def run(program: str, work: Work, path: Path, scene: str, variables: Mapping[str, str], *flags: str) -> None:
    """Rows of 1, 8 and 24 tokens a pass, each written when its line comes."""
    tests = f"-o jsonl -d {work.prompt} -p 8,24 -n 8 -r 3".split()
    command = [program, "-m", str(path), *tests, *flags]
    how = " ".join([*(f"{name}={value}" for name, value in variables.items()), *flags])
    found, said = 0, ""
    with (
        GpuPeak() as peak,
        subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            if line.startswith("{"):
                row = row_of(json.loads(line), scene, how)
                row.gpu_GiB, found = peak.GiB, found + 1
                emit(row)
            else:
                said = line.strip() or said
    if process.returncode or not found:
        emit(Row("llama.cpp", scene, "q4_0", 1, how, could_not=f"exit {process.returncode}: {said[-300:]}"))


def row_of(test: Mapping[str, object], scene: str, how: str) -> Row:
    """The row of one of llama-bench's tests; generation is timed over all its passes together."""
    made, samples = int(str(test["n_gen"])), test["samples_ns"]
    assert isinstance(samples, list)
    row = Row("llama.cpp", scene, "q4_0", 1 if made else int(str(test["n_prompt"])), "")
    row.settings = how.replace(f"-t {how.partition('-t ')[2].split()[0]}", f"-t {test['n_threads']}")
    if not made:
        row.settings = f"{row.batch} tokens of one row; {row.settings}"
    row.version = os.environ.get("LLAMA_VERSION") or f"build {test['build_number']} ({test['build_commit']})"
    row.s_a_pass = statistics.median(samples) / 1e9 / max(made, 1)
    row.passes = len(samples) * max(made, 1)
    return row
