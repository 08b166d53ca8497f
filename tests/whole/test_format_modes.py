"""Every weight format in every mode: the same bits; `exact` those of bf16; and what the program says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llama.llm import LLaMA
from llama.parallel.world import ALONE
from tests.ranks import answer, answers, started
from tests.tiny import hf_directory, hf_model
from tests.whole.conftest import Run
from wsm.formats import registry

PROMPTS = [list(range(5, 45)), [7, 8, 9]]
PLACES: dict[str, Any] = {"gpu_cached_layers": 2, "cpu_cache_layers": 2, "prefetch_distance": 1, "warmup_layers": 1}
MODES = ("full", "preload", "stream", "mixed")
SMALL = ["--max-new-tokens", "3", "--temperature", "0", "--ignore-eos", "--device", "cpu", "--prompt-len", "20"]
Answer = tuple[list[list[int]], Tensor]


def uneven_model() -> LlamaForCausalLM:
    """In `exact`, images of all sizes: layers with many escapes, and matrices that stay plain."""
    model = hf_model(num_hidden_layers=6)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer, share in ((1, 0.1), (4, 0.04)):
            for weight in model.model.layers[layer].mlp.parameters():
                weight.mul_(torch.where(torch.rand(weight.shape, generator=generator) < share, 2.0**-40, 1.0))
        for weight in (model.model.layers[3].self_attn.k_proj.weight, model.model.layers[2].mlp.up_proj.weight):
            weight.mul_(2.0 ** torch.randint(-90, 0, weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("formats")
    hf_directory(home / "model", uneven_model(), dtype=torch.bfloat16)
    return home


def answer_of(home: Path, mode: str, weight_format: str, **config: Any) -> Answer:
    config = {**PLACES, "cache_dir": home / "cache", "weight_format": weight_format, **config}
    with LLaMA.build(
        home / "model", mode=mode, mode_config=config, device="cpu", max_seq_len=128, max_batch_size=2
    ) as llm:
        tokens = llm.generate(PROMPTS, max_new_tokens=4, temperature=0.0, ignore_eos=True).tokens
        if llm.manager is not None:
            assert llm.manager.memory.page_locked_peak_bytes == llm.plan.page_locked_bytes
        return tokens, llm.logits([PROMPTS[0]])


@pytest.fixture(scope="module")
def plain(home: Path) -> Answer:
    return answer_of(home, "full", "bf16")


@pytest.mark.parametrize("weight_format", registry.NAMES)
def test_every_mode_gives_the_same_bits_and_exact_those_of_bf16(weight_format: str, home: Path, plain: Answer) -> None:
    found = {mode: answer_of(home, mode, weight_format) for mode in MODES}
    # 40 tokens in chunks of 8: a group is decoded once a pass where there is room for it.
    found |= {f"{mode} in chunks": answer_of(home, mode, weight_format, prefill_chunk_tokens=8) for mode in MODES[1:3]}
    for mode in MODES:
        assert found[mode][0] == found["full"][0]
        assert torch.equal(found[mode][1], found["full"][1])
    assert torch.equal(found["stream in chunks"][1], found["preload in chunks"][1])
    same = torch.equal(found["full"][1], plain[1]) and found["full"][0] == plain[0]
    assert same == registry.get(weight_format).exact


@pytest.mark.parametrize("places", [{"gpu_cached_layers": 3}, {"gpu_cached_layers": 5}, {"embedding": "cpu"}])
@pytest.mark.parametrize("mode", ["stream", "mixed"])
def test_images_of_all_sizes_find_room_wherever_layers_lie(
    mode: str, places: dict[str, Any], home: Path, plain: Answer
) -> None:
    found = answer_of(home, mode, "exact", **places)
    assert found[0] == plain[0]
    assert torch.equal(found[1], plain[1])


def test_exact_that_does_not_fit_decoded_is_decoded_in_every_pass(home: Path, plain: Answer) -> None:
    config = {**PLACES, "cache_dir": home / "cache", "weight_format": "exact"}
    roomy = LLaMA.build(home / "model", mode="preload", mode_config=config, device="cpu", max_seq_len=128)
    with roomy:
        assert roomy.plan.decoding.at_load
        most = roomy.plan.gpu_bytes
    tight = {**config, "gpu_mem_gb": (most - 4096) / 2**30, "prefill_chunk_tokens": roomy.plan.chunk_tokens}
    for mode in ("preload", "full"):
        with LLaMA.build(home / "model", mode=mode, mode_config=tight, device="cpu", max_seq_len=128) as llm:
            assert not llm.plan.decoding.at_load
            assert llm.plan.decoded_bytes["decode"] > 0
            assert torch.equal(llm.logits([PROMPTS[0]]), plain[1])


@pytest.mark.parametrize("weight_format", ["exact", "int4", "q4_K"])
def test_synthetic_weights_need_no_store_but_where_the_ssd_is_read_and_give_the_same_bits(
    weight_format: str, tmp_path: Path
) -> None:
    logits = {}
    for mode, cpu_layers in [("mixed", 2), *((mode, 1) for mode in MODES)]:
        config = {**PLACES, "cache_dir": tmp_path, "synthetic": "Llama-3.2-1B:layers=2", "weight_format": weight_format}
        config |= {"gpu_cached_layers": 0, "cpu_cache_layers": cpu_layers}
        with LLaMA.build(None, mode=mode, mode_config=config, device="cpu", max_seq_len=32) as llm:
            logits[mode, cpu_layers] = llm.logits([[5, 6, 7]])
        assert bool(list(tmp_path.glob("*.wsm"))) == ((mode, cpu_layers) == ("mixed", 1))
    assert all(torch.equal(found, logits["full", 1]) for found in logits.values())
    config = {"cache_dir": tmp_path, "synthetic": "Llama-3.2-1B:layers=2"}
    with LLaMA.build(None, mode="full", mode_config=config, device="cpu", max_seq_len=32) as llm:
        assert torch.equal(llm.logits([[5, 6, 7]]), logits["full", 1]) == (weight_format == "exact")


def test_ranks_hold_a_share_of_each_format_and_agree(tmp_path: Path) -> None:
    model = hf_directory(tmp_path / "model", hf_model(hidden_size=128, intermediate_size=256, num_hidden_layers=3))
    for weight_format in ("exact", "int4"):
        home = tmp_path / weight_format
        (home / "answers").mkdir(parents=True)
        arguments = ([model], home / "cache", home / "answers", 2, weight_format)
        with started(home / "said", 2, answers, lambda rank, given=arguments: given) as ranks:
            assert ranks.codes(180) == [0, 0], (home / "said" / "err0").read_text()
        found = [torch.load(home / "answers" / f"answers-2-{rank}.pt") for rank in range(2)]
        for mode in MODES:
            assert all(torch.equal(of["model " + mode]["logits"], found[0]["model full"]["logits"]) for of in found)
        if weight_format == "exact":
            config = {**PLACES, "cache_dir": home / "cache", "dtype": "bfloat16"}
            alone = answer(model, "full", config, ALONE, PROMPTS)
            difference = (found[0]["model full"]["logits"] - alone["logits"]).abs().max()
            assert difference <= 0.05 * alone["logits"].abs().max()  # sums over ranks are rounded to bfloat16


# -- the program


def test_the_result_says_format_bytes_and_decoding(run: Run, home: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "r.json", tmp_path / "r.trace.json"
    flags = ["--checkpoints", home / "model", "--cache-dir", home / "cache", "--mode", "stream", *SMALL]
    code, said, _ = run(*flags, "--weight-format", "int4", "--out-json", out, "--trace", trace)
    assert code == 0
    assert "weights in int4, decoded by torch" in said
    assert "weights: int4, 0.000 GB at rest of 0.001 GB, decoding" in said
    result = json.loads(out.read_text())
    weights = result["weights"]
    assert (weights["weight_format"], weights["exact"]) == ("int4", False)
    assert 0 < weights["rest_bytes"] < weights["decoded_bytes"]
    assert weights["decode_ms"] > 0
    assert result["config"]["resolved"]["weight_format"] == "int4"
    assert result["ceilings"]["weight_decode"]["value"] > 0
    decode = result["phases"]["decode"]
    assert decode["decoded_weights"]["bytes"] == result["plan"]["weight_decode_bytes"] * decode["passes"]
    assert decode["bytes"]["weight_h2d"] == result["plan"]["bytes_per_pass"]["weight_h2d"] * decode["passes"]
    kinds = [event["args"].get("kind") for event in json.loads(trace.read_text())["traceEvents"]]
    assert "weight_decode" in kinds


def test_plan_has_a_line_for_each_format(run: Run, home: Path) -> None:
    code, said, _ = run("plan", "--checkpoints", home / "model", "--cache-dir", home / "cache", *SMALL)
    assert code == 0
    rows = {
        line.split()[0]: line.split()
        for line in said.split("the same in each weight format")[1].split("\n[")[0].splitlines()[2:]
    }
    assert tuple(rows) == ("bf16", *registry.NAMES)
    at_rest = {name: float(row[1]) for name, row in rows.items()}
    assert at_rest["int4"] < at_rest["int8"] < at_rest["exact"] < at_rest["bf16"]


def test_a_store_of_another_format_is_refused_with_the_pack_command(run: Run, home: Path, tmp_path: Path) -> None:
    model = ["--checkpoints", home / "model"]
    store = ["--manifest", tmp_path / "s.json"]
    assert run("pack", *model, "--weight-format", "int8", "--to", tmp_path / "s.wsm", *store)[0] == 0
    for asked, held in (("int4", "int8"), ("bf16", "int8")):
        code, _, said = run(*model, *store, "--weight-format", asked, *SMALL)
        assert code == 2
        assert f"holds the weights in {held}" in said
        assert f"pack --checkpoints {home / 'model'} --weight-format {asked} --to TARGET --manifest FILE" in said
    # Without the flag the store's own counts, in every mode.
    logits = []
    for mode in MODES:
        config = {**PLACES, "manifest": tmp_path / "s.json"}
        with LLaMA.build(home / "model", mode=mode, mode_config=config, device="cpu", max_seq_len=64) as llm:
            assert llm.inputs.format_name == "int8"
            logits.append(llm.logits([PROMPTS[0]]))
    assert all(torch.equal(of, logits[0]) for of in logits)
    assert torch.equal(logits[0], answer_of(home, "full", "int8")[1])
    assert run("verify", *store)[0] == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--weight-format", "int5"], "--weight-format"),
        (["--weight-format", "exact", "--dtype", "float16"], "--weight-format exact holds bfloat16"),
        (["--weight-format", "q4_K"], "--weight-format q4_K: blocks of q4_K come from a GGUF file"),
        (["--weight-format", "float16", "--dtype", "bfloat16"], "--weight-format float16 holds float16"),
    ],
)
def test_a_format_that_cannot_be_is_refused(flags: list[str], named: str, run: Run, home: Path) -> None:
    code, _, said = run("--checkpoints", home / "model", *flags, *SMALL)
    assert code == 2
    assert named in said


def test_a_checkpoint_is_not_packed_into_blocks(run: Run, home: Path, tmp_path: Path) -> None:
    store = ["--to", tmp_path / "s.wsm", "--manifest", tmp_path / "s.json"]
    code, _, said = run("pack", "--checkpoints", home / "model", "--weight-format", "q8_0", *store)
    assert code == 2
    assert "blocks of q8_0 come from a GGUF file" in said
    assert not list(tmp_path.iterdir())


def test_a_pack_that_would_cut_blocks_is_refused_with_the_ranks_that_can_be(run: Run, tmp_path: Path) -> None:
    """11008 inputs of w2 are 43 blocks of 256."""
    store = ["--to", tmp_path / "s.wsm", "--manifest", tmp_path / "s.json"]
    model = ["pack", "--synthetic", "Llama-2-7B:layers=1", "--tp", "4"]
    code, _, said = run(*model, "--weight-format", "q5_K", *store)
    assert code == 2
    assert "4 ranks, its w2 being in q5_K, whose blocks of 256 weights do not fill a row of 2752" in said
    assert said.strip().endswith("torchrun --nproc-per-node 1")
    assert not list(tmp_path.iterdir())


def test_weights_that_a_format_cannot_hold_are_refused_and_nothing_is_kept(run: Run, tmp_path: Path) -> None:
    model = hf_model(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    hf_directory(tmp_path / "model", model, dtype=torch.bfloat16)
    flags = ["--checkpoints", tmp_path / "model", "--cache-dir", tmp_path / "cache", *SMALL]
    code, _, said = run(*flags, "--weight-format", "int4", "--mode", "stream")
    assert code == 2
    assert "layers.1.feed_forward.w3.weight: a weight is NaN or infinite" in said
    assert not list((tmp_path / "cache").glob("*.wsm"))
