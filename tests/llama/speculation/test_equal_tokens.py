"""With a draft a run gives the tokens of the run without it; an error in a mask or in moving KV shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llama.decoding
from llama.batch import prefill_batch
from llama.checkpoint import open_checkpoint
from llama.generation import Generation, GenerationOptions, generate
from llama.kv.cache import KVCache
from llama.kv.format import kv_format
from llama.model import Transformer
from llama.nodes.tree import NodeBatch, Tree, node_batch
from llama.speculation.draft import Draft
from llama.weights import TensorWeights
from tests.llama.speculation.drafts import OracleDraft, RandomTreeDraft
from tests.tiny import hf_directory, hf_model
from wsm.errors import UnusableInput
from wsm.layout.kv import KV_BLOCK_TOKENS

CPU = torch.device("cpu")
NEW = 24
VOCAB = 300
RAGGED = [list(range(5, 245)), [256, 3, 99], [256, *range(1, 60)], list(range(20, 270)) + list(range(245))]
"""Two of them cross a border between KV blocks while they grow."""
SHAPES = {"chain": (5, 4), "tree": (8, 3), "large tree": (24, 6)}
"""Nodes, and how deep."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("model"), hf_model(num_hidden_layers=2))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(directory: Path, request: pytest.FixtureRequest) -> Transformer:
    checkpoint = open_checkpoint(directory)
    return Transformer(checkpoint.config, TensorWeights(checkpoint, CPU, request.param), CPU, 768)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield
    torch.set_num_threads(before)


def run(
    model: Transformer,
    prompts: list[list[int]],
    nodes: int,
    draft: Draft | None,
    kv: KVCache | None = None,
    **changes: Any,
) -> Generation:
    fields: dict[str, Any] = {"temperature": 0.0, "stop_ids": frozenset(), "max_new_tokens": NEW, **changes}
    kv = kv or KVCache(model.config, len(prompts), max(map(len, prompts)) + NEW + nodes, CPU, model.dtype)
    options = GenerationOptions(
        top_p=0.95, seed=5, ignore_eos=False, chunk_tokens=4096, wave_rows=4, verify_rows=nodes, **fields
    )
    return generate(model, kv, prompts, options, draft=draft)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("prompts", [RAGGED[:1], RAGGED], ids=["one row", "ragged rows"])
def test_drafts_change_no_token(model: Transformer, prompts: list[list[int]], temperature: float, shape: str) -> None:
    nodes, depth = SHAPES[shape]
    plain = run(model, prompts, nodes, None, temperature=temperature)
    assert plain.decode_passes == NEW - 1
    knowing = OracleDraft(plain.tokens, nodes, depth, VOCAB)
    drafted = run(model, prompts, nodes, knowing, temperature=temperature)
    assert drafted.tokens == plain.tokens
    assert max(max(counts) for counts in knowing.taken) > 1, "something was accepted"
    assert drafted.decode_passes < plain.decode_passes
    assert [sum(counts) + 1 for counts in drafted.accepted] == [NEW] * len(prompts)
    guessing = RandomTreeDraft(nodes, depth, VOCAB)
    assert run(model, prompts, nodes, guessing, temperature=temperature).tokens == plain.tokens


def test_drafts_change_no_token_with_kv_in_8_bits_or_in_stretches_of_rows(model: Transformer) -> None:
    eight_bits = kv_format("int8", model.dtype, model.config.head_dim)
    for changes in ({"record": eight_bits}, {"stretch_rows": 3}):
        kv = KVCache(model.config, 4, 520, CPU, model.dtype, **changes)  # type: ignore[arg-type]
        plain = run(model, RAGGED, 6, None, kv, temperature=0.8)
        assert run(model, RAGGED, 6, OracleDraft(plain.tokens, 6, 3, VOCAB), kv, temperature=0.8).tokens == plain.tokens


def test_no_token_depends_on_what_a_cache_had_before(model: Transformer) -> None:
    kv = KVCache(model.config, 4, 520, CPU, model.dtype)
    fresh = run(model, RAGGED, 6, None, kv)
    run(model, RAGGED[::-1], 6, RandomTreeDraft(6, 3, VOCAB), kv)
    assert run(model, RAGGED, 6, RandomTreeDraft(6, 3, VOCAB), kv).tokens == fresh.tokens


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_drafts_change_no_token_where_several_threads_compute(model: Transformer) -> None:
    """On the CPU a thread's last elements are computed by other instructions, and rows by shares of them."""
    plain = run(model, RAGGED[1:3], 6, None, temperature=0.8, max_new_tokens=10)
    draft = OracleDraft(plain.tokens, 6, 3, VOCAB)
    assert run(model, RAGGED[1:3], 6, draft, temperature=0.8, max_new_tokens=10).tokens == plain.tokens


def test_a_row_ends_at_its_stop_token_or_its_limit_also_inside_of_a_path(model: Transformer) -> None:
    plain = run(model, RAGGED, 5, None)
    stop = frozenset({plain.tokens[0][7], plain.tokens[2][4]})
    ended = run(model, RAGGED, 5, None, stop_ids=stop)
    for most in (1, 2, 6, 11):
        draft = OracleDraft(plain.tokens, 5, 4, VOCAB, error=0.0)
        assert run(model, RAGGED, 5, draft, max_new_tokens=most).tokens == [row[:most] for row in plain.tokens]
    draft = OracleDraft(plain.tokens, 5, 4, VOCAB, error=0.0)
    assert run(model, RAGGED, 5, draft, stop_ids=stop).tokens == ended.tokens
    assert len(ended.tokens[0]) == plain.tokens[0].index(ended.tokens[0][-1]) + 1 < NEW


def test_a_row_that_goes_faster_than_others_stays_in_its_room(model: Transformer) -> None:
    """It is at its end long before them, and the cache has no room for more."""
    plain = run(model, RAGGED, 9, None)
    said = [plain.tokens[0], *([[VOCAB - 1] * NEW] * 3)]
    assert run(model, RAGGED, 9, OracleDraft(said, 9, 8, VOCAB, error=0.0)).tokens == plain.tokens


def shifted_by_a_node(self: KVCache, starts: Tensor, path: Tensor, counts: Tensor) -> None:
    return KEEP(self, starts, path.clamp(min=1) - 1, counts)


def not_moved(self: KVCache, starts: Tensor, path: Tensor, counts: Tensor) -> None:
    pass


KEEP = KVCache.keep_nodes


@pytest.mark.parametrize("wrong", [shifted_by_a_node, not_moved])
def test_an_error_in_moving_kv_would_show(model: Transformer, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(model, RAGGED, 8, None, temperature=0.8)
    monkeypatch.setattr(KVCache, "keep_nodes", wrong)
    draft = OracleDraft(plain.tokens, 8, 3, VOCAB)
    assert run(model, RAGGED, 8, draft, temperature=0.8).tokens != plain.tokens


def all_nodes_attended(tree: Tree, starts: Tensor) -> NodeBatch:
    """As if every node were an ancestor of the ones behind it."""
    count = tree.tokens.shape[1]
    chain = torch.arange(count).expand_as(tree.parents)
    batch = node_batch(tree._replace(parents=(chain - 1).clamp(min=0), depths=chain), starts)
    return batch._replace(positions=node_batch(tree, starts).positions)


def parents_not_attended(tree: Tree, starts: Tensor) -> NodeBatch:
    return node_batch(tree._replace(parents=torch.zeros_like(tree.parents)), starts)


@pytest.mark.parametrize("wrong", [all_nodes_attended, parents_not_attended])
def test_an_error_in_the_mask_would_show(model: Transformer, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(model, RAGGED, 8, None, temperature=0.8)
    monkeypatch.setattr(llama.decoding, "node_batch", wrong)
    draft = OracleDraft(plain.tokens, 8, 3, VOCAB)
    assert run(model, RAGGED, 8, draft, temperature=0.8).tokens != plain.tokens


def test_margins_are_those_of_the_models_own_logits_with_a_draft_and_without(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    model = Transformer(checkpoint.config, TensorWeights(checkpoint, CPU, torch.float32), CPU, 768)
    plain = run(model, RAGGED, 8, None)
    drafted = run(model, RAGGED, 8, OracleDraft(plain.tokens, 8, 3, VOCAB))
    assert drafted.margins == plain.margins
    for prompt, tokens, margins in zip(RAGGED, plain.tokens, plain.margins, strict=True):
        kv = KVCache(model.config, 1, 768, CPU, model.dtype)
        batch = prefill_batch([[*prompt, *tokens[:-1]]], [0], CPU)
        with torch.inference_mode():
            logits = model.forward(batch, kv, chunk_tokens=4096, logits="all")[-NEW:]
        largest = logits.topk(2, dim=1)
        assert largest.indices[:, 0].tolist() == tokens
        expected = (largest.values[:, 0] - largest.values[:, 1]).tolist()
        assert margins == pytest.approx(expected, abs=1e-3)


def test_margins_end_where_a_row_does(model: Transformer) -> None:
    plain = run(model, RAGGED, 5, None)
    stop = frozenset({plain.tokens[0][7], plain.tokens[2][4]})
    ended = run(model, RAGGED, 5, OracleDraft(plain.tokens, 5, 4, VOCAB, error=0.0), stop_ids=stop)
    assert list(map(len, ended.margins)) == list(map(len, ended.tokens))
    assert ended.margins == [row[: len(own)] for row, own in zip(plain.margins, ended.margins, strict=True)]


def test_no_margins_are_kept_of_one_node_a_row_or_above_temperature_0(model: Transformer) -> None:
    assert run(model, RAGGED[1:2], 1, None, max_new_tokens=3).margins == []
    assert run(model, RAGGED[1:2], 2, None, max_new_tokens=3, temperature=0.8).margins == []


def test_nodes_give_the_tokens_of_single_passes_where_no_logits_are_close(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    model = Transformer(checkpoint.config, TensorWeights(checkpoint, CPU, torch.float32), CPU, 768)
    assert run(model, RAGGED, 4, None).tokens == run(model, RAGGED, 1, None).tokens


def test_a_cache_without_room_for_the_nodes_is_refused(model: Transformer) -> None:
    options = GenerationOptions(NEW, 0.0, 1.0, 0, frozenset(), True, 64, 1, verify_rows=5)
    kv = KVCache(model.config, 1, KV_BLOCK_TOKENS, CPU, model.dtype)
    generate(model, kv, [[1] * (KV_BLOCK_TOKENS - NEW - 4)], options)
    with pytest.raises(UnusableInput, match="more than the 252 that the KV cache holds: raise --max-seq-len"):
        generate(model, kv, [[1] * (KV_BLOCK_TOKENS - NEW - 3)], options)
