"""Proofs that need two runs in one process: python tests/gpu/proofs.py OUTDIR [part …]

Parts: ``pinning`` (page-locking against torch's), ``telemetry`` (a pass with and without its records). One CUDA device,
64 GiB of memory; about 2 minutes.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.options.run_flags import RunOptions  # noqa: E402
from bench.run.measure import run_round  # noqa: E402
from llama.llm import LLaMA  # noqa: E402
from llama.loading import Reporter  # noqa: E402
from llama.opening import open_inputs  # noqa: E402
from llama.plans import plan_run  # noqa: E402
from wsm.engine.arena import PageLockedArena  # noqa: E402
from wsm.engine.device import open_device  # noqa: E402
from wsm.plan.inputs import RunShape  # noqa: E402

SHAPE = "Llama-3.1-70B:layers=8"
GPU = torch.device("cuda", 0)


def pinning() -> dict[str, Any]:
    """Page-locking 8 GiB, in turn, after the same memory was touched once: GB/s of ours and of torch's."""
    nbytes, device = 8 << 30, open_device(GPU)
    torch.ones(nbytes, dtype=torch.uint8)  # a virtual machine's memory may grow only now
    rates: dict[str, list[float]] = {"torch_GBps": [], "ours_GBps": []}
    for _ in range(2):
        started = time.perf_counter()
        theirs = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        rates["torch_GBps"].append(nbytes / (time.perf_counter() - started) / 1e9)
        del theirs
        torch._C._host_emptyCache()
        started = time.perf_counter()
        ours = PageLockedArena(nbytes, device)
        rates["ours_GBps"].append(nbytes / (time.perf_counter() - started) / 1e9)
        ours.close()
    return {**rates, "ratio": statistics.median(rates["ours_GBps"]) / statistics.median(rates["torch_GBps"])}


def telemetry() -> dict[str, Any]:
    """Median decode pass of 30, of streamed layers, with every record and with none; two builds of each, in turn."""
    work: dict[str, Any] = {"max_new_tokens": 31, "temperature": 0.0, "top_p": 1.0, "ignore_eos": True}
    options = RunOptions(mode="stream", gpu_cached_layers=2, gpu_mem_gb=24, synthetic=SHAPE, device="cuda", **work)
    passes: dict[bool, list[float]] = {True: [], False: []}
    for measured in (True, False, True, False):
        inputs = open_inputs(options)
        plan = plan_run(options, inputs, RunShape(1, 128, 32, 128))
        with LLaMA.assemble(inputs, plan, Reporter(), measured=measured) as llm:
            prompt = [list(range(1000, 1128))]
            llm.generate(prompt, max_new_tokens=3, temperature=0.0, ignore_eos=True)
            passes[measured] += run_round(llm, prompt, options).pass_ms
        del llm, inputs, plan
        gc.collect()
        torch.cuda.empty_cache()
    with_records, without = statistics.median(passes[True]), statistics.median(passes[False])
    return {"with_ms": with_records, "without_ms": without, "cost_pct": 100 * (with_records / without - 1)}


def main(arguments: Sequence[str]) -> None:
    out, parts = Path(arguments[0]), arguments[1:] or ("pinning", "telemetry")
    work = {"pinning": pinning, "telemetry": telemetry}
    for part in parts:
        found = work[part]()
        print(part, json.dumps(found), flush=True)
        (out / f"proof_{part}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
