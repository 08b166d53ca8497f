"""The pair of known agreement: the target follows its circle in every format, the draft is right as often as said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import LLaMA
from llama.batch import prefill_batch
from llama.checkpoint import SYNTHETIC_DRAFT, is_of_pair, shape_without_layers, synthetic_checkpoint, synthetic_draft
from llama.checkpoint.agreement import Agreement, CycleDraft, CycleTarget
from llama.config import PRESETS, ModelConfig
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.opening import open_inputs
from llama.options import build_options
from llama.weights import TensorWeights
from tests.tiny import tensors_of
from wsm.errors import UnusableInput
from wsm.layout.model import Shard

CPU, NEW = torch.device("cpu"), 256
TARGET = ModelConfig("tiny", 128, 6, 4, 2, 32, 352, 1000)
DRAFT = ModelConfig("draft", 512, 2, 8, 2, 64, 1408, 1000, tied_embeddings=True)


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (TARGET, DRAFT):
        monkeypatch.setitem(PRESETS, config.name, config)


def circle_from(token: int, count: int) -> list[int]:
    target = CycleTarget(TARGET, seed=0, dtype=torch.float32)
    tokens = [token]
    for _ in range(count):
        tokens.append(int(target.next_tokens[tokens[-1]]))
    return tokens


def draft(agree: float, second: float, dtype: torch.dtype = torch.float32) -> CycleDraft:
    return CycleDraft(DRAFT, Agreement(agree, second), seed=1, dtype=dtype)


def logits_of(checkpoint: CycleTarget, tokens: list[int], dtype: torch.dtype) -> Tensor:
    model = Transformer(checkpoint.config, TensorWeights(checkpoint, CPU, dtype), CPU, len(tokens))
    kv = KVCache(checkpoint.config, 1, len(tokens), CPU, dtype)
    batch = prefill_batch([tokens], range(1), CPU)
    with torch.inference_mode():
        return model.forward(batch, kv, chunk_tokens=64, logits="all")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.usefixtures("presets")
def test_target_follows_its_circle_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    assert_follows({"dtype": dtype}, tmp_path)


@pytest.mark.parametrize("weight_format", ["exact", "int8", "int4", "fp8", "q8_0"])
@pytest.mark.usefixtures("presets")
def test_target_follows_its_circle_in_every_weight_format(weight_format: str, tmp_path: Path) -> None:
    assert_follows({"weight_format": weight_format}, tmp_path)


def assert_follows(built: dict[str, str], cache_dir: Path) -> None:
    options = {"synthetic": "tiny:cycle", "cache_dir": str(cache_dir), **built}
    with LLaMA.build(None, "stream", device="cpu", max_seq_len=300, max_batch_size=2, mode_config=options) as llm:
        made = llm.generate([[5, 7], [900]], max_new_tokens=64, temperature=0, ignore_eos=True)
    assert made.tokens == [circle_from(7, 64)[1:], circle_from(900, 64)[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("agree", "second"), [(0.8, 0.1), (0.5, 0.3), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_draft_agrees_as_often_as_it_says(agree: float, second: float, dtype: torch.dtype) -> None:
    tokens = circle_from(3, NEW)
    made = draft(agree, second, dtype)
    likeliest = logits_of(made, tokens, dtype)[:-1].topk(2).indices
    first_right, second_right = (likeliest == torch.tensor(tokens[1:]).unsqueeze(1)).double().mean(0).tolist()
    assert first_right == pytest.approx(agree, abs=0.03)
    assert second_right == pytest.approx(second, abs=0.03)
    told = made.realised([tokens])
    assert told is not None
    assert (told.agree, told.second) == pytest.approx((agree, second), abs=0.03)


def test_draft_is_as_sure_of_its_choices_as_they_are_right() -> None:
    probabilities = logits_of(draft(0.8, 0.1), circle_from(3, NEW), torch.float32).softmax(-1).sort(descending=True)
    first, second = probabilities.values.mean(0)[:2].tolist()
    assert first == pytest.approx(0.8, abs=0.06)
    assert second == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("start", [0, 311, 999])
@pytest.mark.parametrize(("agree", "second"), [(0.8, 0.1), (0.65, 0.2)])
def test_every_stretch_of_256_tokens_has_the_agreement(agree: float, second: float, start: int) -> None:
    made = CycleDraft(
        dataclasses.replace(DRAFT, vocab_size=128256), Agreement(agree, second), seed=1, dtype=torch.bfloat16
    )
    place = int((made.circle == start).nonzero())
    told = made.realised([made.circle.roll(-place)[: NEW + 1].tolist()])
    assert told is not None
    assert (told.agree, told.second) == pytest.approx((agree, second), abs=0.03)


def test_circle_is_the_whole_vocabulary_and_choices_are_permutations() -> None:
    assert sorted(circle_from(0, 999)) == list(range(1000))
    made = draft(0.8, 0.1)
    for choice in made.choices:
        assert sorted(choice.tolist()) == list(range(1000))
    assert not (made.choices[0] == made.choices[1]).any()


@pytest.mark.parametrize("layers", [1, 6, 40])
def test_embedding_outweighs_what_all_layers_add(layers: int) -> None:
    made = CycleTarget(dataclasses.replace(TARGET, n_layers=layers), seed=0, dtype=torch.float32)
    model = Transformer(made.config, TensorWeights(made, CPU, torch.float32), CPU, 64)
    batch = prefill_batch([circle_from(11, 63)], range(1), CPU)
    with torch.inference_mode():
        kv = KVCache(made.config, 1, 64, CPU, torch.float32)
        kv.begin(batch.segments)
        h = model.layers(batch, kv, model.groups.acquire, 64)
        begun = model.weights.globals["tok_embeddings"][batch.tokens]
    assert (h - begun).norm(dim=1).max() < 0.5 * begun.norm(dim=1).min()
    assert (h - begun).norm(dim=1).min() > 0.02 * begun.norm(dim=1).max()  # the layers do add something


def test_every_rank_has_its_rows_of_the_pair() -> None:
    whole = tensors_of(draft(0.8, 0.1))
    for rank in range(2):
        share = tensors_of(draft(0.8, 0.1).share(Shard(rank, 2)))
        for name in ("tok_embeddings.weight", "output.weight"):
            assert torch.equal(share[name], whole[name].chunk(2)[rank])


def test_layers_are_those_of_the_plain_synthetic_model(presets: None) -> None:
    plain, cycle = (
        synthetic_checkpoint(spec, seed=0, dtype=torch.float32) for spec in ("draft:layers=1", "draft:layers=1:cycle")
    )
    assert plain.sources() != cycle.sources()
    before, after = tensors_of(plain), tensors_of(cycle)
    assert "output.weight" not in before  # tied, and its pair's head is its own
    assert after["output.weight"].shape == after["tok_embeddings.weight"].shape
    assert all(torch.equal(before[name], after[name]) for name in before if name != "tok_embeddings.weight")


def test_a_pair_is_named_on_the_command_line(presets: None) -> None:
    assert is_of_pair("synthetic:draft:agree=0.8,second=0.1")
    assert not is_of_pair("synthetic:draft")
    assert not is_of_pair(None)
    assert SYNTHETIC_DRAFT == "synthetic:"
    made = synthetic_draft("draft:layers=1,agree=0.8,second=0.1", dtype=torch.float32)
    assert isinstance(made, CycleDraft)
    assert made.agreement == Agreement(0.8, 0.1)
    assert made.config.n_layers == 1
    with_draft = synthetic_checkpoint("tiny", seed=0, dtype=torch.float32, of_pair=True)
    alone = synthetic_checkpoint("tiny:cycle", seed=0, dtype=torch.float32)
    assert (with_draft.sources(), with_draft.config) == (alone.sources(), alone.config)
    assert not isinstance(synthetic_draft("draft", dtype=torch.float32), CycleTarget)


IMPOSSIBLE = """
none:agree=1 draft:agree draft:agree= draft:agree=1.1 draft:agree=nan draft:agree=-1 draft:cycle draft:layers,agree=1
draft:agree=0.8,second=0.3 draft:agree=0.8,agree=0.8 draft:agree=0.8,third=0.1
"""


@pytest.mark.parametrize("spec", IMPOSSIBLE.split())
def test_a_pair_that_cannot_be_is_refused(spec: str, presets: None) -> None:
    with pytest.raises(UnusableInput, match=f"--draft synthetic:{spec}"):
        synthetic_draft(spec, dtype=torch.float32)


def test_a_draft_of_a_pair_needs_its_target(presets: None, tmp_path: Path) -> None:
    given: dict[str, object] = {"device": "cpu", "cache_dir": tmp_path, "draft": "synthetic:draft:agree=1"}
    with pytest.raises(UnusableInput, match="give --synthetic NAME"):
        open_inputs(build_options({}, **given))
    opened = open_inputs(build_options({}, synthetic="tiny", **given))
    assert isinstance(opened.checkpoint, CycleTarget)
    assert opened.draft is not None
    assert opened.draft.inputs is not None
    assert isinstance(opened.draft.inputs.checkpoint, CycleDraft)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("Llama-3.2-1B", "Llama-3.2-1B"),
        ("llama-3.2-1b:layers=3", "llama-3.2-1b"),
        ("Llama-3.2-1B:cycle:layers=3", "Llama-3.2-1B:cycle"),
        ("Llama-3.2-1B:layers=3,cycle", "Llama-3.2-1B:cycle"),
    ],
)
def test_a_shape_without_its_layers_can_be_given_others(spec: str, shape: str) -> None:
    assert shape_without_layers(spec) == shape
    other = synthetic_checkpoint(f"{shape}:layers=2", seed=0, dtype=torch.float32)
    assert other.config.n_layers == 2
