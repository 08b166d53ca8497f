"""GGUF checkpoints: every type as the gguf package decodes it, the shape from the metadata, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llama.checkpoint import GGUFCheckpoint, open_checkpoint
from llama.checkpoint.gguf import gguf_name
from llama.checkpoint.gguf_file import NAMES, SIZES
from llama.config import PRESETS
from llama.llm import LLaMA
from llama.model import rotary_table
from llama.names import BY_COLUMNS
from llama.rope import RopeScaling
from tests.gguf_files import CONFIG, cut_of, dequantised, gguf_of, mixed, random_tensors, typed, write_gguf
from tests.tiny import LLAMA31_ROPE, hf_directory, hf_model, tensors_of
from wsm.errors import UnusableInput
from wsm.formats import registry
from wsm.layout.model import Shard

MIX = {"attention.wq.weight": "q5_K", "feed_forward.w1.weight": "F16", "tok_embeddings.weight": "q8_0"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_tensors(), CONFIG)


def refusal(path: Path) -> str:
    with pytest.raises(UnusableInput) as caught:
        open_checkpoint(path)
    return str(caught.value)


# -- weights


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *registry.BLOCK_TYPES])
def test_every_type_is_read_as_the_gguf_package_decodes_it(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, lambda name: kind)
    checkpoint, expected = open_checkpoint(path), dequantised(path)
    for dtype in (torch.float32, torch.bfloat16):
        for name, found in tensors_of(checkpoint, dtype).items():
            assert torch.equal(found, expected[gguf_name(name)].to(dtype)), name
    assert checkpoint.dtype == {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    matrices = 7 * CONFIG.n_layers if kind in registry.BLOCK_TYPES else 0
    assert len(checkpoint.formats.by_tensor if checkpoint.formats else {}) == matrices


def test_a_mix_names_its_formats_and_plain_matrices_stay_plain(tmp_path: Path) -> None:
    kinds = {name: next((k for end, k in MIX.items() if name.endswith(end)), "q4_K") for name in random_tensors()}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, kinds.__getitem__))
    assert checkpoint.formats is not None
    assert checkpoint.formats.name == "q4_K+q5_K"
    assert checkpoint.native("layers.1.feed_forward.w1.weight") is None
    assert checkpoint.native("layers.1.attention.wq.weight") == "q5_K"


def test_blocks_are_taken_byte_for_byte_and_of_a_rank_its_part(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    raw = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(tiny).tensors}
    for rank in (0, 1):
        share = checkpoint.share(Shard(rank, 2))
        for name in ("layers.2.attention.wk.weight", "layers.0.feed_forward.w2.weight", "layers.1.attention.wv.weight"):
            weight_format = registry.get(mixed(name))
            rows, columns = (
                size // (2 if axis == name.endswith(BY_COLUMNS) else 1)
                for axis, size in enumerate(random_tensors()[name].shape)
            )
            planes = share.encode(name, (rows, columns), torch.bfloat16, weight_format)
            assert planes is not None
            assert torch.equal(planes["blocks"], cut_of(name, raw[gguf_name(name)], rank, 2))
            out = torch.empty(rows, columns)
            share.read_into(name, out)
            assert torch.equal(out, cut_of(name, dequantised(tiny)[gguf_name(name)], rank, 2))


def llama_cpp_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter puts q and k of Hugging Face's models."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def converted(path: Path, model: LlamaForCausalLM, **more: Any) -> Path:
    """A file of a transformers model's own tensors, as llama.cpp's converter names and orders them."""
    checkpoint = open_checkpoint(hf_directory(path.parent / "hf", model))
    named, config, tensors = model.state_dict(), model.config, {}
    for name in tensors_of(checkpoint):
        from llama.checkpoint.hf import hf_name

        weight = named[hf_name(name)].float()
        heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}.get(name.split(".")[-2])
        tensors[name] = llama_cpp_order(weight, heads) if heads else weight
    return write_gguf(path, tensors, checkpoint.config, lambda name: "F32", **more)


def test_logits_are_those_of_transformers_q_and_k_being_in_order_already(tmp_path: Path) -> None:
    model = hf_model()
    path = converted(tmp_path / "m.gguf", model)
    with LLaMA.build(path, mode="full", device="cpu", max_seq_len=64) as llm:
        ours = llm.logits([[5, 6, 7, 200, 9]])
    with torch.no_grad():
        theirs = model(torch.tensor([[5, 6, 7, 200, 9]])).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_an_absent_head_is_the_embedding(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in random_tensors().items() if name != "output.weight"}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, CONFIG))
    assert checkpoint.config.tied_embeddings
    assert set(tensors_of(checkpoint)) == set(tensors)


# -- the shape


def test_rope_factors_in_a_tensor_are_llama_31s_scaling(tmp_path: Path) -> None:
    model = hf_model(rope_scaling=LLAMA31_ROPE)
    config = open_checkpoint(hf_directory(tmp_path / "hf", model)).config
    factors = []  # as llama.cpp's converter computes them
    for place in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (place / config.head_dim)
        smooth = min(1.0, max(0.0, (64 / wavelength - 1.0) / 3.0))
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    path = gguf_of(
        tmp_path / "m.gguf", open_checkpoint(tmp_path / "hf"), extra={"rope_freqs.weight": torch.tensor(factors)}
    )
    scaled = open_checkpoint(path).config
    assert scaled.rope_scaling is not None
    assert scaled.rope_scaling.kind == "factors"
    expected = rotary_table(config, 100, torch.device("cpu"))
    assert torch.allclose(rotary_table(scaled, 100, torch.device("cpu")), expected, atol=1e-5)
    assert type(config).from_json(scaled.to_json()) == scaled


def test_older_descriptions_of_scaled_models_are_read_and_written_as_before() -> None:
    described = PRESETS["Llama-3.1-8B"].to_json()
    assert "factors" not in described["rope_scaling"]
    assert type(PRESETS["Llama-3.1-8B"]).from_json(described) == PRESETS["Llama-3.1-8B"]


def test_linear_scaling_is_read_in_both_spellings(tmp_path: Path) -> None:
    for fields in (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.factor": 4.0},  # llama.cpp: linear, where no type is named
    ):
        path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields=fields)
        assert open_checkpoint(path).config.rope_scaling == RopeScaling("linear", 4.0)
    fields = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields=fields)
    assert open_checkpoint(path).config.rope_scaling is None


def test_factors_that_change_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    fields = {
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.logit_scale": 1.0,
        "llama.expert_count": 0,
        "llama.use_parallel_residual": False,
    }
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields=fields)
    assert open_checkpoint(path).warnings == ()


def test_what_the_metadata_leaves_out_is_taken_from_the_tensors(tmp_path: Path) -> None:
    left_out = dict.fromkeys(
        ("llama.vocab_size", "llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count")
    )
    found = open_checkpoint(write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields=left_out)).config
    assert (found.vocab_size, found.head_dim) == (CONFIG.vocab_size, CONFIG.head_dim)


def test_a_field_that_is_not_known_is_warned_of(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields={"llama.attention.novelty": 3})
    assert "llama.attention.novelty is not known here" in open_checkpoint(path).warnings[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architecture": "qwen2"}, "architecture 'qwen2', which does not run here; 'llama' does"),
    "experts": ({"fields": {"llama.expert_count": 8}}, "mixture of experts"),
    "yarn": ({"fields": {"llama.rope.scaling.type": "yarn"}}, "RoPE scaling of type 'yarn' does not run here"),
    "scaled twice": (
        {"fields": {"llama.rope.scale_linear": 2.0}, "extra": {"rope_freqs.weight": torch.ones(32)}},
        "scales RoPE twice",
    ),
    "too few factors": ({"extra": {"rope_freqs.weight": torch.ones(3)}}, "3 factors of RoPE for 32 frequencies"),
    "a factor of 0": ({"extra": {"rope_freqs.weight": torch.zeros(32)}}, "impossible factors"),
    "long factors": (
        {"extra": {"rope_factors_long.weight": torch.ones(32)}},
        "rope_factors_long.weight, which a plain",
    ),
    "a bias": ({"extra": {"blk.0.attn_q.bias": torch.ones(256)}}, "blk.0.attn_q.bias belongs to no plain LLaMA"),
    "norms of heads": (
        {"extra": {"blk.0.attn_q_norm.weight": torch.ones(64)}},
        "holds tensor blk.0.attn_q_norm.weight",
    ),
    "an adapter": ({"fields": {"general.type": "adapter"}}, "holds no model but a 'adapter'"),
    "partial rotation": ({"fields": {"llama.rope.dimension_count": 32}}, "llama.rope.dimension_count is 32"),
    "heads by layer": ({"fields": {"llama.attention.head_count": [4, 4, 2]}}, "must be a whole number above 0, not [4"),
    "a text for a number": ({"fields": {"llama.block_count": "3"}}, "must be a whole number above 0, not '3'"),
    "no width": ({"fields": {"llama.embedding_length": None}}, "field embedding_length is missing"),
    "endless layers": ({"fields": {"llama.block_count": 2**31}}, "block_count must be at most"),
    "a window": ({"fields": {"llama.attention.sliding_window": 128}}, "sets llama.attention.sliding_window"),
    "a scaled embedding": ({"fields": {"llama.embedding_scale": 12.0}}, "sets llama.embedding_scale"),
    "more layers than it says": ({"fields": {"llama.block_count": 2}}, "holds tensor blk.2."),
    "fewer layers than it says": ({"fields": {"llama.block_count": 4}}, "has no tensor blk.3.attn_norm.weight"),
    "another width": (
        {"fields": {"llama.feed_forward_length": 256}},
        "has shape [512, 256], but its metadata asks for",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_run_here_is_refused_by_name(what: str, tmp_path: Path) -> None:
    given, said = REFUSED[what]
    assert said in refusal(write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, **given))


def test_names_and_sizes_of_types_are_those_of_the_gguf_package() -> None:
    numbers = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {number: name for number, name in enumerate(NAMES) if number in numbers} == {
        number: name for number, name in numbers.items() if number < len(NAMES)
    }
    sizes = {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] for kind in SIZES}
    assert sizes == SIZES


def test_types_that_ggml_has_not_yet_are_refused_by_number(tiny: Path, tmp_path: Path) -> None:
    content, name = bytearray(tiny.read_bytes()), b"blk.1.attn_output.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at] == gguf.GGMLQuantizationType.Q4_K
    for number, said in ((99, "number 99"), (4, "Q4_2"), (2**32 - 1, "number 4294967295")):
        content[at : at + 4] = number.to_bytes(4, "little")
        (tmp_path / "m.gguf").write_bytes(content)
        assert f"blk.1.attn_output.weight is of type {said}, which does not run here; F32," in refusal(
            tmp_path / "m.gguf"
        )


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q8_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "F64", "I8"])
def test_other_types_are_refused_by_name_with_those_that_run(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    weights, nbytes = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    from tests.gguf_files import metadata

    for key, value in metadata(CONFIG).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, tensor in random_tensors().items():
        values, found = typed(tensor, "q4_K")
        if name == "layers.1.attention.wo.weight":
            raw = np.zeros((256, 256 // weights * nbytes), np.uint8)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=number)
        else:
            writer.add_tensor(gguf_name(name), values, raw_dtype=found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refusal(tmp_path / "m.gguf")
    assert f"blk.1.attn_output.weight is of type {kind}, which does not run here; F32, F16, BF16, Q4_0," in said


# -- files


def test_a_split_model_is_one_whichever_part_or_directory_is_named(tiny: Path, tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, split_max_tensors=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 3
    expected = tensors_of(open_checkpoint(tiny))
    for named in (first, parts[2], tmp_path):
        checkpoint = open_checkpoint(named)
        assert checkpoint.config.name == "m"
        assert all(torch.equal(found, expected[name]) for name, found in tensors_of(checkpoint).items())
        assert [source.name for source in checkpoint.sources()] == [part.name for part in parts]
    shutil.copy(parts[1], parts[2])
    assert "part 1 of" in refusal(first)
    parts[2].unlink()
    assert f"{parts[2].name} is not there: the download is incomplete" in refusal(tmp_path)


def test_a_part_alone_and_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, split_max_tensors=7)
    alone = sorted(tmp_path.glob("*.gguf"))[1]
    assert "is part 1 of" in refusal(alone.rename(tmp_path / "alone.gguf"))


def test_a_directory_is_a_gguf_model_where_no_other_weights_are(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny, tmp_path / "a.gguf")
    assert isinstance(open_checkpoint(tmp_path), GGUFCheckpoint)
    (tmp_path / "config.json").write_text("{}")
    assert isinstance(open_checkpoint(tmp_path), GGUFCheckpoint)
    shutil.copy(tiny, tmp_path / "b.gguf")
    assert "holds several models: name one of a.gguf, b.gguf" in refusal(tmp_path)
    both = hf_directory(tmp_path / "both", hf_model())
    shutil.copy(tiny, both / "a.gguf")
    assert not isinstance(open_checkpoint(both), GGUFCheckpoint)
