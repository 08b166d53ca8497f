"""Proofs that need two runs in one process, or another library beside ours: python tests/gpu/proofs.py OUTDIR [part …]

Parts: ``pinning`` (page-locking against torch's), ``telemetry`` (a pass with and without its records), ``peers``
and ``peers_drive`` (accelerate's offloading on the same checkpoint, from CPU memory and from ${DRIVE:-/tmp}). One CUDA
device, 64 GiB of memory, 20 GB on /dev/shm; about 6 minutes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.options.run_flags import RunOptions  # noqa: E402
from bench.run.measure import run_round  # noqa: E402
from llama.config import PRESETS  # noqa: E402
from llama.inputs import plan_run  # noqa: E402
from llama.llm import LLaMA  # noqa: E402
from llama.loading import Reporter  # noqa: E402
from llama.opening import open_inputs  # noqa: E402
from wsm.engine.arena import PageLockedArena  # noqa: E402
from wsm.engine.device import open_device  # noqa: E402
from wsm.plan.plan import RunShape  # noqa: E402

SHAPE = "Llama-3.1-70B:layers=8"
FAST = Path("/dev/shm/wsm-proofs")
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


# -- peers


def checkpoint(directory: Path) -> None:
    """A 70B-shaped Hugging Face checkpoint of 8 layers, bfloat16, of small random weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = PRESETS["Llama-3.1-70B"]
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=8,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        torch_dtype="bfloat16",
        tie_word_embeddings=False,
    )
    directory.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    index, noise = {}, (torch.randn(1 << 24) * 0.02).to(torch.bfloat16)
    for number in range(9):
        names = [n for n in shapes if (f".layers.{number}." in n) or (number == 8 and ".layers." not in n)]
        tensors = {
            n: noise.repeat(-(-shapes[n].numel() // len(noise)))[: shapes[n].numel()].view(shapes[n]) for n in names
        }
        tensors = {n: torch.ones_like(t) if "norm" in n else t.contiguous() for n, t in tensors.items()}
        file = f"model-{number}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@contextlib.contextmanager
def fresh(directory: Path) -> Iterator[Path]:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def forward_times(model: Any, passes: int, before: Any = lambda: None) -> list[float]:
    """Seconds of ``passes`` single-token passes behind a prompt of 128, as a user of that library would run them."""
    ids = torch.arange(1000, 1128, device=GPU).unsqueeze(0)
    times = []
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        for _ in range(passes):
            before()
            torch.cuda.synchronize()
            started = time.perf_counter()
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            out.logits[:, -1:].argmax(-1).item()
            times.append(time.perf_counter() - started)
    return times


def ours(directory: Path, out: Path, cache: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "bench_infer.py"), "--checkpoints", str(directory), "--prompt-len", "128"]
    command += ["--temperature", "0", "--ignore-eos", "--gpu-mem-gb", "24", "--cache-dir", str(cache), *flags]
    subprocess.run([*command, "--out-json", str(out)], check=True, capture_output=True, timeout=200)
    return dict(json.loads(out.read_text()))


def forget(directory: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in directory.iterdir():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def peers(out: Path, drive: Path) -> dict[str, Any]:
    """Seconds a decode pass, B=1, no layer resident: ours and accelerate's, from CPU memory."""
    from accelerate import cpu_offload
    from transformers import LlamaForCausalLM

    with fresh(FAST) as fast, fresh(drive) as cache:
        checkpoint(fast / "hf")
        cache.mkdir(parents=True)
        flags = ("--mode", "stream", "--gpu-cached-layers", "0", "--max-new-tokens", "9")
        result = ours(fast / "hf", out / "peers_stream.json", cache, *flags)
        mine = _rate(result["tpot_ms"]["p50"] / 1e3, result["plan"]["bytes_per_pass"]["weight_h2d"])
        model = LlamaForCausalLM.from_pretrained(fast / "hf", dtype=torch.bfloat16)
        nbytes = _streamed_bytes(model)
        cpu_offload(model, GPU)
        theirs = _rate(statistics.median(forward_times(model, 3)), nbytes)
    return {"ours": mine, "accelerate_cpu": theirs, "ratio": theirs["s_a_pass"] / mine["s_a_pass"]}


def peers_drive(out: Path, drive: Path) -> dict[str, Any]:
    """The same from the machine's drive, the page cache cold."""
    from accelerate import disk_offload
    from transformers import LlamaForCausalLM

    with fresh(FAST) as fast, fresh(drive) as slow:
        checkpoint(fast / "hf")
        slow.mkdir(parents=True)
        flags = ("--mode", "mixed", "--gpu-cached-layers", "0", "--cpu-cache-layers", "2", "--prefetch-distance", "2")
        flags = (*flags, "--max-new-tokens", "4", "--warmup-rounds", "0")
        result = ours(fast / "hf", out / "peers_mixed.json", slow, *flags)
        mine = _rate(result["tpot_ms"]["p50"] / 1e3, result["plan"]["bytes_per_pass"]["ssd_read"])
        for file in slow.iterdir():
            file.unlink()
        model = LlamaForCausalLM.from_pretrained(fast / "hf", dtype=torch.bfloat16)
        nbytes = _streamed_bytes(model)
        shutil.rmtree(fast / "hf")
        disk_offload(model, slow / "offload", GPU)
        os.sync()
        times = forward_times(model, 2, before=lambda: forget(slow / "offload"))
        theirs = _rate(statistics.median(times), nbytes)
    return {"ours": mine, "accelerate_disk": theirs, "ratio": theirs["s_a_pass"] / mine["s_a_pass"]}


def _streamed_bytes(model: Any) -> int:
    """All weights but the embedding, of which a pass needs a row."""
    return int(sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes)


def _rate(seconds: float, nbytes: int) -> dict[str, float]:
    return {"s_a_pass": seconds, "GB": nbytes / 1e9, "GBps": nbytes / seconds / 1e9}


def main(arguments: Sequence[str]) -> None:
    out, parts = Path(arguments[0]), arguments[1:] or ("pinning", "telemetry", "peers", "peers_drive")
    drive = Path(os.environ.get("DRIVE", "/tmp")) / "wsm-peers"
    work = {
        "pinning": pinning,
        "telemetry": telemetry,
        "peers": lambda: peers(out, drive),
        "peers_drive": lambda: peers_drive(out, drive),
    }
    for part in parts:
        found = work[part]()
        print(part, json.dumps(found), flush=True)
        (out / f"proof_{part}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
