"""The peers that run transformers' LLaMA: accelerate's offloading, bitsandbytes' 4 bits, DeepSpeed's ZeRO-Inference."""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.peers import ours
from tests.peers.models import fill, free, hold, layer_of, model_of, nbytes
from tests.peers.rows import Row, Work, attempt, emit

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def accelerate(work: Work) -> None:
    """``cpu_offload`` as it comes; and what our row has: embedding and head on the GPU, the layers page-locked."""
    from accelerate import cpu_offload

    hold(work)
    how = "cpu_offload: embedding and head, too, come in each pass"
    with attempt("accelerate", work.bare, "bf16", 1, how, version("accelerate")) as row:
        model = model_of(work, work.few, lambda name: "cpu")
        moved = nbytes(model)
        cpu_offload(model, torch.device(work.device))
        fill(row, model, work, moved, 3)
    model = None
    free()
    model = model_of(work, work.few, lambda name: "locked" if layer_of(name) >= 0 else "cuda")
    moved = nbytes(model, lambda name: layer_of(name) >= 0)
    _dispatch(model, work, 0)
    how = "dispatch_model, a map of the caller's (embedding and head on the GPU), the layers page-locked before"
    for batch in (1, 32):
        with attempt("accelerate", work.bare, "bf16", batch, how, version("accelerate")) as row:
            fill(row, model, work, moved)


def accelerate_partly(work: Work) -> None:
    """``dispatch_model`` with as many layers on the GPU as the budget holds, the others page-locked. The map is the
    caller's: ``infer_auto_device_map`` fills the GPU from the front, so that the head, 2.1 GB, would cross the link."""
    hold(work)
    how = "dispatch_model, a map of the caller's (embedding and head on the GPU), the rest page-locked before"
    with attempt("accelerate", work.partly, "bf16", 1, how, version("accelerate")) as row:
        model = model_of(work, work.many, lambda name: "cuda" if layer_of(name) < work.held_bf16 else "locked")
        moved = nbytes(model, lambda name: layer_of(name) >= work.held_bf16)
        _dispatch(model, work, work.held_bf16)
        fill(row, model, work, moved)


def _place_4bit(held: int, name: str) -> str:
    """Matrices of the held layers get memory when they are quantised."""
    if layer_of(name) >= held:
        return "locked"
    return "" if name.split(".")[-2] in LINEAR else "cuda"


def _dispatch(model: Any, work: Work, held: int) -> None:
    """Compute all on the GPU, the layers from ``held`` on offloaded."""
    from accelerate import dispatch_model

    gpu: int | str = 0 if work.device != "cpu" else "cpu"
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), gpu)
    places = others | {f"model.layers.{n}": gpu if n < held else "cpu" for n in range(len(model.model.layers))}
    dispatch_model(model, places, skip_keys=model._skip_keys_device_placement, force_hooks=True)


def accelerate_disk(work: Work, out: Path, drive: Path) -> None:
    """``disk_offload``, and ours in ``mixed``, both from the machine's drive with a cold page cache."""
    from accelerate import disk_offload

    hold(work)
    ours.drive(work, out, drive / "ours")
    with attempt("accelerate", work.drive, "bf16", 1, "disk_offload, page cache cold", version("accelerate")) as row:
        model = model_of(work, work.few, lambda name: "cpu")
        moved = nbytes(model)
        disk_offload(model, drive / "offload", torch.device(work.device))
        os.sync()
        fill(row, model, work, moved, passes=2, before=lambda: _forget(drive / "offload"))


def _forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.iterdir():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bitsandbytes(work: Work) -> None:
    """nf4: all layers on the GPU; then what can be offloaded. Beside it, what transformers does with a GGUF file."""
    import bitsandbytes as bnb
    from accelerate import cpu_offload

    hold(work)
    model = model_of(work, work.many, partial(_place_4bit, work.many))
    _quantise(model, bnb, work, work.many)
    for batch in (1, 8):
        with attempt("bitsandbytes", work.whole, "nf4", batch, "bf16 compute, all on the GPU", bnb.__version__) as row:
            fill(row, model, work, 0, 16)
    with attempt(
        "bitsandbytes", work.half, "nf4", 1, "accelerate's cpu_offload of the 4-bit model", bnb.__version__
    ) as row:
        cpu_offload(model, torch.device(work.device))
        fill(row, model, work, None)
    del model
    free()
    how = "llm_int8_enable_fp32_cpu_offload: nf4 on the GPU, what is offloaded stays bf16 (page-locked before)"
    with attempt("bitsandbytes", work.half, "nf4 + bf16", 1, how, bnb.__version__) as row:
        model = model_of(work, work.many, partial(_place_4bit, work.held_4bit))
        _quantise(model, bnb, work, work.held_4bit)
        moved = nbytes(model, lambda name: layer_of(name) >= work.held_4bit)
        _dispatch(model, work, work.held_4bit)
        fill(row, model, work, moved)
    _transformers_gguf(work)


def _quantise(model: Any, bnb: Any, work: Work, layers: int) -> None:
    """Put ``Linear4bit`` of noise in the place of the first layers' matrices, one at a time.

    Each is made without memory: torch would first fill it with float32 of its own, minutes for them all.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and 0 <= layer_of(name) < layers:
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=work.device).normal_(std=0.02)
            small = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            small.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, small.to(work.device))


def _transformers_gguf(work: Work) -> None:
    """No measurement: whether transformers can keep a GGUF file's blocks. If not, its offloading is the bf16 row."""
    row = Row("transformers, GGUF", work.half, "q4_0", 1, "GgufConfig", version("transformers"))
    try:
        from transformers.integrations.gguf.kernels import get_gguf_kernel

        if get_gguf_kernel():
            row.could_not = "has a kernel for GGUF blocks here, which this script does not measure yet"
        else:
            row.could_not = (
                "dequantises the file when it loads it, since the kernel for its blocks is not installed (the package "
                "`kernels` would fetch it from a hub): what it offloads is bf16, accelerate's row"
            )
    except ImportError as error:
        row.could_not = f"dequantises the file when it loads it ({error}): what it offloads is bf16, accelerate's row"
    emit(row)


def deepspeed(work: Work) -> None:
    """ZeRO stage 3 with parameters in page-locked CPU memory, fetched a layer ahead: ZeRO-Inference, one process.

    Buckets hold a layer and three layers may be alive, so that the next one is fetched while one is computed.
    """
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    import deepspeed as ds

    hold(work)
    model = model_of(work, work.few, lambda name: "cpu")
    moved = nbytes(model)
    layer = sum(p.numel() for name, p in model.named_parameters() if layer_of(name) == 0)
    zero = {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 3 * layer,
        "stage3_max_reuse_distance": layer,
        "stage3_param_persistence_threshold": model.config.hidden_size,
    }
    config = {"bf16": {"enabled": True}, "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    engine, *_ = ds.initialize(model=model, config=config)
    engine.eval()
    how = "ZeRO stage 3, offload_param to page-locked CPU memory, buckets of a layer, 3 layers alive"
    for batch in (1, 32):
        with attempt("DeepSpeed ZeRO-Inference", work.bare, "bf16", batch, how, ds.__version__) as row:
            fill(row, engine.module, work, moved)
