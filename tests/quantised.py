"""Small models in the layouts of AWQ, GPTQ, compressed-tensors and fp8, written after their public descriptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.tiny import hf_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output each code of a word is, from the lowest bits up."""
PLAIN = "model.layers.1.mlp.up_proj"
"""The matrix that is left unquantised in a mixed directory."""


class Codes(NamedTuple):
    """A quantised matrix as a formula: ``(codes - zeros) * scales``; ``codes`` int64 ``[rows, cols]``."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group: int

    def value(self) -> Tensor:
        cols = self.codes.shape[1]
        group = torch.arange(cols) // (self.group or cols)
        return (self.codes - self.zeros[:, group]).float() * self.scales.float()[:, group]


def random_codes(rows: int, cols: int, bits: int, group: int, *, symmetric: bool, scale: torch.dtype) -> Codes:
    groups, levels = -(-cols // group) if group else 1, 1 << bits
    zeros = torch.full((rows, groups), levels // 2) if symmetric else torch.randint(0, levels, (rows, groups))
    scales = (torch.rand(rows, groups) + 0.2) * 0.4 / levels
    return Codes(torch.randint(0, levels, (rows, cols)), zeros, scales.to(scale), group)


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """``[n, m]`` as int32 words ``[n, m x bits / 32 rounded up]``, from the lowest bits up, in ``order`` in a word."""
    each = 32 // bits
    found = np.zeros((codes.shape[0], -(-codes.shape[1] // each)), dtype=np.uint32)
    for column in range(codes.shape[1]):
        word, place = divmod(column, each)
        shift = bits * (order.index(place) if order else place)
        found[:, word] |= (codes[:, column].numpy().astype(np.uint32) & (1 << bits) - 1) << np.uint32(shift)
    return torch.from_numpy(found.view(np.int32).copy())


Tensors = dict[str, Tensor]


def awq(found: Codes, bits: int) -> Tensors:
    return {
        "qweight": words(found.codes.t(), bits, AWQ_ORDER),
        "qzeros": words(found.zeros.t(), bits, AWQ_ORDER),
        "scales": found.scales.t().contiguous(),
    }


def gptq(found: Codes, bits: int, *, version: int = 1) -> Tensors:
    stored = found.zeros.t() - (1 if version == 1 else 0)
    rows, cols = found.codes.shape
    return {
        "qweight": words(found.codes, bits).t().contiguous(),
        "qzeros": words(stored, bits),
        "scales": found.scales.t().contiguous(),
        "g_idx": torch.arange(cols, dtype=torch.int32) // (found.group or cols),
        "bias": torch.zeros(rows, dtype=torch.float16),
    }


def packed(found: Codes, bits: int, *, symmetric: bool = True) -> Tensors:
    """Codes of compressed-tensors are signed, and packed with the middle added: as ours are."""
    tensors = {
        "weight_packed": words(found.codes, bits),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor(found.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(found.zeros.t(), bits).t().contiguous()
    return tensors


def int8(found: Codes, bits: int) -> Tensors:
    return {"weight": (found.codes - 128).to(torch.int8), "weight_scale": found.scales}


def compressed_config(weights: dict[str, Any], form: str, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": None}
    named = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head", PLAIN]}
    return {**named, "config_groups": {"group_0": group}, "quantization_status": "compressed", **more}


class Method(NamedTuple):
    """How a test's model is quantised, its ``quantization_config``, and the format that it comes out in."""

    config: dict[str, Any]
    form: str
    write: Callable[[Codes, int], Tensors]
    bits: int = 4
    group: int = 32
    symmetric: bool = False
    scale: torch.dtype = torch.float16


def _gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, **changes}


def _weights(bits: int, group: int | None = None, *, symmetric: bool = True) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}


FLOAT8_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BF16 = torch.bfloat16
METHODS: dict[str, Method] = {
    "awq": Method(_AWQ, "int4-g32-float16", awq),
    "awq, whole rows": Method(_AWQ | {"group_size": -1}, "int4-row-float16", awq, group=0),
    "gptq": Method(_gptq_config(), "int4-g32-float16", gptq),
    "gptq, symmetric": Method(_gptq_config(sym=True), "int4-g32-float16-sym", gptq, symmetric=True),
    "gptq, 8 bits": Method(_gptq_config(bits=8), "int8-g32-float16-zero", gptq, bits=8),
    "gptq, 8 bits, symmetric": Method(
        _gptq_config(bits=8, sym=True, group_size=-1), "int8-row-float16", gptq, bits=8, group=0, symmetric=True
    ),
    "gptq_v2, short last groups": Method(
        _gptq_config(group_size=64, checkpoint_format="gptq_v2"),
        "int4-g64-float16",
        lambda found, bits: gptq(found, bits, version=2),
        group=64,
    ),
    "packed": Method(
        compressed_config(_weights(4, 32), "pack-quantized"), "int4-g32-sym", packed, symmetric=True, scale=BF16
    ),
    "packed, asymmetric": Method(
        compressed_config(_weights(4, 32, symmetric=False), "pack-quantized"),
        "int4-g32",
        lambda found, bits: packed(found, bits, symmetric=False),
        scale=BF16,
    ),
    "packed, 8 bits": Method(
        compressed_config(_weights(8), "pack-quantized"), "int8-row", packed, 8, 0, symmetric=True, scale=BF16
    ),
    "packed, groups of 256": Method(
        compressed_config(_weights(4, 256), "pack-quantized"), "int4-sym", packed, 4, 256, symmetric=True, scale=BF16
    ),
    "packed, groups beyond the rows": Method(
        compressed_config(_weights(4, 2**31 - 128), "pack-quantized"),
        "int4-sym",
        packed,
        group=2**31 - 128,
        symmetric=True,
        scale=BF16,
    ),
    "int8": Method(
        compressed_config(_weights(8), "int-quantized"), "int8-row-float32", int8, 8, 0, True, torch.float32
    ),
}
"""Integer methods, each with what our families call the result."""


def quantised_directory(directory: Path, method: Method, *, head: bool = False, **changes: Any) -> LlamaForCausalLM:
    """A random model written in ``directory`` as ``method`` lays it out; transformers' model of the same weights.

    One matrix stays plain, and embedding, norms and, unless told, ``head``.
    """
    model = hf_model(**changes)
    tensors = {name: tensor.to(method.scale) for name, tensor in model.state_dict().items()}
    for name, weight in [*model.named_parameters()]:
        module = name.removesuffix(".weight")
        if ("proj" in name and module != PLAIN) or (head and module == "lm_head"):
            rows, cols = weight.shape
            found = random_codes(rows, cols, method.bits, method.group, symmetric=method.symmetric, scale=method.scale)
            weight.data.copy_(found.value())
            del tensors[name]
            tensors |= {f"{module}.{part}": tensor for part, tensor in method.write(found, method.bits).items()}
        else:
            weight.data.copy_(tensors[name].float())
    write_directory(directory, model, tensors, method.config)
    return model


def mixed_directory(directory: Path) -> LlamaForCausalLM:
    """Layer 0 and every k plain, the rest of attention in 8 bits a row, the feed-forward in 4 bits, ``w2`` in E4M3."""
    model = hf_model()
    tensors = {name: tensor.to(BF16) for name, tensor in model.state_dict().items()}
    groups = {
        "a": {"targets": ["re:.*self_attn.*"], "weights": _weights(8), "format": "pack-quantized"},
        "b": {"targets": ["Linear"], "weights": _weights(4, 32), "format": "pack-quantized"},
        "c": {"targets": ["re:.*down_proj$"], "weights": FLOAT8_ROWS, "format": "float-quantized"},
    }
    for name, weight in [*model.named_parameters()]:
        module, (rows, cols) = name.removesuffix(".weight"), (weight.shape[0], weight.shape[-1])
        if "proj" not in name or "layers.0." in name or "k_proj" in name:
            weight.data.copy_(tensors[name].float())
        elif "down_proj" in name:
            codes, scales = (weight.data * 100).to(torch.float8_e4m3fn), torch.full((rows, 1), 0.01)
            tensors |= {name: codes, f"{module}.weight_scale": scales}
            weight.data.copy_(codes.float() * scales)
        else:
            bits, group = (8, 0) if "self_attn" in name else (4, 32)
            found = random_codes(rows, cols, bits, group, symmetric=True, scale=BF16)
            weight.data.copy_(found.value())
            del tensors[name]
            tensors |= {f"{module}.{part}": tensor for part, tensor in packed(found, bits).items()}
    config = compressed_config({}, "mixed-precision") | {"config_groups": groups}
    write_directory(directory, model, tensors, config)
    return model


def float8_directory(directory: Path, config: dict[str, Any], *, per_row: bool, part: str) -> LlamaForCausalLM:
    """As :func:`quantised_directory`, in E4M3; ``part`` is what the scales are called."""
    model = hf_model()
    tensors = {name: tensor.to(BF16) for name, tensor in model.state_dict().items()}
    for name, weight in [*model.named_parameters()]:
        module = name.removesuffix(".weight")
        if "proj" not in name or module == PLAIN:
            weight.data.copy_(tensors[name].float())
            continue
        scales = (torch.rand(weight.shape[0], 1) + 0.5) / 100 if per_row else torch.rand(()) / 100 + 0.005
        codes = (torch.randn(weight.shape) * 20).to(torch.float8_e4m3fn)
        weight.data.copy_(codes.float() * scales)
        tensors |= {name: codes, f"{module}.{part}": scales, f"{module}.input_scale": torch.ones(())}
    write_directory(directory, model, tensors, config)
    return model


def write_directory(directory: Path, model: LlamaForCausalLM, tensors: Tensors, config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    described = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (directory / "config.json").write_text(json.dumps(described | {"quantization_config": config}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
