"""On a CUDA device: a node depends on nothing beside it, drafts change no token, only weights are uploaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llama.generation import GenerationOptions, generate
from llama.llm import LLaMA
from llama.nodes.attention import attend_by_hand, attend_nodes
from llama.nodes.forward import node_logits
from llama.nodes.tree import NodeBatch, Tree, node_batch
from llama.speculation.draft import Draft
from tests.llama.nodes.cases import GEOMETRIES, Case, permuted
from tests.llama.speculation.drafts import OracleDraft, RandomTreeDraft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
MODEL = "Llama-3.2-1B:layers=4"
VOCAB = 128256
PROMPTS = [list(range(100, 345)), list(range(7, 30)), [9], list(range(500, 990))]
"""Two of them cross a border between KV blocks while they grow."""
NEW = 24
SMALLEST_PIECE = 1 << 20
"""Bytes; a group of the model's has no smaller piece, and nothing that a pass might upload is as large."""


def build(mode: str, cache: Path, nodes: int, **config: Any) -> LLaMA:
    places = {"gpu_cached_layers": 1, "cpu_cache_layers": 3, "prefetch_distance": 2}
    fields = {"synthetic": MODEL, "cache_dir": cache, "verify_rows": nodes, **places, **config}
    return LLaMA.build(None, mode=mode, mode_config=fields, device="cuda", max_seq_len=768, max_batch_size=4)


class Uploaded:
    """A test's draft, its trees brought to the device."""

    def __init__(self, draft: RandomTreeDraft) -> None:
        self.draft, self.depth, self.nodes, self.room = draft, draft.depth, draft.nodes, draft.room

    def prepare(self, rows: int) -> None:
        pass

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.draft.prefill(prompts)

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        return Tree(*(part.cuda() for part in self.draft.propose(roots.cpu(), starts.cpu())))

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        self.draft.accepted(starts, path, counts, tokens)


def tokens_of(llm: LLaMA, prompts: list[list[int]], temperature: float, draft: Draft | None) -> list[list[int]]:
    chunk, nodes = llm.plan.chunk_tokens, llm.plan.inputs.verify_rows
    options = GenerationOptions(NEW, temperature, 0.95, 3, frozenset(), True, chunk, len(prompts), nodes)
    return generate(llm.model, llm.kv, prompts, options, draft=draft).tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def on_device(case: Case) -> Case:
    batch = NodeBatch(*(part.cuda() for part in case.batch))
    records = torch.stack((case.keys, case.values), dim=-2).cuda()  # side by side, as the cache has them
    return Case(case.q.cuda(), *records.unbind(-2), batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_attention_is_that_of_torch_and_depends_on_no_place(geometry: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case.random(*geometry, dtype)
    found = attend_nodes(*on_device(case))
    by_hand = attend_by_hand(*on_device(case))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found.float() - by_hand.float()).abs().max() <= tolerance * by_hand.abs().max()
    for other, places in permuted(case):
        assert torch.equal(attend_nodes(*on_device(other)), places(found))


@pytest.mark.parametrize("nodes", [4, 8, 16, 24, 64])
@pytest.mark.parametrize("weight_format", ["auto", "int4"])
def test_the_logits_of_a_node_do_not_depend_on_its_place_or_on_other_rows(
    nodes: int, weight_format: str, cache: Path
) -> None:
    """Rows the other way round, and siblings changed for each other: a star whose leaves are shuffled."""
    random = torch.Generator().manual_seed(nodes)
    with build("full", cache, nodes, weight_format=weight_format) as llm:
        tokens_of(llm, PROMPTS, 0.0, None)  # fills the cache
        starts = torch.tensor([200, 20, 3, 500], device="cuda")
        tokens = torch.randint(0, VOCAB, (4, nodes), generator=random).cuda()
        parents = torch.zeros_like(tokens)
        tree = Tree(tokens, parents, (torch.arange(nodes, device="cuda") > 0).long().expand(4, -1), parents == 0)
        llm.kv.lengths = starts.tolist()
        with torch.inference_mode():
            plain = node_logits(llm.model, node_batch(tree, starts), llm.kv)
            order = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(nodes - 1, generator=random) + 1))
            shuffled = tree._replace(tokens=tokens[:, order.cuda()])
            moved = node_logits(llm.model, node_batch(shuffled, starts), llm.kv)
            assert torch.equal(moved, plain[:, order.cuda()])
            other = tree._replace(tokens=torch.where(torch.arange(4, device="cuda")[:, None] == 1, tokens, tokens + 1))
            beside = node_logits(llm.model, node_batch(other._replace(tokens=other.tokens % VOCAB), starts), llm.kv)
            assert torch.equal(beside[1], plain[1])


@pytest.mark.parametrize(("nodes", "depth"), [(4, 3), (17, 16), (8, 3), (24, 5), (64, 6)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("weight_format", ["auto", "int4"])
def test_drafts_change_no_token_in_any_mode(
    nodes: int, depth: int, temperature: float, weight_format: str, cache: Path
) -> None:
    for prompts in (PROMPTS[:1], PROMPTS):
        plain: list[list[int]] | None = None
        for mode in ("full", "preload", "stream", "mixed"):
            with build(mode, cache, nodes, weight_format=weight_format) as llm:
                found = tokens_of(llm, prompts, temperature, None)
                plain = plain or found
                assert found == plain, mode
                knowing = OracleDraft(plain, nodes, depth, VOCAB)
                assert tokens_of(llm, prompts, temperature, Uploaded(knowing)) == plain, mode
                assert max(max(counts) for counts in knowing.taken) > 1, "something was accepted"
                guessing = RandomTreeDraft(nodes, depth, VOCAB)
                assert tokens_of(llm, prompts, temperature, Uploaded(guessing)) == plain, mode


DRAFT = {"draft": "synthetic:Llama-3.2-1B:layers=1"}
DRAFTS: dict[str, dict[str, Any]] = {
    "no draft, one node": {"verify_rows": 1},
    "no draft": {},
    "ngram": {"draft": "ngram"},
    "chain": {**DRAFT, "draft_depth": 7, "draft_width": 1},
    "tree": {**DRAFT, "draft_depth": 3, "draft_width": 4},
    "tree of an int4 draft": {**DRAFT, "draft_depth": 3, "draft_width": 4, "draft_weight_format": "int4"},
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("mode", ["full", "stream"])
def test_decoding_uploads_weights_and_nothing_else(mode: str, draft: str, cache: Path, tmp_path: Path) -> None:
    """Copies from host to device in a profiler's trace, from the end of the prefill on."""
    repeating = [[5, 6, 7, 8] * 20, [11, 12, 13] * 9]
    seen = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def decode_alone(mark: str) -> None:
        if mark == "prefill_done":
            seen.start()
        elif mark == "done":
            torch.cuda.synchronize()
            seen.stop()

    with build(mode, cache, 8, **DRAFTS[draft]) as llm:
        for observer in (lambda mark: None, decode_alone):  # once before, for what is made at the first pass
            llm.generate(repeating, max_new_tokens=NEW, temperature=0.7, ignore_eos=True, observer=observer)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    uploads = [event["args"]["bytes"] for event in events if "HtoD" in event.get("name", "") and "args" in event]
    assert (len(uploads) > 0) == (mode == "stream")
    assert all(nbytes >= SMALLEST_PIECE for nbytes in uploads), sorted(set(uploads))[:5]


def test_a_generation_begins_when_the_tree_that_the_one_before_drafted_last_is_done(cache: Path) -> None:
    idle = list[bool]()

    def look(mark: str) -> None:
        if mark == "start":
            idle.append(torch.cuda.current_stream().query())

    with build("full", cache, 13, draft="synthetic:Llama-3.2-1B", draft_depth=12, draft_width=1) as llm:
        assert llm.drafting is not None
        options = GenerationOptions(NEW, 0.0, 0.95, 3, frozenset(), True, llm.plan.chunk_tokens, 1, 13)
        for _ in range(3):
            generate(llm.model, llm.kv, PROMPTS[:1], options, look, llm.drafting.draft)
    assert idle == [True] * 3
