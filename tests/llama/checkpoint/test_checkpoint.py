"""Checkpoints: the same tensors from every layout of files, and one clear sentence for every damage."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from llama.batch import prefill_batch
from llama.checkpoint import Checkpoint, builtin_checkpoint, open_checkpoint, synthetic_checkpoint
from llama.checkpoint.base import all_tensors
from llama.checkpoint.builtin import BUILTIN
from llama.checkpoint.hf import hf_name, to_halves, to_interleaved
from llama.checkpoint.hf_files import INDEX
from llama.checkpoint.synthetic import BLOCK_VALUES, SyntheticCheckpoint
from llama.config import PRESETS
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.names import full_name
from llama.weights import TensorWeights
from tests.tiny import hf_directory, hf_model, meta_directory, tensors_of
from wsm.errors import DoesNotFit, UnusableInput
from wsm.layout.groups import GroupId, pass_order

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = 304  # divisible by 8 shards
FLOAT = torch.float32
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("models") / "tiny", hf_model(vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def meta(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return meta_directory(tmp_path_factory.mktemp("models") / "tiny", open_checkpoint(hf), 2)


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def refusal(directory: Path) -> str:
    """The sentence with which a directory is refused; it names the place and is one line."""
    with pytest.raises(UnusableInput) as caught:
        open_checkpoint(directory)
    assert directory.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


def test_a_pass_and_its_names_are_metas() -> None:
    config = PRESETS["Llama-3.1-8B"]
    assert [str(group) for group in pass_order(2)] == ["L0.attn", "L0.ffn", "L1.attn", "L1.ffn"]
    assert full_name(GroupId(3, "attn"), "wq") == "layers.3.attention.wq.weight"
    assert full_name(GroupId(3, "ffn"), "w2") == "layers.3.feed_forward.w2.weight"
    assert full_name(GroupId(3, "ffn"), "ffn_norm") == "layers.3.ffn_norm.weight"
    assert full_name(None, "tok_embeddings") == "tok_embeddings.weight"
    assert [spec.name for spec in config.specs("attn")] == ["attention_norm", "wq", "wk", "wv", "wo"]
    assert [spec.name for spec in config.specs("ffn")] == ["ffn_norm", "w1", "w2", "w3"]
    assert [spec.name for spec in PRESETS["Llama-3.2-1B"].specs(None)] == ["tok_embeddings", "norm"]


def test_a_70b_layer_weighs_what_the_design_says() -> None:
    config = PRESETS["Llama-3.1-70B"]
    nbytes = {}
    for name, shape in all_tensors(config):
        nbytes[name] = 2 * torch.Size(shape).numel()
    attn = sum(nbytes[full_name(GroupId(0, "attn"), spec.name)] for spec in config.specs("attn"))
    ffn = sum(nbytes[full_name(GroupId(0, "ffn"), spec.name)] for spec in config.specs("ffn"))
    assert round(attn / 1e6, 1) == 302.0
    assert round(ffn / 1e6, 1) == 1409.3


# The same tensors from every layout


@given(st.integers(1, 6), st.integers(1, 16), st.integers(1, 5))
def test_unpermuting_undoes_permuting(heads: int, half: int, dim: int) -> None:
    weight = torch.arange(heads * 2 * half * dim, dtype=torch.float32).view(-1, dim)
    assert torch.equal(to_interleaved(to_halves(weight, heads), heads).reshape(weight.shape), weight)
    # Meta's pair (2i, 2i + 1) are HF's rows i and i + head_dim / 2 of the same head.
    halves = to_halves(weight, heads).view(heads, 2, half, dim)
    assert torch.equal(halves[:, 0], weight.view(heads, half, 2, dim)[:, :, 0])


def test_hf_tensors_arrive_under_metas_names(hf: Path) -> None:
    stored, mine = load_file(hf / "model.safetensors"), tensors_of(open_checkpoint(hf))
    for name, tensor in mine.items():
        if name.endswith(("wq.weight", "wk.weight")):
            heads = 4 if name.endswith("wq.weight") else 2
            assert torch.equal(to_halves(tensor, heads), stored[hf_name(name)])
            assert not torch.equal(tensor, stored[hf_name(name)])
        else:
            assert torch.equal(tensor, stored[hf_name(name)])


def test_sharded_hf_directories_give_the_same(hf: Path, tmp_path: Path) -> None:
    sharded = hf_directory(tmp_path / "tiny", hf_model(vocab_size=VOCABULARY), max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    checkpoint = open_checkpoint(sharded)
    assert_same(tensors_of(checkpoint), tensors_of(open_checkpoint(hf)))
    assert len(checkpoint.sources()) == len(list(sharded.glob("*.safetensors")))


@pytest.mark.parametrize("columns_embedding", [False, True], ids=["llama3", "llama2"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_meta_shards_give_the_same(shards: int, columns_embedding: bool, hf: Path, tmp_path: Path) -> None:
    source = open_checkpoint(hf)
    directory = meta_directory(tmp_path / "tiny", source, shards, columns_embedding=columns_embedding)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.vocab_size == VOCABULARY
    assert len(checkpoint.sources()) == shards
    assert_same(tensors_of(checkpoint), tensors_of(source))


@pytest.mark.parametrize("columns_embedding", [False, True], ids=["llama3", "llama2"])
def test_meta_vocabulary_comes_from_the_embedding(columns_embedding: bool, hf: Path, tmp_path: Path) -> None:
    directory = meta_directory(tmp_path / "tiny", open_checkpoint(hf), 2, columns_embedding=columns_embedding)
    change_json(directory / "params.json", vocab_size=-1)
    assert open_checkpoint(directory).config.vocab_size == VOCABULARY


def test_tied_models_have_no_head(tmp_path: Path) -> None:
    tied = hf_directory(tmp_path / "tied", hf_model(tie_word_embeddings=True))
    from_hf = open_checkpoint(tied)
    from_meta = open_checkpoint(meta_directory(tmp_path / "meta", from_hf, 2))
    for checkpoint in (from_hf, from_meta):
        assert checkpoint.config.tied_embeddings
        assert "output.weight" not in tensors_of(checkpoint)


def head_of(directory: Path) -> tuple[Tensor, Tensor]:
    """Embedding and head as transformers loads them."""
    model = LlamaForCausalLM.from_pretrained(directory)
    return model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()


HEADS: dict[str, tuple[Callable[[dict[str, Tensor]], object], bool]] = {
    "another": (lambda t: t.update({HEAD: t[EMBEDDING].flip(0).contiguous()}), False),
    "another in its last row": (lambda t: t.update({HEAD: torch.cat([t[EMBEDDING][:-1], torch.ones(1, 64)])}), False),
    "the same": (lambda t: t.update({HEAD: t[EMBEDDING].clone()}), True),
    "rounded": (lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}), False),
    "alone": (lambda t: t.update({HEAD: t.pop(EMBEDDING)}), True),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_stored_in_a_tied_model_counts_as_in_transformers(head: str, tmp_path: Path) -> None:
    change, tied = HEADS[head]
    directory = hf_directory(tmp_path / "tied", hf_model(tie_word_embeddings=True))
    change_tensors(directory, change)
    checkpoint, (embedding, theirs) = open_checkpoint(directory), head_of(directory)
    assert checkpoint.config.tied_embeddings == tied
    tensors = tensors_of(checkpoint)
    assert torch.equal(tensors["tok_embeddings.weight"], embedding)
    assert torch.equal(tensors["tok_embeddings.weight" if tied else "output.weight"], theirs)
    if tied:
        assert checkpoint.warnings == ()
    else:
        [said] = checkpoint.warnings
        assert "sets tie_word_embeddings, but lm_head.weight is stored and differs" in said


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "tied", hf_model(tie_word_embeddings=True))
    change_tensors(directory, lambda tensors: tensors.update({HEAD: torch.ones(10, 64)}))
    assert "lm_head.weight has shape [10, 64], but config.json asks for [300, 64]" in refusal(directory)


def test_rope_that_is_described_twice_is_warned_of(hf: Path, tmp_path: Path) -> None:
    directory = copy(hf, tmp_path)
    change_json(directory / "config.json", rope_scaling={"rope_type": "linear", "factor": 2.0})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.rope_scaling is not None
    assert "both rope_scaling and rope_parameters" in checkpoint.warnings[0]


def sharded(directory: Path, value: float) -> Path:
    """An older save beside the model: an index and shards whose final norm is ``value``."""
    old = hf_directory(directory.parent / "old", hf_model(vocab_size=VOCABULARY), max_shard_size="100KB")
    for path in [*old.glob("model-*.safetensors"), old / INDEX]:
        shutil.copy(path, directory / path.name)
    for path in directory.glob("model-*.safetensors"):
        if "model.norm.weight" in (tensors := load_file(path)):
            path.unlink()
            save_file({**tensors, "model.norm.weight": torch.full((64,), value)}, path, metadata={"format": "pt"})
    return directory


def final_norm(directory: Path) -> float:
    return float(tensors_of(open_checkpoint(directory))["norm.weight"][0])


def transformers_norm(directory: Path) -> float:
    return float(LlamaForCausalLM.from_pretrained(directory).model.norm.weight.detach()[0])


def test_the_single_file_beats_an_older_index_as_in_transformers(hf: Path, tmp_path: Path) -> None:
    directory = sharded(copy(hf, tmp_path), 7.0)
    assert final_norm(directory) == transformers_norm(directory) == 1.0
    change_json(directory / "config.json", transformers_weights=INDEX)
    assert final_norm(directory) == transformers_norm(directory) == 7.0
    for path in directory.glob("model-*.safetensors"):
        path.unlink()
    assert "names model-00001-of" in refusal(directory)
    change_json(directory / "config.json", drop=("transformers_weights",))
    assert final_norm(directory) == transformers_norm(directory) == 1.0


@pytest.mark.parametrize("named", ["../model.safetensors", 3, "gone.safetensors"])
def test_a_weights_file_that_config_json_names_lies_in_the_directory(named: Any, hf: Path, tmp_path: Path) -> None:
    directory = copy(hf, tmp_path)
    change_json(directory / "config.json", transformers_weights=named)
    assert "transformers_weights must name a file in it" in (said := refusal(directory)) or "lacks gone" in said


def test_parameters_and_gradients_of_a_pth_file_are_its_numbers(meta: Path, tmp_path: Path) -> None:
    directory = copy(meta, tmp_path)
    for path in directory.glob("*.pth"):
        change_shard(path, lambda shard: shard.update({name: torch.nn.Parameter(t) for name, t in shard.items()}))
    with torch.enable_grad():
        tensors = tensors_of(open_checkpoint(directory))
    assert_same(tensors, tensors_of(open_checkpoint(meta)))
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_rope_freqs_of_old_meta_checkpoints_are_ignored(meta: Path, tmp_path: Path) -> None:
    directory = copy(meta, tmp_path)
    change_shard(directory / "consolidated.00.pth", lambda shard: shard.update({"rope.freqs": torch.zeros(12)}))
    assert_same(tensors_of(open_checkpoint(directory)), tensors_of(open_checkpoint(meta)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reading_converts_the_dtype(dtype: torch.dtype, hf: Path, meta: Path) -> None:
    whole = tensors_of(open_checkpoint(hf))
    for directory in (hf, meta):
        converted = tensors_of(open_checkpoint(directory), dtype)
        assert_same(converted, {name: tensor.to(dtype) for name, tensor in whole.items()})


def test_the_dtype_is_the_matrices(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "tiny", hf_model(), dtype=torch.bfloat16)
    change_tensors(directory, lambda t: t.update({k: v.float() for k, v in t.items() if "norm" in k}))
    assert open_checkpoint(directory).dtype == torch.bfloat16


def test_the_dtype_of_a_mixture_holds_all_of_it(tmp_path: Path) -> None:
    directory = hf_directory(tmp_path / "tiny", hf_model(), dtype=torch.bfloat16)
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float16)}))
    assert open_checkpoint(directory).dtype == torch.float32


def test_several_threads_read_at_once(hf: Path, meta: Path) -> None:
    for checkpoint in (open_checkpoint(hf), open_checkpoint(meta), SyntheticCheckpoint(BUILTIN, seed=0, dtype=FLOAT)):
        tensors = [(name, torch.empty(shape)) for name, shape in all_tensors(checkpoint.config)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda item, checkpoint=checkpoint: checkpoint.read_into(*item), tensors))
        for name, tensor in tensors[::3]:
            again = torch.empty_like(tensor)
            checkpoint.read_into(name, again)
            assert torch.equal(tensor, again)


def test_reading_makes_no_second_copy(tmp_path: Path) -> None:
    size = 64 << 20
    config = {"vocab_size": size // 64 // 4, "num_hidden_layers": 1}
    directory = hf_directory(tmp_path / "wide", hf_model(**config))
    source = (
        "import sys, torch; from pathlib import Path; from llama.checkpoint import open_checkpoint\n"
        "def anonymous():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1])); c = checkpoint.config\n"
        "out = torch.zeros(c.vocab_size, c.dim); before = anonymous()\n"
        "checkpoint.read_into('tok_embeddings.weight', out); print(anonymous() - before)\n"
    )
    for place in (directory, meta_directory(tmp_path / "meta", open_checkpoint(directory))):
        printed = subprocess.run([sys.executable, "-c", source, place], cwd=ROOT, check=True, capture_output=True)
        assert int(printed.stdout) * 1024 < size / 4


def test_a_changed_file_has_another_digest(hf: Path, tmp_path: Path) -> None:
    directory = copy(hf, tmp_path)
    before = open_checkpoint(directory).sources()
    assert before == open_checkpoint(hf).sources()
    change_tensors(directory, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert open_checkpoint(directory).sources() != before


def test_a_tensor_of_another_shape_or_name_is_not_read(hf: Path, meta: Path) -> None:
    for checkpoint in (open_checkpoint(hf), open_checkpoint(meta), synthetic("Llama-3.2-1B:layers=1")):
        with pytest.raises(UnusableInput, match="shape"):
            checkpoint.read_into("norm.weight", torch.empty(3))
        with pytest.raises(UnusableInput, match="no tensor"):
            checkpoint.read_into("layers.9.attention.wq.weight", torch.empty(96, 64))


def test_a_model_in_the_working_directory_has_a_name(hf: Path, meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in (hf, meta):
        monkeypatch.chdir(directory)
        assert open_checkpoint(Path()).config.name == directory.name


# Damage and what does not run, each with its sentence


def copy(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to / "copied"))


def change_json(path: Path, *, drop: tuple[str, ...] = (), **fields: Any) -> None:
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**content, **fields}))


def change_shard(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def cut(path: Path, share: float = 0.6) -> None:
    os.truncate(path, int(path.stat().st_size * share))


Change = Callable[[Path], object]
Q0 = "model.layers.0.self_attn.q_proj.weight"
W1 = "layers.0.feed_forward.w1.weight"


def instead(path: Path, make: Callable[[Path], object]) -> None:
    """Another kind of thing in place of a file."""
    path.unlink()
    make(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def index_alone(directory: Path, text: str) -> None:
    (directory / "model.safetensors").unlink()
    (directory / INDEX).write_text(text)


def only_gguf(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model.Q4_K_M.gguf")


HF_DAMAGE: dict[str, tuple[Change, str]] = {
    "truncated": (lambda d: cut(d / "model.safetensors"), "model.safetensors is damaged or cut short"),
    "rubbish": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 999), "damaged or cut short"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged or cut short"),
    "git-lfs pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds no .safetensors file"),
    "pickled": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin but no .safetensors file; convert it first",
    ),
    "missing tensor": (lambda d: change_tensors(d, lambda t: t.pop(Q0)), f"has no tensor {Q0}"),
    "missing head": (lambda d: change_tensors(d, lambda t: t.pop("lm_head.weight")), "has no tensor lm_head.weight"),
    "wrong shape": (
        lambda d: change_json(d / "config.json", intermediate_size=192),
        "mlp.gate_proj.weight has shape [160, 64], but config.json asks for [192, 64]",
    ),
    "too few layers": (lambda d: change_json(d / "config.json", num_hidden_layers=5), "has no tensor model.layers.4."),
    "integers": (lambda d: change_tensors(d, lambda t: t.update({Q0: t[Q0].to(torch.int8)})), "is of dtype I8"),
    "float8": (
        lambda d: change_tensors(d, lambda t: t.update({Q0: t[Q0].to(torch.float8_e4m3fn)})),
        "is of dtype F8_E4M3",
    ),
    "bias": (
        lambda d: change_tensors(d, lambda t: t.update({Q0.replace("weight", "bias"): torch.zeros(96)})),
        "q_proj.bias belongs to no plain LLaMA",
    ),
    "LoRA": (lambda d: (d / "adapter_config.json").write_text("{}"), "LoRA adapter; merge it"),
    "GPTQ of old": (
        lambda d: (d / "quantize_config.json").write_text("{}"),
        "quantize_config.json: field bits is missing",
    ),
    "AWQ of old": (lambda d: (d / "quant_config.json").write_text("{}"), "quant_config.json: field bits is missing"),
    "quantised without a word": (
        lambda d: change_tensors(d, lambda t: t.update({Q0.replace("weight", "qweight"): torch.zeros(2)})),
        "q_proj.qweight belongs to a quantised model, but quantization_config in config.json is missing",
    ),
    "quantised otherwise": (
        lambda d: change_json(d / "config.json", quantization_config={"quant_method": "bitsandbytes", "bits": 4}),
        "the method 'bitsandbytes' (4 bits) does not run here; AWQ",
    ),
    "no GGUF file": (only_gguf, "model.Q4_K_M.gguf is damaged (it does not begin as a GGUF file does)"),
    "endless layers": (
        lambda d: change_json(d / "config.json", num_hidden_layers=10**30),
        "num_hidden_layers must be at most",
    ),
    "a number beyond floats": (
        lambda d: (d / "config.json").write_text('{"rope_theta": 1e999}'),
        "config.json is damaged (no JSON: ",
    ),
    "deep nesting": (lambda d: (d / "config.json").write_text("[" * 99999), "config.json is damaged (no JSON"),
    "config is a pipe": (lambda d: instead(d / "config.json", pipe), "it is a pipe, not a file"),
    "config is endless": (lambda d: instead(d / "config.json", zeros), "it is a device, not a file"),
    "config is a directory": (lambda d: instead(d / "config.json", Path.mkdir), "it is a directory, not a file"),
    "weights are a pipe": (lambda d: instead(d / "model.safetensors", pipe), "it is a pipe, not a file"),
    "weights are a directory": (lambda d: instead(d / "model.safetensors", Path.mkdir), "it is a directory, not a"),
    "weights are endless": (lambda d: instead(d / "model.safetensors", zeros), "it is a device, not a file"),
    "index is a pipe": (
        lambda d: ((d / "model.safetensors").unlink(), os.mkfifo(d / INDEX)),
        "it is a pipe, not a file",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "neither params.json (Meta) nor config.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json is damaged"),
    "config of another kind": (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object"),
    "other architecture": (
        lambda d: change_json(d / "config.json", architectures=["Qwen2ForCausalLM"]),
        "Qwen2ForCausalLM does not run here",
    ),
    "index of nothing": (
        lambda d: index_alone(d, '{"weight_map": {}}'),
        "has no weight_map",
    ),
    "index with a missing shard": (
        lambda d: index_alone(d, '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        "names model-00002-of-00002.safetensors, which is not there",
    ),
}

META_DAMAGE: dict[str, tuple[Change, str]] = {
    "truncated": (lambda d: cut(d / "consolidated.01.pth"), "consolidated.01.pth is damaged or cut short"),
    "rubbish": (lambda d: (d / "consolidated.01.pth").write_bytes(b"\xff" * 999), "consolidated.01.pth is damaged"),
    "empty": (lambda d: (d / "consolidated.00.pth").write_bytes(b""), "consolidated.00.pth is damaged"),
    "git-lfs pointer": (
        lambda d: (d / "consolidated.00.pth").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "first shard missing": (lambda d: (d / "consolidated.00.pth").unlink(), "lacks consolidated.00.pth"),
    "last shard missing": (lambda d: (d / "consolidated.01.pth").unlink(), "params.json, over 1 shard, asks for"),
    "no shards": (
        lambda d: [path.unlink() for path in d.glob("*.pth")],
        "params.json but no consolidated.NN.pth",
    ),
    "nine shards": (
        lambda d: [shutil.copy(d / "consolidated.00.pth", d / f"consolidated.{n:02d}.pth") for n in range(2, 9)],
        "has 9 shards; at most 8",
    ),
    "no params": (lambda d: (d / "params.json").unlink(), "params.json is missing beside the shards"),
    "params without dim": (
        lambda d: change_json(d / "params.json", drop=("dim",)),
        "params.json: field dim is missing",
    ),
    "quantised": (
        lambda d: change_json(d / "params.json", quantization_args={"group_size": 32}),
        "sets quantization_args",
    ),
    "other vocabulary": (lambda d: change_json(d / "params.json", vocab_size=400), "asks for [200, 64]"),
    "uneven": (lambda d: change_json(d / "params.json", vocab_size=401), "cannot be cut in 2 shards"),
    "missing tensor": (
        lambda d: change_shard(d / "consolidated.01.pth", lambda s: s.pop("layers.2.ffn_norm.weight")),
        "consolidated.01.pth has no tensor layers.2.ffn_norm.weight",
    ),
    "head in one shard only": (
        lambda d: change_shard(d / "consolidated.01.pth", lambda s: s.pop("output.weight")),
        "consolidated.01.pth has no tensor output.weight",
    ),
    "no embedding": (
        lambda d: change_shard(d / "consolidated.00.pth", lambda s: s.pop("tok_embeddings.weight")),
        "has no tensor tok_embeddings.weight",
    ),
    "flat embedding": (
        lambda d: change_shard(d / "consolidated.00.pth", lambda s: s.update({"tok_embeddings.weight": torch.ones(4)})),
        "tok_embeddings.weight is no matrix",
    ),
    "integers": (
        lambda d: change_shard(
            d / "consolidated.01.pth",
            lambda s: s.update({"layers.1.feed_forward.w2.weight": torch.zeros(64, 80, dtype=torch.int8)}),
        ),
        "layers.1.feed_forward.w2.weight is of dtype int8",
    ),
    "LoRA": (
        lambda d: change_shard(
            d / "consolidated.00.pth", lambda s: s.update({"layers.0.attention.wq.lora_a.weight": torch.zeros(2)})
        ),
        "LoRA adapters have to be merged",
    ),
    "sparse": (
        lambda d: change_shard(d / "consolidated.01.pth", lambda s: s.update({W1: s[W1].to_sparse()})),
        f"{W1} is a sparse tensor",
    ),
    "sparse by rows": (
        lambda d: change_shard(d / "consolidated.01.pth", lambda s: s.update({W1: s[W1].to_sparse_csr()})),
        f"{W1} is a sparse tensor",
    ),
    "no numbers": (
        lambda d: change_shard(d / "consolidated.01.pth", lambda s: s.update({W1: s[W1].to("meta")})),
        f"{W1} is on the meta device, a shape without numbers",
    ),
    "quantised by torch": (
        lambda d: change_shard(
            d / "consolidated.01.pth",
            lambda s: s.update({W1: torch.quantize_per_tensor(s[W1].float(), 0.1, 0, torch.qint8)}),
        ),
        f"{W1} is of dtype qint8",
    ),
    "endless layers": (lambda d: change_json(d / "params.json", n_layers=10**30), "n_layers must be at most"),
    "params are a pipe": (lambda d: instead(d / "params.json", pipe), "it is a pipe, not a file"),
    "a shard is a pipe": (lambda d: instead(d / "consolidated.01.pth", pipe), "it is a pipe, not a file"),
    "a shard is a directory": (lambda d: instead(d / "consolidated.01.pth", Path.mkdir), "it is a directory"),
    "a shard is endless": (lambda d: instead(d / "consolidated.00.pth", zeros), "it is a device, not a file"),
    "a list": (lambda d: torch.save([1], d / "consolidated.00.pth"), "holds no dictionary of tensors"),
    "objects": (lambda d: torch.save({"a": Path("x")}, d / "consolidated.00.pth"), "other things than tensors"),
    "old torch format": (
        lambda d: torch.save({"a": torch.ones(3)}, d / "consolidated.00.pth", _use_new_zipfile_serialization=False),
        "torch before 1.6",
    ),
}


@pytest.mark.parametrize("damage", HF_DAMAGE)
def test_a_damaged_hf_directory_is_refused_with_a_sentence(damage: str, hf: Path, tmp_path: Path) -> None:
    change, said = HF_DAMAGE[damage]
    directory = copy(hf, tmp_path)
    change(directory)
    assert said in refusal(directory)


@pytest.mark.parametrize("damage", META_DAMAGE)
def test_a_damaged_meta_directory_is_refused_with_a_sentence(damage: str, meta: Path, tmp_path: Path) -> None:
    change, said = META_DAMAGE[damage]
    directory = copy(meta, tmp_path)
    change(directory)
    assert said in refusal(directory)


FLIPS = st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4)
FILES = ["params.json", "consolidated.01.pth", "config.json", "model.safetensors"]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(FILES), flips=FLIPS)
def test_flipped_bytes_give_a_model_or_a_sentence(
    file: str, flips: list[tuple[int, int]], hf: Path, meta: Path, tmp_path: Path
) -> None:
    source, directory = (hf if (hf / file).exists() else meta), tmp_path / "flipped"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    content = bytearray((directory / file).read_bytes())
    for place, value in flips:
        content[place % len(content)] = value
    (directory / file).write_bytes(content)
    with contextlib.suppress(UnusableInput):
        tensors_of(open_checkpoint(directory))


def test_places_that_hold_no_model_are_refused(hf: Path, tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "this is no directory" in refusal(hf / "config.json")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert "model.gguf is damaged (it ends within its header" in refusal(gguf)
    gguf.unlink()
    assert "neither params.json (Meta) nor config.json (Hugging Face) nor a .gguf file is in it" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter alone" in refusal(tmp_path)


# Synthetic weights


def synthetic(spec: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    return synthetic_checkpoint(spec, seed=seed, dtype=dtype)


def read(checkpoint: Checkpoint, name: str) -> Tensor:
    out = torch.empty(dict(all_tensors(checkpoint.config))[name], dtype=checkpoint.dtype)
    checkpoint.read_into(name, out)
    return out


WQ, W2 = "layers.0.attention.wq.weight", "layers.0.feed_forward.w2.weight"


def test_synthetic_weights_are_the_same_on_every_machine() -> None:
    """numpy's Mersenne twister, whole-number sums, one rounding: nothing that depends on a processor."""
    drawn = np.random.RandomState(7).randint(0, 2**32, size=(4, BLOCK_VALUES), dtype=np.uint32) % 2**15
    sums = drawn.astype(np.int64).sum(0) - 2 * (2**15 - 1)
    block = sums.astype(np.float32) / np.float32(2**15 * math.sqrt(1 / 3)) / np.float32(math.sqrt(2048))
    weight = read(synthetic("Llama-3.2-1B:layers=1", seed=7, dtype=torch.float32), WQ).numpy().ravel()
    start = int.from_bytes(hashlib.sha256(f"7 {WQ}".encode()).digest()[:8], "little") % BLOCK_VALUES
    assert np.array_equal(weight, np.resize(np.roll(block, -start), weight.size))


def test_logits_of_80_synthetic_layers_are_of_the_order_of_1() -> None:
    config = dataclasses.replace(BUILTIN, n_layers=80)
    checkpoint = SyntheticCheckpoint(config, seed=0, dtype=torch.bfloat16)
    cpu = torch.device("cpu")
    model = Transformer(config, TensorWeights(checkpoint, cpu, torch.bfloat16), cpu, 16)
    batch, kv = prefill_batch([[256, 5, 9]], range(1), cpu), KVCache(config, 1, 16, cpu, torch.bfloat16)
    logits = model.forward(batch, kv, chunk_tokens=16, logits="all").float()
    assert logits.isfinite().all()
    assert 0.2 < logits.std() < 5


def test_synthetic_weights_follow_seed_and_name() -> None:
    first = read(synthetic("Llama-3.2-1B:layers=1"), WQ)
    assert torch.equal(first, read(synthetic("Llama-3.2-1B:layers=2"), WQ))
    assert not torch.equal(first, read(synthetic("Llama-3.2-1B:layers=1", seed=1), WQ))
    assert not torch.equal(first, read(synthetic("Llama-3.2-1B:layers=2"), WQ.replace("0", "1", 1)))


def test_synthetic_rows_differ_and_norms_are_near_one() -> None:
    checkpoint = synthetic("Llama-3.2-1B:layers=1", dtype=torch.float32)
    weight = read(checkpoint, W2)
    assert torch.unique(weight, dim=0).shape[0] == weight.shape[0]
    assert abs(weight.std().item() * 2048**0.5 - 1) < 0.01
    assert abs(weight.mean().item()) < 1e-3
    norm = read(checkpoint, "norm.weight")
    assert 0.8 < norm.min() < norm.max() < 1.2


def test_synthetic_sources_tell_recipes_apart() -> None:
    same = {synthetic("Llama-3.2-1B:layers=1").sources() for _ in range(2)}
    others = {synthetic("Llama-3.2-1B:layers=2").sources(), synthetic("Llama-3.2-1B:layers=1", seed=1).sources()}
    assert len(same) == 1
    assert len(same | others) == 3


def test_layers_are_counted_as_asked() -> None:
    assert synthetic("Llama-3.1-8B").config == PRESETS["Llama-3.1-8B"]
    assert synthetic("Llama-3.1-8B:layers=120").config.n_layers == 120


@pytest.mark.parametrize(
    "option",
    [":", ":layers", ":layers=", ":layers=0", ":layers=-1", ":layers=2.0", ":layers=²", ":heads=2", ":layers=1:"],
)
def test_other_options_than_layers_are_refused(option: str) -> None:
    with pytest.raises(UnusableInput, match="only :layers=N and :cycle are understood"):
        synthetic("Llama-3.1-8B" + option)


@pytest.mark.parametrize(("option", "meant"), [("layer=16", "layers="), ("layers", "layers="), ("cycles", "cycle")])
def test_a_misspelled_option_of_a_synthetic_model_is_answered_with_the_nearest(option: str, meant: str) -> None:
    with pytest.raises(UnusableInput, match=f"did you mean {meant}\\?$"):
        synthetic(f"Llama-3.1-8B:{option}")


def test_an_unknown_preset_is_refused_with_where_the_known_ones_are() -> None:
    with pytest.raises(UnusableInput, match=r"'Llama-9-1T' is no known model.*--list-models"):
        synthetic("Llama-9-1T")


def test_more_synthetic_layers_than_memory_could_describe_are_refused() -> None:
    with pytest.raises(UnusableInput, match="n_layers must be at most 10000"):
        synthetic("Llama-3.1-8B:layers=999999")


# The built-in model


def test_the_built_in_model_is_made_once_and_is_an_hf_directory(tmp_path: Path) -> None:
    checkpoint = builtin_checkpoint(tmp_path / "new" / "cache")
    assert checkpoint.directory is not None
    stamp = (checkpoint.directory / "model.safetensors").stat().st_mtime_ns
    again = builtin_checkpoint(tmp_path / "new" / "cache")
    assert (checkpoint.directory / "model.safetensors").stat().st_mtime_ns == stamp
    assert again.config == checkpoint.config == BUILTIN
    assert checkpoint.dtype == torch.bfloat16
    assert [path.name for path in (tmp_path / "new" / "cache").iterdir()] == [BUILTIN.name]
    for tensor in tensors_of(checkpoint).values():
        assert tensor.isfinite().all()


def test_two_processes_may_make_the_built_in_model_at_once(tmp_path: Path) -> None:
    source = "import sys; from pathlib import Path; from llama.checkpoint import builtin_checkpoint as b\n"
    source += "print(b(Path(sys.argv[1])).sources()[0].digest)"
    racing = [
        subprocess.Popen([sys.executable, "-c", source, tmp_path / "cache"], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    digests = {process.communicate()[0] for process in racing}
    assert all(process.returncode == 0 for process in racing)
    assert len(digests) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [BUILTIN.name]


def test_a_full_disk_is_told_with_what_the_built_in_model_takes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DoesNotFit, match=r"takes 0\.08 GB in .*: No space left on device; make room"):
        builtin_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_making_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llama.checkpoint.builtin.os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_built_in_model_says_how_to_make_it_anew(tmp_path: Path) -> None:
    directory = builtin_checkpoint(tmp_path).directory
    assert directory is not None
    cut(directory / "model.safetensors")
    with pytest.raises(UnusableInput, match="delete that directory"):
        builtin_checkpoint(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnusableInput, match="name another --cache-dir"):
        builtin_checkpoint(tmp_path / "file")
