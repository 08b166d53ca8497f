"""Quantised Hugging Face directories: every value as its formula has it, and one clear sentence for what cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama.checkpoint import Checkpoint, open_checkpoint
from llama.checkpoint.hf import to_halves
from llama.checkpoint.hf_scheme import Layout, parse_quantisation
from llama.fields import Fields
from llama.names import Cut
from tests.quantised import BF16, METHODS, compressed_config, float8_directory
from tests.quantised import quantised_directory as written
from tests.tiny import hf_directory, hf_model, tensors_of
from wsm.errors import UnusableInput
from wsm.formats import registry
from wsm.layout.model import Shard
from wsm.store.cuts import check_cuts

Q, W2 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}


def change_config(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "config.json").read_text())
    content["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(content))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def read(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return tensors_of(open_checkpoint(directory), dtype)


# Values


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_a_value_is_its_formula_rounded_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = written(tmp_path / "m", METHODS[name], num_hidden_layers=2)
    mine, weights = read(tmp_path / "m", dtype), model.state_dict()
    down, query = weights[W2 + ".weight"], weights[Q + ".weight"]
    assert torch.equal(mine["layers.0.feed_forward.w2.weight"], down.to(dtype))
    assert torch.equal(to_halves(mine["layers.0.attention.wq.weight"], 4), query.to(dtype))


def planes_of(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> Tensor:
    """A matrix decoded from the planes that a store would hold."""
    form = registry.get(str(checkpoint.native(name)))
    planes = checkpoint.encode(name, shape, torch.float32, form)
    assert planes is not None
    out = torch.empty(shape)
    form.decode_(planes, out)
    return out


@pytest.mark.parametrize("name", ["awq", "gptq, 8 bits", "packed, asymmetric", "int8"])
def test_ranks_get_the_parts_of_the_whole_matrices(name: str, tmp_path: Path) -> None:
    written(tmp_path / "m", METHODS[name], hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)
    checkpoint = open_checkpoint(tmp_path / "m")
    whole = tensors_of(checkpoint)
    for tensor, by_columns in {
        "attention.wq": 0,
        "attention.wo": 1,
        "feed_forward.w1": 0,
        "feed_forward.w2": 1,
    }.items():
        full_name = f"layers.0.{tensor}.weight"
        rows, cols = whole[full_name].shape
        shape = (rows, cols // 2) if by_columns else (rows // 2, cols)
        parts = [planes_of(checkpoint.share(Shard(rank, 2)), full_name, shape) for rank in range(2)]
        assert torch.equal(torch.cat(parts, by_columns), whole[full_name])


def test_a_cut_inside_of_a_group_is_refused_with_the_numbers_of_ranks_that_can_be(tmp_path: Path) -> None:
    written(tmp_path / "m", METHODS["awq"], num_hidden_layers=2)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.formats is not None
    with pytest.raises(UnusableInput, match=r"cannot be cut for 2 ranks.* --nproc-per-node 1$"):
        check_cuts(checkpoint.config, torch.float32, 2, checkpoint.formats)


Opened = dict[str, tuple[Checkpoint, dict[str, Tensor]]]


@given(row=st.integers(0, 11), rows=st.integers(1, 12), half=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_rows_of_a_matrix_can_be_read_alone(small: Opened, row: int, rows: int, half: bool) -> None:
    for name in ("awq", "gptq", "packed, asymmetric"):
        checkpoint, whole = small[name]
        full_name = "layers.0.feed_forward.w2.weight"
        cut = Cut(row, 32 * half, min(rows, 64 - row), 160 - 32 * half)
        out = torch.empty(cut.rows, cut.columns)
        checkpoint.fill(full_name, out, cut)
        assert torch.equal(out, whole[full_name][row : row + cut.rows, cut.column :])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    found = {}
    for name in ("awq", "gptq", "packed, asymmetric"):
        home = tmp_path_factory.mktemp("m")
        written(home, METHODS[name], num_hidden_layers=2)
        found[name] = (open_checkpoint(home), read(home))
    return found


@pytest.mark.parametrize("name", ["gptq, symmetric", "packed", "int8"])
def test_a_quantised_head_is_decoded_as_it_is_read(name: str, tmp_path: Path) -> None:
    model = written(tmp_path / "m", METHODS[name], head=True, num_hidden_layers=2, vocab_size=304)
    assert "lm_head.weight" not in load_file(tmp_path / "m/model.safetensors") or name == "int8"
    assert torch.equal(read(tmp_path / "m")["output.weight"], model.state_dict()["lm_head.weight"])


# Which description counts


def test_a_file_of_old_beside_the_configuration_describes_the_weights_too(tmp_path: Path) -> None:
    method = METHODS["gptq"]
    model = written(tmp_path / "m", method, num_hidden_layers=2)
    config = json.loads((tmp_path / "m/config.json").read_text())
    told = config.pop("quantization_config")
    del told["quant_method"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/quantize_config.json").write_text(json.dumps(told))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.warnings == ()
    weights = tensors_of(checkpoint)
    assert torch.equal(weights["layers.0.feed_forward.w2.weight"], model.state_dict()[W2 + ".weight"])
    names = [source.name for source in checkpoint.sources()]
    assert names == ["model.safetensors", "quantize_config.json"]


def test_where_two_descriptions_differ_config_json_counts_and_a_warning_says_so(tmp_path: Path) -> None:
    written(tmp_path / "m", METHODS["gptq"], num_hidden_layers=2)
    expected = read(tmp_path / "m")
    old = METHODS["gptq"].config | {"checkpoint_format": "gptq_v2"}
    for content in (json.dumps(old), "{}"):
        (tmp_path / "m/quantize_config.json").write_text(content)
        assert "quantize_config.json say different things" in " ".join(open_checkpoint(tmp_path / "m").warnings)
        found = read(tmp_path / "m")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_description_is_part_of_what_a_store_is_made_of(tmp_path: Path) -> None:
    written(tmp_path / "m", METHODS["gptq"], num_hidden_layers=2)
    first = open_checkpoint(tmp_path / "m").sources()
    change_config(tmp_path / "m", checkpoint_format="gptq_v2")
    assert open_checkpoint(tmp_path / "m").sources() != first


def test_a_model_made_for_quantised_activations_runs_without_and_says_so(tmp_path: Path) -> None:
    float8_directory(tmp_path / "m", FP8, per_row=False, part="weight_scale")
    change_tensors(tmp_path / "m", lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(())}))
    assert open_checkpoint(tmp_path / "m").warnings == (
        "config.json asks for quantised activations or KV, which stay as they are computed here",
    )


def test_a_quantised_model_is_computed_in_what_its_configuration_says(tmp_path: Path) -> None:
    written(tmp_path / "m", METHODS["awq"], num_hidden_layers=2)
    assert open_checkpoint(tmp_path / "m").dtype == torch.float16
    content = json.loads((tmp_path / "m/config.json").read_text())
    for field, wanted in ((None, BF16), ("float32", torch.float32)):
        content |= {"dtype": None, "torch_dtype": field}
        (tmp_path / "m/config.json").write_text(json.dumps(content))
        assert open_checkpoint(tmp_path / "m").dtype == wanted


def test_each_module_has_the_scheme_of_the_target_that_fits_it_best() -> None:
    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    groups = {
        "a": {"targets": ["Linear"], "weights": _CHANNEL, "format": "float-quantized"},
        "b": {"targets": ["re:.*down_proj$"], "weights": int4, "format": "pack-quantized"},
        "c": {"targets": [W2], "weights": int4 | {"group_size": 64}, "format": "pack-quantized"},
    }
    said = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    found = parse_quantisation(Fields(said, "m"), "config.json")
    schemes = [found.scheme(module) for module in (Q, W2, W2.replace("0", "1"))]
    assert [(s.layout, s.group) for s in schemes if s] == [(Layout.FP8, 0), (Layout.PACKED, 64), (Layout.PACKED, 32)]


# What cannot run


def refusal(directory: Path, *, reading: bool = False) -> str:
    with pytest.raises(UnusableInput) as caught:
        read(directory) if reading else open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _int(bits: int = 4, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, **changes}
    return compressed_config(weights, "pack-quantized")


AWQ, GPTQ = METHODS["awq"].config, METHODS["gptq"].config
NOT_HERE: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "the method 'bitsandbytes' does not run"),
    "exl2": ({"quant_method": "exl2", "bits": 4.5}, "the method 'exl2' (4.5 bits) does not run"),
    "hqq": ({"quant_method": "hqq"}, "the method 'hqq' does not run"),
    "mxfp4": ({"quant_method": "mxfp4"}, "the method 'mxfp4' does not run"),
    "no method": ({"bits": 4}, "the method '' (4 bits) does not run"),
    "a method of another kind": ({"quant_method": ["awq"]}, "the method ['awq'] does not run"),
    "AWQ gemv": (AWQ | {"version": "gemv"}, "version 'gemv' does not run"),
    "AWQ, 3 bits": (AWQ | {"bits": 3}, "bits 3 does not run"),
    "AWQ without zeros": (AWQ | {"zero_point": False}, "AWQ without zero_point does not run"),
    "AWQ, odd groups": (AWQ | {"group_size": 48}, "group_size 48, no multiple of 32, does not run"),
    "AWQ, no groups": (AWQ | {"group_size": 0}, "group_size must be a whole number above 0"),
    "AWQ, absurd groups": (AWQ | {"group_size": 10**30}, "group_size must be at most"),
    "GPTQ, 2 bits": (GPTQ | {"bits": 2}, "bits 2 does not run"),
    "GPTQ, true bits": (GPTQ | {"bits": True}, "bits True does not run"),
    "GPTQ, no bits": (GPTQ | {"bits": None}, "field bits is missing"),
    "GPTQ for Marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' does not run"),
    "GPTQ for Marlin of old": (GPTQ | {"is_marlin_format": True}, "is_marlin_format True does not run"),
    "GPTQ of two versions": (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "say different things"),
    "GPTQ, module by module": (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "settings of their own for '+:.*down"),
    "GPTQ, words of a byte": (GPTQ | {"pack_dtype": "int8"}, "pack_dtype 'int8' does not run"),
    "GPTQ, sym of another kind": (GPTQ | {"sym": "yes"}, "sym must be true or false"),
    "fp8 in blocks": (FP8 | {"weight_block_size": [128, 128]}, "fp8 with a scale a block"),
    "fp8, E5M2": (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2' does not run"),
    "nvfp4": (compressed_config(_CHANNEL, "nvfp4-pack-quantized"), "in the format 'nvfp4-pack-quantized'"),
    "marlin-24": (compressed_config(_CHANNEL, "marlin-24"), "in the format 'marlin-24'"),
    "not compressed": (compressed_config(_CHANNEL, "dense"), "in the format 'dense' of type 'float'"),
    "packed, 3 bits": (_int(3), "num_bits 3 does not run"),
    "float-quantized in blocks": (
        compressed_config(_CHANNEL | {"strategy": "block"}, "float-quantized"),
        "the strategy 'block' of float-quantized does not run",
    ),
    "packed floats": (compressed_config(_CHANNEL, "pack-quantized"), "'pack-quantized' of type 'float' does not run"),
    "sparse": (_int() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config does not run"),
    "rotated": (_int() | {"transform_config": {"config_groups": {"a": {}}}}, "transform_config does not run"),
    "presets": (_int() | {"config_groups": {"W4A16": ["Linear"]}}, "field W4A16 must be an object"),
    "no groups": (_int() | {"config_groups": {}}, "field config_groups is missing or empty"),
    "groups of no weights": (_int() | {"config_groups": {"a": {"targets": ["Linear"]}}}, "quantises no weights"),
    "no targets": (_int() | {"config_groups": {"a": {"weights": {"num_bits": 4}}}}, "targets must be a list of names"),
    "a broken pattern": (
        _int() | {"config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4}}}},
        "the target '(' is no pattern",
    ),
    "a pattern of many choices": (
        _int() | {"config_groups": {"a": {"targets": ["re:" + "(a|.)" * 30 + "!"], "weights": {"num_bits": 4}}}},
        "repeats too much",
    ),
    "many patterns": (
        _int() | {"config_groups": {"a": {"targets": ["re:.*x"] * 99, "weights": {"num_bits": 4}}}},
        "field targets has 99 patterns, more than 32",
    ),
    "many groups": (_int() | {"config_groups": {str(n): {} for n in range(99)}}, "has 99 groups, more than 32"),
    "an endless pattern": (
        _int() | {"config_groups": {"a": {"targets": ["re:(.+)+x"], "weights": {"num_bits": 4}}}},
        "repeats too much",
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("plain") / "m", hf_model(num_hidden_layers=1))


@pytest.mark.parametrize("what", NOT_HERE)
def test_what_cannot_run_is_refused_by_name(what: str, plain: Path, tmp_path: Path) -> None:
    config, said = NOT_HERE[what]
    content = json.loads((plain / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(plain / "model.safetensors")
    assert said in refusal(tmp_path)


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.update({name: change(t[name]).contiguous()})


def _nan(scales: Tensor) -> Tensor:
    scales.view(-1)[-1] = float("nan")
    return scales


def _shuffled(order: Tensor) -> Tensor:
    return order.flip(0)


Change = Callable[[dict[str, Tensor]], object]
DAMAGE: dict[str, tuple[str, Change, str, bool]] = {
    "no scales": ("awq", lambda t: t.pop(f"{Q}.scales"), f"has no tensor {Q}.scales", False),
    "no zeros": ("awq", lambda t: t.pop(f"{Q}.qzeros"), f"has no tensor {Q}.qzeros", False),
    "no matrix": ("packed", lambda t: [t.pop(name) for name in [*t] if Q in name], f"has no tensor {Q}.weight", False),
    "codes of another shape": ("awq", _set(f"{Q}.qweight", lambda w: w[:-1]), "qweight has shape [63, 12], but", False),
    "codes of another layout": ("gptq", _set(f"{Q}.qweight", Tensor.t), "qweight has shape [96, 8], but", False),
    "codes that are no integers": ("awq", _set(f"{Q}.qweight", Tensor.float), "is of dtype float32, where I32", False),
    "codes of no dimension": ("awq", _set(f"{Q}.qweight", lambda w: w[0, 0]), "qweight has shape [], but", False),
    "scales of other groups": ("awq", _set(f"{Q}.scales", lambda s: s[:1]), "scales has shape [1, 96], but", False),
    "scales that are integers": ("awq", _set(f"{Q}.scales", Tensor.int), "scales is of dtype I32, where", False),
    "zeros of another shape": ("gptq", _set(f"{Q}.qzeros", lambda z: z[:, 1:]), "qzeros has shape [2, 11], but", False),
    "NaN scales": ("awq", _set(f"{Q}.scales", _nan), "the plane scales holds NaN or infinity", True),
    "infinite scales": ("gptq", _set(f"{Q}.scales", lambda s: s / 0), "the plane scales holds NaN or infinity", True),
    "act-order": ("gptq", _set(f"{Q}.g_idx", _shuffled), "act-order (desc_act) does not run here", False),
    "an order of another shape": ("gptq", _set(f"{Q}.g_idx", lambda g: g[1:]), "g_idx has shape [63], but", False),
    "an order beyond the groups": ("gptq", _set(f"{Q}.g_idx", lambda g: g + 2**30), "act-order (desc_act) does", False),
    "a bias": ("gptq", _set(f"{Q}.bias", lambda b: b + 1), "a bias that is not zero does not run here", False),
    "zeros of a symmetric model": (
        "gptq, symmetric", _set(f"{Q}.qzeros", lambda z: z + 1), "qzeros are not all 8, so sym must be false", True,
    ),
    "another shape told": (
        "packed", _set(f"{Q}.weight_shape", lambda s: s.flip(0)), "weight_shape is [64, 96], but", False,
    ),
    "packed zeros of another shape": (
        "packed, asymmetric", _set(f"{Q}.weight_zero_point", Tensor.t), "weight_zero_point has shape [2, 12]", False,
    ),
    "no packed zeros": (
        "packed, asymmetric", lambda t: t.pop(f"{Q}.weight_zero_point"), f"has no tensor {Q}.weight_zero_point", False,
    ),
    "packed act-order": (
        "packed", lambda t: t.update({f"{Q}.weight_g_idx": torch.arange(64).flip(0)}), "act-order (desc_act)", False,
    ),
    "a matrix twice": ("packed", lambda t: t.update({f"{Q}.weight": torch.zeros(96, 64)}), f"holds tensor {Q}", False),
    "codes of another method": (
        "packed", lambda t: t.update({f"{Q}.qweight": torch.zeros(2)}), "belongs to a quantised model", False,
    ),
    "int8 without scales": ("int8", lambda t: t.pop(f"{Q}.weight_scale"), f"has no tensor {Q}.weight_scale", False),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tensors_are_refused_with_a_sentence(what: str, tmp_path: Path) -> None:
    name, change, said, reading = DAMAGE[what]
    written(tmp_path / "m", METHODS[name], num_hidden_layers=2)
    change_tensors(tmp_path / "m", change)
    assert said in refusal(tmp_path / "m", reading=reading)


FLOAT8_DAMAGE: dict[str, tuple[Change, str, bool]] = {
    "no scales": (lambda t: t.pop(f"{Q}.weight_scale"), f"has no tensor {Q}.weight_scale", False),
    "a scale a block": (
        _set(f"{Q}.weight_scale", lambda s: s.expand(3, 2)), "weight_scale has shape [3, 2], but", False,
    ),
    "zeros": (lambda t: t.update({f"{Q}.weight_zero_point": torch.ones(1)}), "fp8 with zero points", False),
    "NaN codes": (
        _set(f"{Q}.weight", lambda w: (w.view(torch.uint8) | 0x7F).view(w.dtype)), "the plane values holds NaN", True,
    ),
    "E5M2": (_set(f"{Q}.weight", lambda w: w.to(torch.float8_e5m2)), "is of dtype F8_E5M2, where F8_E4M3", False),
}  # fmt: skip


@pytest.mark.parametrize("what", FLOAT8_DAMAGE)
def test_damaged_float8_is_refused_with_a_sentence(what: str, tmp_path: Path) -> None:
    change, said, reading = FLOAT8_DAMAGE[what]
    float8_directory(tmp_path / "m", FP8, per_row=False, part="weight_scale")
    change_tensors(tmp_path / "m", change)
    assert said in refusal(tmp_path / "m", reading=reading)


def test_act_order_that_is_only_named_runs_where_the_order_is_the_plain_one(tmp_path: Path) -> None:
    written(tmp_path / "m", METHODS["gptq"], num_hidden_layers=2)
    expected = read(tmp_path / "m")
    change_config(tmp_path / "m", desc_act=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read(tmp_path / "m").items())
    change_tensors(tmp_path / "m", lambda t: [t.pop(name) for name in [*t] if name.endswith("g_idx")])
    assert "lacks g_idx, which act-order (desc_act) needs" in refusal(tmp_path / "m")
