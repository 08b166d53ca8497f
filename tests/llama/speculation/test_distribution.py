"""Drawn tokens have the model's own distribution, however bad the draft is; a wrong rule of acceptance would show."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from scipy import stats
from torch import Tensor

import llama.decoding
from llama.batch import prefill_batch
from llama.checkpoint import open_checkpoint
from llama.generation import GenerationOptions, generate
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.nodes.tree import Tree
from llama.sampling import sample
from llama.speculation.accept import Accepted, accept
from llama.weights import TensorWeights
from tests.llama.speculation.drafts import RandomTreeDraft
from tests.tiny import hf_directory, hf_model

CPU = torch.device("cpu")
VOCAB, ROWS, NEW = 6, 1000, 3
PROMPT = [1, 4, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    tiny = hf_model(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **shape)
    checkpoint = open_checkpoint(hf_directory(tmp_path_factory.mktemp("model"), tiny))
    return Transformer(checkpoint.config, TensorWeights(checkpoint, CPU, torch.float32), CPU, 256)


def drawn_texts(model: Transformer, draft: RandomTreeDraft | None, seeds: int) -> list[list[int]]:
    """1 000 rows of three tokens for each seed, at temperature 1."""
    kv, texts = KVCache(model.config, ROWS, len(PROMPT) + NEW + 3, CPU, torch.float32), []
    for seed in range(seeds):
        options = GenerationOptions(NEW, 1.0, 1.0, seed, frozenset(), True, 4096, ROWS, verify_rows=3)
        texts += generate(model, kv, [PROMPT] * ROWS, options, draft=draft).tokens
    return texts


def p_value(model: Transformer, texts: list[list[int]]) -> float:
    """How likely so much of a difference from the model's distribution is, if there is none (chi-square)."""
    every = list(product(range(VOCAB), repeat=NEW))
    kv = KVCache(model.config, len(every), 256, CPU, torch.float32)
    batch = prefill_batch([PROMPT + list(text) for text in every], range(len(every)), CPU)
    with torch.inference_mode():
        logits = model.forward(batch, kv, chunk_tokens=4096, logits="all").view(len(every), -1, VOCAB)
    probs = logits[:, len(PROMPT) - 1 : -1].double().softmax(-1)
    likely = probs.gather(2, torch.tensor(every).unsqueeze(2)).prod(1).squeeze(1) * len(texts)
    counts = torch.zeros(len(every)).index_add_(0, places(texts), torch.ones(len(texts)))
    often = likely >= 5  # the others count as one
    expected = [*likely[often].tolist(), likely[~often].sum().item()]
    found = [*counts[often].tolist(), counts[~often].sum().item()]
    kept = slice(None) if expected[-1] > 0 else slice(-1)
    return float(stats.chisquare(found[kept], expected[kept], sum_check=False).pvalue)


def places(texts: list[list[int]]) -> Tensor:
    """Of each text in the order of ``product``."""
    return (torch.tensor(texts) * torch.tensor([VOCAB ** (NEW - 1 - place) for place in range(NEW)])).sum(1)


def bad_draft() -> RandomTreeDraft:
    return RandomTreeDraft(3, 2, VOCAB)


def test_drawn_tokens_have_the_distribution_of_the_model(model: Transformer) -> None:
    texts = drawn_texts(model, bad_draft(), seeds=10)
    assert len(texts) == 10_000
    assert p_value(model, texts) > 1e-3
    assert texts[:ROWS] == drawn_texts(model, None, seeds=1)


def whatever_the_draft_says(tree: Tree, drawn: Tensor, depth: int, room: Tensor) -> Accepted:
    said = drawn.clone()
    said[:, :-1] = torch.where(tree.real[:, 1:], tree.tokens[:, 1:], drawn[:, :-1])
    return accept(tree, said, depth, room)


def rejected_without_a_residual(tree: Tree, drawn: Tensor, depth: int, room: Tensor) -> Accepted:
    """The draft's token with probability min(1, p / q), else one of p; right would be one of p - q."""
    said, random = drawn.clone(), torch.Generator().manual_seed(int(drawn.sum()))
    probs = LOGITS[-1].softmax(-1).view(*drawn.shape, VOCAB)
    p = probs[:, :-1].gather(2, tree.tokens[:, 1:].unsqueeze(2)).squeeze(2)
    takes = (torch.rand(p.shape, generator=random) < p * VOCAB) & tree.real[:, 1:]
    said[:, :-1] = torch.where(takes, tree.tokens[:, 1:], drawn[:, :-1])
    return accept(tree, said, depth, room)


LOGITS: list[Tensor] = []


@pytest.mark.parametrize("wrong", [whatever_the_draft_says, rejected_without_a_residual])
def test_a_wrong_rule_of_acceptance_would_show(
    model: Transformer, wrong: Callable[..., Accepted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(logits: Tensor, *args: Tensor, **sampling: float) -> Tensor:
        LOGITS[:] = [logits.clone()]
        return sample(logits, *args, **sampling)

    monkeypatch.setattr(llama.decoding, "accept", wrong)
    monkeypatch.setattr(llama.decoding, "sample", seen)
    assert p_value(model, drawn_texts(model, bad_draft(), seeds=2)) < 1e-6
