"""Generation: its end, its marks and counts, its sampling, and that a pass never waits for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from llama.batch import decode_batch, prefill_batch
from llama.checkpoint import open_checkpoint
from llama.generation import GenerationOptions, generate
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.sampling import nucleus, sample
from llama.weights import TensorWeights
from tests.llama.test_model import CPU, PROMPTS, assert_close, run
from tests.tiny import hf_directory, hf_model
from wsm.errors import UnusableInput


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("model"), hf_model())


@pytest.fixture(scope="module")
def model(directory: Path) -> Transformer:
    return on(directory, CPU, torch.float32)


def on(directory: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    checkpoint = open_checkpoint(directory)
    return Transformer(checkpoint.config, TensorWeights(checkpoint, device, dtype), device, 512)


def test_a_stop_token_ends_its_row_alone(model: Transformer) -> None:
    free = run(model, PROMPTS)
    stop = free.tokens[0][3]
    ended = run(model, PROMPTS, stop_ids=frozenset({stop}), ignore_eos=False)
    for row, tokens in enumerate(ended.tokens):
        place = free.tokens[row].index(stop) + 1 if stop in free.tokens[row] else 24
        assert tokens == free.tokens[row][:place]
    assert ended.decode_tokens == sum(map(len, ended.tokens))
    assert run(model, PROMPTS, stop_ids=frozenset({stop}), ignore_eos=True).tokens == free.tokens


def test_the_loop_ends_with_its_last_row(model: Transformer) -> None:
    free = run(model, PROMPTS)
    every = run(model, PROMPTS, stop_ids=frozenset(row[2] for row in free.tokens), ignore_eos=False)
    assert max(map(len, every.tokens)) <= 3
    assert every.decode_passes == max(map(len, every.tokens)) - 1


def test_one_new_token_takes_no_decode_pass(model: Transformer) -> None:
    one = run(model, PROMPTS, max_new_tokens=1)
    assert one.decode_passes == 0
    assert one.decode_tokens == len(PROMPTS)
    assert one.prefill_tokens == sum(map(len, PROMPTS))
    assert one.texts is None


def test_the_observer_hears_each_wave_each_token_and_the_end_of_prefill(model: Transformer) -> None:
    marks: list[str] = []
    options = GenerationOptions(3, 0.0, 1.0, 0, frozenset(), True, 64, 2)
    generate(model, KVCache(model.config, 4, 100, CPU, torch.float32), PROMPTS, options, marks.append)
    prefill = ["start", "pass", "queued", "pass", "queued", "prefill_done", "token"]
    assert marks == [*prefill, *(["pass", "queued", "token"] * 2), "done"]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_stop_being_finite_end_the_generation(model: Transformer, temperature: float) -> None:
    kv = KVCache(model.config, 4, 100, CPU, torch.float32)

    def damage(mark: str) -> None:
        if mark == "token":
            kv.enter(0, 0).data.fill_(0xFF)  # NaN, as a broken drive or link might leave it

    options = GenerationOptions(8, temperature, 0.9, 0, frozenset(), True, 64, 4)
    with pytest.raises(UnusableInput, match="logits that are not finite"):
        generate(model, kv, PROMPTS, options, damage)


def test_a_cache_serves_one_generation_after_another(model: Transformer) -> None:
    kv = KVCache(model.config, 4, 100, CPU, torch.float32)
    options = GenerationOptions(8, 0.0, 1.0, 0, frozenset(), True, 64, 4)
    first = generate(model, kv, PROMPTS, options)
    assert generate(model, kv, PROMPTS[2:], options).tokens == first.tokens[2:]
    assert generate(model, kv, PROMPTS, options) == first


def test_prefill_then_decode_gives_the_logits_of_one_long_prefill(model: Transformer) -> None:
    whole = [list(range(40)), list(range(100, 125)), [7, 8]]
    kv = KVCache(model.config, 3, 64, CPU, torch.float32)
    model.forward(prefill_batch([row[:-1] for row in whole], range(3), CPU), kv, chunk_tokens=64)
    last = torch.tensor([row[-1] for row in whole])
    decoded = model.forward(decode_batch(last, kv.lengths, CPU), kv, chunk_tokens=64)
    fresh = KVCache(model.config, 3, 64, CPU, torch.float32)
    assert_close(decoded, model.forward(prefill_batch(whole, range(3), CPU), fresh, chunk_tokens=64))
    assert kv.lengths == fresh.lengths == [40, 25, 2]


def test_a_decode_in_chunks_of_rows_gives_the_logits_of_one(model: Transformer) -> None:
    kv = KVCache(model.config, 4, 64, CPU, torch.float32)
    batch = prefill_batch(PROMPTS, range(4), CPU)
    model.forward(batch, kv, chunk_tokens=64)
    following = batch.followed_by(torch.tensor([1, 2, 3, 4]))
    lengths = list(kv.lengths)
    at_once = model.forward(following, kv, chunk_tokens=64)
    kv.lengths = lengths
    assert_close(model.forward(following, kv, chunk_tokens=3), at_once)


def test_a_pass_that_does_not_go_on_where_its_row_ends_is_refused(model: Transformer) -> None:
    kv = KVCache(model.config, 1, 64, CPU, torch.float32)
    with pytest.raises(ValueError, match="holds 0 of 256 tokens"):
        model.forward(decode_batch(torch.tensor([1]), [5], CPU), kv, chunk_tokens=64)


WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


@pytest.mark.parametrize("chunk_tokens", [7, 4096])
def test_nothing_in_a_pass_makes_the_host_wait(model: Transformer, chunk_tokens: int) -> None:
    kv = KVCache(model.config, 4, 64, CPU, torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        batch = prefill_batch(PROMPTS, range(4), CPU)
        picked = model.forward(batch, kv, chunk_tokens=chunk_tokens).argmax(-1)
        model.forward(batch.followed_by(picked), kv, chunk_tokens=chunk_tokens)
    ops = {event.key for event in seen.key_averages()}
    assert "aten::scaled_dot_product_attention" in ops
    assert not ops & WAITS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_pass_never_waits_and_gives_the_logits_of_the_cpu(directory: Path, dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    logits = {}
    for device in (CPU, cuda):
        model = on(directory, device, dtype)
        kv = KVCache(model.config, 4, 64, device, dtype)
        chosen = torch.tensor([1, 2, 3, 4], device=device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch = prefill_batch(PROMPTS, range(4), device)
            model.forward(batch, kv, chunk_tokens=23)
            decoded = model.forward(batch.followed_by(chosen), kv, chunk_tokens=23)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        logits[device] = decoded.cpu()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    difference = (logits[cuda] - logits[CPU]).abs().max()
    assert difference <= tolerance * logits[CPU].abs().max()


def test_sampling_follows_its_seed(model: Transformer) -> None:
    first = run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=3)
    assert run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=3).tokens == first.tokens
    assert run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=3, wave_rows=1).tokens == first.tokens
    assert run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=4).tokens != first.tokens


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_sampling_next_to_temperature_0_is_greedy(temperature: float) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, temperature=temperature, top_p=1.0, generator=torch.Generator().manual_seed(0))
    assert drawn.tolist() == logits.argmax(-1).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=40), st.floats(0.001, 1.0))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(sixteenths: list[int], top_p: float) -> None:
    probs = torch.softmax(torch.tensor(sixteenths) / 16, dim=-1).sort(descending=True).values.unsqueeze(0)
    kept = nucleus(probs, top_p)[0]
    count = int(kept.sum())
    assert count >= 1
    assert kept[:count].all(), "the likeliest tokens come first"
    exact = probs[0].double()
    assert exact[:count].sum() >= top_p - 1e-6
    assert exact[: count - 1].sum() < top_p + 1e-6


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_only_tokens_of_the_nucleus_are_drawn(seed: int, top_p: float) -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(seed)) * 2
    drawn = sample(logits, temperature=0.7, top_p=top_p, generator=torch.Generator().manual_seed(seed))
    probs = torch.softmax(logits.double() / 0.7, dim=-1)
    likelier = (probs * (probs > probs.gather(-1, drawn.unsqueeze(-1)))).sum(-1)
    assert (likelier < top_p + 1e-6).all()


def test_drawn_tokens_have_the_frequencies_of_their_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = probs.log().repeat(20_000, 1)
    drawn = sample(rows, temperature=1.0, top_p=0.9, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(frequencies, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.015)


def test_what_cannot_be_generated_is_refused(model: Transformer) -> None:
    for prompts, changes, said in (
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [300]], {}, "prompt 1 has token ids from 300 to 300"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top-p"),
        ([[1]], {"top_p": 1.01}, "top-p"),
        ([[1]], {"max_new_tokens": 0}, "max-new-tokens"),
        ([[1]], {"chunk_tokens": 0}, "prefill-chunk-tokens"),
        ([[1] * 500], {}, "max-seq-len"),
    ):
        with pytest.raises(UnusableInput, match=said):
            run(model, prompts, **changes)
    options = GenerationOptions(10, 0.0, 1.0, 0, frozenset(), True, 64, 1)
    with pytest.raises(UnusableInput, match="max-seq-len"):
        generate(model, KVCache(model.config, 1, 10, CPU, torch.float32), [[1] * 250], options)
    with pytest.raises(UnusableInput, match="2 prompts"):
        generate(model, KVCache(model.config, 1, 10, CPU, torch.float32), [[1], [2]], options)
