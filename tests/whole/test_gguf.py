"""GGUF models through the whole program: the same bits in every mode, from file and store, alone and on ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoint import open_checkpoint
from llama.checkpoint.hf import hf_name, to_halves
from llama.llm import LLaMA
from tests.gguf_files import CONFIG, bpe_fields, random_tensors, write_gguf
from tests.ranks import answers, started
from tests.tiny import hf_model, tensors_of
from tests.whole.conftest import Run
from wsm.formats import registry

PROMPTS = [list(range(5, 45)), [7, 8, 9]]
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "cpu_cache_layers": 1, "prefetch_distance": 1, "warmup_layers": 1}
MODES = ("full", "preload", "stream", "mixed")
SMALL = ["--max-new-tokens", "3", "--temperature", "0", "--ignore-eos", "--device", "cpu", "--no-probe"]
RANKED = dataclasses.replace(CONFIG, head_dim=128)
"""Two ranks' columns are whole blocks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gguf")
    return write_gguf(home / "tiny.gguf", random_tensors(), CONFIG, fields=bpe_fields(CONFIG.vocab_size))


def answer_of(model: Path, mode: str, cache: Path, **config: Any) -> tuple[list[list[int]], Tensor]:
    config = {**PLACES, "cache_dir": cache, **config}
    with LLaMA.build(model, mode=mode, mode_config=config, device="cpu", max_seq_len=128, max_batch_size=2) as llm:
        tokens = llm.generate(PROMPTS, max_new_tokens=4, temperature=0.0, ignore_eos=True).tokens
        assert ("SSD" in llm.plan.way) == (mode == "mixed")
        return tokens, llm.logits([PROMPTS[0]])


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_every_mode_gives_the_same_bits_and_transformers_logits(dtype: str, model: Path, tmp_path: Path) -> None:
    found = {mode: answer_of(model, mode, tmp_path, dtype=dtype) for mode in MODES}
    for mode in MODES:
        assert found[mode][0] == found["full"][0]
        assert torch.equal(found[mode][1], found["full"][1])
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64, "vocab_size": 320}
    reference, config = hf_model(**wide), CONFIG
    named = {}
    for name, tensor in tensors_of(open_checkpoint(model)).items():
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
        named[hf_name(name)] = to_halves(tensor, heads) if heads else tensor
    reference.load_state_dict(named)
    with torch.no_grad():
        expected = reference(torch.tensor([PROMPTS[0]])).logits
    most = 1e-4 if dtype == "float32" else 0.05
    assert (found["full"][1] - expected).abs().max() <= most * expected.abs().max()


def test_full_decodes_at_load_where_there_is_room_and_in_every_pass_where_not(model: Path, tmp_path: Path) -> None:
    config = {**PLACES, "cache_dir": tmp_path}
    with LLaMA.build(model, mode="full", mode_config=config, device="cpu", max_seq_len=64) as llm:
        assert llm.plan.decoding.at_load
        roomy, most, chunk = llm.logits([PROMPTS[1]]), llm.plan.gpu_bytes, llm.plan.chunk_tokens
    config |= {"gpu_mem_gb": (most - 4096) / 2**30, "prefill_chunk_tokens": chunk}
    with LLaMA.build(model, mode="full", mode_config=config, device="cpu", max_seq_len=64) as llm:
        assert not llm.plan.decoding.at_load
        assert torch.equal(llm.logits([PROMPTS[1]]), roomy)


def test_ranks_share_blocks_where_cuts_lie_between_them(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_tensors(RANKED), RANKED)
    (tmp_path / "answers").mkdir()
    arguments = ([path], tmp_path / "cache", tmp_path / "answers", 2)
    with started(tmp_path / "said", 2, answers, lambda rank: arguments) as ranks:
        assert ranks.codes(180) == [0, 0], (tmp_path / "said" / "err0").read_text()
    found = [torch.load(tmp_path / "answers" / f"answers-2-{rank}.pt") for rank in range(2)]
    for mode in MODES:
        both = [of[f"tiny.gguf {mode}"]["logits"] for of in found]
        assert all(torch.equal(one, found[0]["tiny.gguf full"]["logits"]) for one in both)
    alone = answer_of(path, "full", tmp_path / "alone")[1]
    difference = (
        (found[0]["tiny.gguf full"]["logits"] - alone[:, : found[0]["tiny.gguf full"]["logits"].shape[1]]).abs().max()
    )
    assert difference <= 0.05 * alone.abs().max()


# -- the program


def test_a_run_names_the_mix_and_reads_text_with_the_files_own_tokenizer(run: Run, model: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "r.json", tmp_path / "t.json"
    flags = ["--checkpoints", model, "--cache-dir", tmp_path, "--mode", "mixed", "--cpu-cache-layers", "1", *SMALL]
    code, said, _ = run(*flags, "--gpu-cached-layers", "1", "--prompt", "abc 123", "--out-json", out, "--trace", trace)
    assert code == 0
    assert "weights in q4_K+q6_K, decoded by torch" in said
    result = json.loads(out.read_text())
    weights = result["weights"]
    assert (weights["weight_format"], weights["exact"]) == ("q4_K+q6_K", True)
    held = {each["weight_format"]: (each["matrices"], each["rest_bytes"]) for each in weights["by_format"]}
    q6 = CONFIG.n_layers * (128 * 256 + 256 * 512) // 256 * 210
    assert held["q6_K"] == (2 * CONFIG.n_layers, q6)
    assert held["q4_K"][0] == 5 * CONFIG.n_layers
    assert result["config"]["resolved"]["dtype"] == "bfloat16"
    assert result["prompt_lens"] == [1 + len("abc 123")]  # BOS, and bytes: the vocabulary has no merges of them
    kinds = [event["args"].get("kind") for event in json.loads(trace.read_text())["traceEvents"]]
    assert "weight_decode" in kinds
    [packed] = tmp_path.glob("*.wsm")
    assert "q4_K+q6_K" in packed.name


def test_another_format_beside_the_files_own_is_refused(run: Run, model: Path, tmp_path: Path) -> None:
    for asked in ("int4", "q4_K", "bf16"):
        code, _, said = run("--checkpoints", model, "--cache-dir", tmp_path, "--weight-format", asked, *SMALL)
        assert code == 2
        assert f"--weight-format {asked}: tiny is quantised already, in q4_K+q6_K, and runs as it is" in said


def test_a_store_holds_the_blocks_and_runs_with_and_without_the_file(run: Run, model: Path, tmp_path: Path) -> None:
    store = ["--manifest", tmp_path / "s.json"]
    code, said, _ = run("pack", "--checkpoints", model, "--to", tmp_path / "s.wsm", *store)
    assert code == 0
    assert "packing tiny in q4_K+q6_K:" in said
    assert run("verify", "--checkpoints", model, *store)[0] == 0
    formats = {
        tensor.get("format")
        for group in json.loads((tmp_path / "s.json").read_text())["groups"]
        for tensor in group["images"][0]["tensors"]
    }
    assert formats == {None, "q4_K", "q6_K"}
    expected = answer_of(model, "full", tmp_path)
    (tmp_path / "empty").mkdir()
    for place in (model, tmp_path / "empty"):
        for mode in ("stream", "mixed"):
            found = answer_of(place, mode, tmp_path, manifest=tmp_path / "s.json")
            assert found[0] == expected[0]
            assert torch.equal(found[1], expected[1])


def test_a_store_of_another_format_is_not_taken_for_the_files(run: Run, model: Path, tmp_path: Path) -> None:
    plain = write_gguf(tmp_path / "plain.gguf", random_tensors(), CONFIG, lambda name: "F32")
    store = ["--manifest", tmp_path / "s.json"]
    assert run("pack", "--checkpoints", plain, "--weight-format", "int8", "--to", tmp_path / "s.wsm", *store)[0] == 0
    code, _, said = run("--checkpoints", model, *store, "--cache-dir", tmp_path, *SMALL)
    assert code == 2
    assert "was made of an unquantised checkpoint, and this one is quantised in q4_K+q6_K: give the checkpoint" in said
    assert run("pack", "--checkpoints", model, "--to", tmp_path / "s.wsm", *store, "--yes")[0] == 0
    code, _, said = run("--checkpoints", plain, *store, "--cache-dir", tmp_path, *SMALL)
    assert code == 2
    assert "was made of a checkpoint that is quantised in q4_K+q6_K, and this one is not quantised" in said


def test_a_model_in_every_block_type_is_packed_and_read_back(tmp_path: Path) -> None:
    tensors, kinds = random_tensors(), dict[str, str]()
    for number, name in enumerate(name for name, tensor in tensors.items() if tensor.dim() == 2):
        kinds[name] = registry.BLOCK_TYPES[number % len(registry.BLOCK_TYPES)]
    home = tmp_path / ("long" * 50)
    home.mkdir()
    path = write_gguf(home / f"{'long' * 60}.gguf", tensors, CONFIG, lambda name: kinds.get(name, "F32"))
    mixed, full = (answer_of(path, mode, tmp_path) for mode in ("mixed", "full"))
    assert mixed[0] == full[0]
    assert torch.equal(mixed[1], full[1])


def test_ranks_that_would_part_blocks_are_refused_with_those_that_do_not(run: Run, model: Path, tmp_path: Path) -> None:
    code, _, said = run(
        "pack", "--checkpoints", model, "--tp", "2", "--to", tmp_path / "s", "--manifest", tmp_path / "m"
    )
    assert code == 2
    assert "cannot be cut for 2 ranks" in said
    assert "blocks of 256 weights" in said
    assert "--nproc-per-node 1" in said
    assert not (tmp_path / "s").exists()


def test_calibration_and_a_quality_against_itself_are_named(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abc " * 40)
    store = ["--to", tmp_path / "s.wsm", "--manifest", tmp_path / "s.json", "--cache-dir", tmp_path]
    code, _, said = run("pack", "--checkpoints", model, "--calibrate", tmp_path / "t.txt", *store)
    assert code == 2
    assert "--calibrate has no use for tiny, which is quantised already, in q4_K+q6_K, and packed as it is" in said
    assert not (tmp_path / "s.wsm").exists()
    read = ["quality", "--checkpoints", model, "--text", tmp_path / "t.txt", "--window", 16, "--windows", 1]
    read += ["--cache-dir", tmp_path, "--device", "cpu"]
    told = "the reference is this quantised model itself: --reference names the unquantised one"
    code, said, _ = run(*read)
    assert (code, told in said) == (0, True)
    plain = write_gguf(tmp_path / "plain.gguf", random_tensors(), CONFIG, lambda name: "F32")
    code, said, _ = run(*read, "--reference", plain)
    assert (code, told in said) == (0, False)


def test_plan_names_the_mix_and_no_format_that_the_file_is_not_in(run: Run, model: Path, tmp_path: Path) -> None:
    code, said, _ = run("plan", "--checkpoints", model, "--cache-dir", tmp_path, *SMALL[:-1])
    assert code == 0
    rows = said.split("the same in each weight format")[1].split("\n[")[0].splitlines()[2:]
    assert [row.split()[0] for row in rows if row.strip()] == ["q4_K+q6_K"]


def test_prompts_are_made_with_the_files_tokenizer(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    assert run("prompts", "--checkpoints", model, "--count", 2, "--tokens", 12, "--out", out)[0] == 0
    code, _, _ = run(
        "--checkpoints",
        model,
        "--cache-dir",
        tmp_path,
        "--prompts",
        out,
        "--mode",
        "full",
        *SMALL,
        "--out-json",
        tmp_path / "r.json",
    )
    assert code == 0
    assert json.loads((tmp_path / "r.json").read_text())["prompt_lens"] == [13]  # BOS before


def test_a_store_beside_the_file_is_packed_again_and_the_file_itself_never_written(run: Run, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_tensors(), CONFIG)
    before = path.read_bytes()
    pack = ["pack", "--checkpoints", path, "--manifest", tmp_path / "s.json", "--yes", "--to"]
    assert [run(*pack, tmp_path / "s.wsm")[0] for _ in range(2)] == [0, 0]
    code, _, said = run(*pack, path)
    assert code == 2
    assert "tiny.gguf is a file of the checkpoint itself" in said
    assert path.read_bytes() == before
