"""A model as a draft: it changes no token, and one that agrees with the target is accepted whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoint import open_checkpoint
from llama.generation import Generation, GenerationOptions, Observer, generate
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.nodes.tree import NodeBatch, Tree, node_batch
from llama.products import Acquire
from llama.speculation import model_draft
from llama.speculation.draft import Draft
from llama.speculation.model_draft import ModelDraft
from llama.speculation.ngram import NgramDraft
from llama.speculation.shape import TreeShape
from llama.speculation.timed import TimedDraft
from llama.weights import TensorWeights
from tests.tiny import hf_directory, hf_model
from wsm.engine.device import Device
from wsm.engine.telemetry import Telemetry
from wsm.layout.kv import KV_BLOCK_TOKENS

CPU = torch.device("cpu")
NEW, NODES = 20, 17
RAGGED = [list(range(5, 245)), [256, 3, 99], [256, *range(1, 60)], [7, 8, 9] * 80]
"""Two of them cross a border between KV blocks while they grow, one says the same again and again."""
SHAPES = [TreeShape(4, 1, 5), TreeShape(16, 1, 17), TreeShape(3, 4, 8), TreeShape(5, 6, 17)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Transformer]:
    """The target, ``same``, and a smaller and ``other`` draft."""
    made = {}
    for name, layers in (("same", 2), ("other", 1)):
        directory = hf_directory(tmp_path_factory.mktemp(name), hf_model(num_hidden_layers=layers))
        checkpoint = open_checkpoint(directory)
        made[name] = Transformer(checkpoint.config, TensorWeights(checkpoint, CPU, torch.float32), CPU, 768)
    return made


def a_draft(model: Transformer, shape: TreeShape, rows: int) -> ModelDraft:
    room = max(map(len, RAGGED)) + NEW + shape.grown
    kv = KVCache(model.config, rows, room, CPU, torch.float32)
    return ModelDraft(model, kv, shape, NODES, chunk_tokens=64, wave_rows=2)


def run(
    model: Transformer,
    prompts: list[list[int]],
    draft: Draft | None,
    observer: Observer = lambda mark: None,
    **changes: Any,
) -> Generation:
    kv = KVCache(model.config, len(prompts), max(map(len, prompts)) + NEW + NODES, CPU, model.dtype)
    fields: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": NEW, **changes}
    options = GenerationOptions(
        top_p=0.95,
        seed=5,
        stop_ids=frozenset(),
        ignore_eos=True,
        chunk_tokens=4096,
        wave_rows=4,
        verify_rows=NODES,
        **fields,
    )
    return generate(model, kv, prompts, options, observer, draft)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("prompts", [RAGGED[:1], RAGGED], ids=["one row", "ragged rows"])
def test_no_draft_changes_a_token(models: dict[str, Transformer], prompts: list[list[int]], temperature: float) -> None:
    model, rows = models["same"], len(prompts)
    plain = run(model, prompts, None, temperature=temperature)
    for name, shape in zip(("other", "same", "same", "other"), SHAPES, strict=True):
        drafted = run(model, prompts, a_draft(models[name], shape, rows), temperature=temperature)
        assert drafted.tokens == plain.tokens, (name, shape)
    assert run(model, prompts, NgramDraft(4, NODES, 512, CPU), temperature=temperature).tokens == plain.tokens


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_draft_that_always_agrees_is_accepted_whole_but_at_the_end_of_a_block(
    models: dict[str, Transformer], shape: TreeShape
) -> None:
    model = models["same"]
    found = run(model, RAGGED, a_draft(model, shape, len(RAGGED)))
    for prompt, accepted in zip(RAGGED, found.accepted, strict=True):
        start, left = len(prompt), NEW - 1
        for count in accepted:
            assert count == min(shape.depth + 1, left, KV_BLOCK_TOKENS - start % KV_BLOCK_TOKENS)
            start, left = start + count, left - count


def test_the_last_tree_which_nobody_verifies_stays_in_the_drafts_room(models: dict[str, Transformer]) -> None:
    shape = TreeShape(3, 4, 8)
    kv = KVCache(models["other"].config, 1, 512, CPU, torch.float32)
    draft = ModelDraft(models["other"], kv, shape, NODES, chunk_tokens=64, wave_rows=2)
    prompt, starts = list(range(draft.room - NEW - 255)) + list(range(255)), list[int]()
    grow = draft._grow

    def grown(roots: torch.Tensor, at: torch.Tensor, acquire: Acquire) -> model_draft._Proposal:
        starts.append(int(at))
        return grow(roots, at, acquire)

    draft._grow = grown  # type: ignore[method-assign]
    assert run(models["same"], [prompt], draft).tokens == run(models["same"], [prompt], None).tokens
    assert starts[-1] + shape.grown == 512


def test_a_generation_that_was_broken_off_leaves_a_sound_draft(models: dict[str, Transformer]) -> None:
    """Its last tree was proposed and not verified; and the time of each tree that was is told once."""

    def interrupt(mark: str) -> None:
        if mark == "token":
            raise KeyboardInterrupt

    telemetry = Telemetry(Device())
    for inner in (a_draft(models["other"], SHAPES[2], len(RAGGED)), NgramDraft(4, NODES, 512, CPU)):
        draft = TimedDraft(inner, telemetry)
        whole = run(models["same"], RAGGED, draft)
        assert len(telemetry.drafts()) == 2 * whole.decode_passes  # proposed, and taken in
        with pytest.raises(KeyboardInterrupt):
            run(models["same"], RAGGED, draft, interrupt)
        again = run(models["same"], RAGGED, draft)
        assert (again.tokens, again.accepted) == (whole.tokens, whole.accepted)
        assert len(telemetry.drafts()) == 4 * whole.decode_passes
        telemetry.drafts.take(lambda _: True)


def test_the_draft_keeps_in_step_with_what_was_accepted(models: dict[str, Transformer]) -> None:
    """After trees of which siblings were accepted, its probabilities are those of a fresh prefill."""
    model = models["other"]
    draft = a_draft(model, TreeShape(3, 4, 8), 1)
    row = list(range(40))
    draft.prefill([row[:-1]])
    for _ in range(5):
        starts = torch.tensor([len(row) - 1])
        tree = draft.propose(torch.tensor([row[-1]]), starts)
        leaf = int(torch.where(tree.real[0], tree.depths[0] * 100 + torch.arange(NODES), -1).argmax())
        path = [leaf]
        while path[0]:
            path.insert(0, int(tree.parents[0, path[0]]))
        new = [*(int(tree.tokens[0, node]) for node in path[1:]), 11]
        counts, more = torch.tensor([len(path)]), draft.depth + 1 - len(path)
        draft.accepted(starts, torch.tensor([path + [0] * more]), counts, torch.tensor([new + [0] * more]))
        row += new
        fresh = a_draft(model, TreeShape(3, 4, 8), 1)
        fresh.prefill([row[:-1]])
        root, starts = torch.tensor([row[-1]]), torch.tensor([len(row) - 1])
        for mine, theirs in zip(draft.propose(root, starts), fresh.propose(root, starts), strict=True):
            assert torch.equal(mine, theirs)


def test_levels_are_computed_as_the_whole_tree_would_be(
    models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tree goes on beyond its root's block."""
    levels, trees = list[NodeBatch](), list[Tree]()
    compute, choose = model_draft.node_layers, model_draft.likeliest

    def computed(model: Transformer, batch: NodeBatch, *rest: Any) -> torch.Tensor:
        levels.append(batch)
        return compute(model, batch, *rest)

    def chosen(grown: Tree, *rest: Any) -> tuple[Tree, torch.Tensor]:
        trees.append(grown)
        return choose(grown, *rest)

    monkeypatch.setattr(model_draft, "node_layers", computed)
    monkeypatch.setattr(model_draft, "likeliest", chosen)
    prompts = [list(range(40)), list(range(KV_BLOCK_TOKENS - 2))]
    starts = torch.tensor(list(map(len, prompts)))
    draft = a_draft(models["other"], TreeShape(4, 3, 8), len(prompts))
    draft.prefill(prompts)
    with torch.inference_mode():
        draft.propose(torch.tensor([3, 5]), starts)
    whole = node_batch(trees[0], starts)
    for name in ("tokens", "positions", "columns", "window"):
        assert torch.cat([getattr(level, name) for level in levels], 1).equal(getattr(whole, name)), name
    assert all(level.prefix.equal(whole.prefix) for level in levels)
    assert not whole.positions.eq(starts.unsqueeze(1) + trees[0].depths).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu_a_tree_grows_in_one_graph_waits_for_nothing_and_is_that_of_single_kernels(
    shape: TreeShape, tmp_path: Path
) -> None:
    cuda = torch.device("cuda")
    checkpoint = open_checkpoint(hf_directory(tmp_path, hf_model(num_hidden_layers=1)))
    model = Transformer(checkpoint.config, TensorWeights(checkpoint, cuda, torch.bfloat16), cuda, 768)
    starts = torch.tensor([len(row) for row in RAGGED], device=cuda)
    roots, counts = torch.full_like(starts, 11), torch.full_like(starts, 2)
    found = []
    with torch.inference_mode():
        for captured in (True, False):
            kv = KVCache(model.config, len(RAGGED), 512, cuda, torch.bfloat16)
            draft = ModelDraft(model, kv, shape, NODES, chunk_tokens=64, wave_rows=2)
            draft.prepare(len(RAGGED))
            draft.prefill(RAGGED)
            if not captured:
                draft._captured.clear()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                first = [part.clone() for part in draft.propose(roots, starts)]
                path = torch.cat((torch.zeros_like(first[1][:, :1]), torch.ones_like(first[1][:, : shape.depth])), 1)
                draft.accepted(starts, path, counts, path)
                second = [part.clone() for part in draft.propose(roots, starts + counts)]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append([part.cpu() for part in (*first, *second)])
    assert all(map(torch.equal, *found))
