"""transformers' own LLaMA in a shape's size, filled with noise, and how long a pass of it takes.

The noise is 2^24 values over and over, made where each weight lies: a checkpoint of 24 layers would be 45 GB to write.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama.config import PRESETS
from tests.peers.rows import Row, Work

CONTEXT_GiB = 0.7
"""Of a CUDA context and the kernels in it, which torch's allocator does not count."""
Where = Callable[[str], str]
"""A parameter's name -> ``cuda``, ``cpu``, ``locked`` (page-locked CPU memory) or nothing: it stays without memory."""


def hold(work: Work) -> None:
    """Keep torch's allocator within the budget."""
    if work.device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, (work.gpu_GiB - CONTEXT_GiB) / total))


def filled(shape: Sequence[int], where: str, noise: torch.Tensor) -> torch.Tensor:
    """A bfloat16 tensor of noise in that memory."""
    device, locked = ("cuda", False) if where == "cuda" else ("cpu", where == "locked")
    made = torch.empty(tuple(shape), dtype=torch.bfloat16, device=device, pin_memory=locked)
    if device == "cuda":
        return made.normal_(std=0.02)
    flat = made.view(-1)
    for start in range(0, len(flat), len(noise)):
        flat[start : start + len(noise)].copy_(noise[: len(flat) - start])
    return made


def model_of(work: Work, layers: int, where: Where) -> Any:
    """A LLaMA of so many layers, its weights where ``where`` says (in CPU memory without a GPU)."""
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = PRESETS[work.name]
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with init_empty_weights(include_buffers=False):
        model: Any = LlamaForCausalLM(config)
    model.eval()
    noise = (torch.randn(1 << 24) * 0.02).to(torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        if place := where(name):
            value = filled(parameter.shape, place if work.device != "cpu" else "cpu", noise)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(value, requires_grad=False))
    return model


def layer_of(name: str) -> int:
    """Of a parameter's or module's name; -1 where it is in no layer."""
    _, found, rest = name.partition("layers.")
    return int(rest.split(".")[0]) if found else -1


def nbytes(model: Any, counts: Callable[[str], bool] = bool) -> int:
    """Of the parameters whose names count."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if counts(name))


def fill(
    row: Row, call: Any, work: Work, moved: int | None, passes: int = 5, before: Callable[[], None] = lambda: None
) -> None:
    """Time one-token passes of the row's batch behind a prompt and a pass that warms up; the row gets their median."""
    ids = torch.arange(work.prompt, device=work.device).expand(row.batch, -1)
    seconds = []
    with torch.inference_mode():
        out = call(input_ids=ids, use_cache=True, logits_to_keep=1)
        for _ in range(passes + 1):
            before()
            token, began = out.logits[:, -1:].argmax(-1), time.perf_counter()
            out = call(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1).tolist()  # waits for the device
            seconds.append(time.perf_counter() - began)
    row.s_a_pass, row.passes, row.moved_bytes = statistics.median(seconds[1:]), passes, moved


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
