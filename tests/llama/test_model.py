"""Our logits and tokens against transformers' LlamaForCausalLM on the same weights."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.batch import Segment, cut, prefill_batch
from llama.checkpoint import open_checkpoint
from llama.generation import Generation, GenerationOptions, generate
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.parallel.world import Collective
from llama.weights import TensorWeights
from tests.tiny import LLAMA31_ROPE, hf_directory, hf_model
from wsm.layout.model import Shard

CPU = torch.device("cpu")
PROMPTS = [[256, 3, 99, 14, 15], [256, 27], [256, *range(1, 60)], [256, 5, 5, 5, 250, 9, 31, 8, 8, 1, 0, 44]]


def ours(directory: Path, tokens: int = 512) -> Transformer:
    checkpoint = open_checkpoint(directory)
    return Transformer(checkpoint.config, TensorWeights(checkpoint, CPU, torch.float32), CPU, tokens)


def our_logits(model: Transformer, prompts: list[list[int]], chunk_tokens: int = 4096) -> list[Tensor]:
    kv = KVCache(model.config, len(prompts), max(map(len, prompts)), CPU, torch.float32)
    batch = prefill_batch(prompts, range(len(prompts)), CPU)
    logits = model.forward(batch, kv, chunk_tokens=chunk_tokens, logits="all")
    return list(logits.split([len(prompt) for prompt in prompts]))


def run(model: Transformer, prompts: list[list[int]], **changes: Any) -> Generation:
    fields: dict[str, Any] = {
        "max_new_tokens": 24,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "stop_ids": frozenset(),
        "ignore_eos": True,
        "chunk_tokens": 4096,
        "wave_rows": len(prompts),
        **changes,
    }
    kv = KVCache(model.config, len(prompts), max(map(len, prompts)) + fields["max_new_tokens"], CPU, torch.float32)
    return generate(model, kv, prompts, GenerationOptions(**fields))


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama-3.1": {"rope_parameters": {**LLAMA31_ROPE, "rope_theta": 500000.0}},
}


class _Watching(Collective):
    """The first of two ranks; ``most`` of the sums that it has handed out have been alive at once."""

    shard = Shard(0, 2)

    def __init__(self) -> None:
        self._sums: list[weakref.ref[Tensor]] = []
        self.most = 0

    def reduce_(self, x: Tensor) -> Tensor:
        self._sums = [*(sum_ for sum_ in self._sums if sum_() is not None), weakref.ref(x)]
        self.most = max(self.most, len(self._sums))
        return x


def test_sums_of_small_chunks_are_not_kept_for_the_whole_pass(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hf_directory(tmp_path, hf_model()))
    weights, ranks = TensorWeights(checkpoint, CPU, torch.float32), _Watching()
    model = Transformer(checkpoint.config, weights, CPU, 512, ranks)
    prompt = [index % 256 for index in range(64)]
    together = our_logits(model, [prompt])[0]
    ranks.most = 0
    assert_close(our_logits(model, [prompt], chunk_tokens=4)[0], together)
    assert ranks.most <= 2  # the residual itself is one


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_beyond_the_original_context(variant: str, tmp_path: Path) -> None:
    oracle = hf_model(**VARIANTS[variant])
    model = ours(hf_directory(tmp_path, oracle))
    prompt = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        theirs = oracle(torch.tensor([prompt])).logits[0]
    assert_close(our_logits(model, [prompt])[0], theirs)


def test_greedy_tokens_equal_transformers(tmp_path: Path) -> None:
    oracle = hf_model()
    model = ours(hf_directory(tmp_path, oracle))
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert run(model, [prompt]).tokens[0] == theirs[0, len(prompt) :].tolist()


def test_ragged_batches_chunks_and_waves_give_the_tokens_of_single_rows(tmp_path: Path) -> None:
    model = ours(hf_directory(tmp_path, hf_model()))
    alone = [run(model, [prompt], max_new_tokens=8).tokens[0] for prompt in PROMPTS]
    for chunk_tokens in (1, 7, 64, 4096):
        for wave_rows in (1, 2, 4):
            together = run(model, PROMPTS, max_new_tokens=8, chunk_tokens=chunk_tokens, wave_rows=wave_rows)
            assert together.tokens == alone
            assert together.prefill_passes == -(-len(PROMPTS) // wave_rows)
            assert together.decode_passes == 7


@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
def test_chunked_prefill_gives_the_logits_of_one_chunk(chunk_tokens: int, tmp_path: Path) -> None:
    model = ours(hf_directory(tmp_path, hf_model()))
    for chunked, whole in zip(our_logits(model, PROMPTS, chunk_tokens), our_logits(model, PROMPTS), strict=True):
        assert_close(chunked, whole)


def test_cut_keeps_every_token_in_order() -> None:
    segments = (Segment(0, 0, 5, 0), Segment(1, 0, 1, 5), Segment(2, 0, 9, 6))
    for chunk_tokens in range(1, 17):
        chunks = cut(segments, chunk_tokens)
        places = [s.offset + i for chunk in chunks for s in chunk for i in range(s.length)]
        assert places == list(range(15))
        assert all(sum(s.length for s in chunk) == chunk_tokens for chunk in chunks[:-1])
