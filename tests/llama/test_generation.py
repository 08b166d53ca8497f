"""Generation: its end, its marks and counts, its seed, and that a pass never waits for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import llama.batch
from llama.batch import decode_batch, prefill_batch
from llama.checkpoint import open_checkpoint
from llama.generation import GenerationOptions, generate
from llama.kv.cache import KVCache
from llama.model import Transformer
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
    decoded = model.forward(decode_batch(last, torch.tensor(kv.lengths), kv.lengths), kv, chunk_tokens=64)
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
        model.forward(decode_batch(torch.tensor([1]), torch.tensor([5]), [5]), kv, chunk_tokens=64)


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


@pytest.mark.parametrize("verify_rows", [1, 4])
def test_nothing_is_uploaded_behind_the_prefill(
    verify_rows: int, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload would wait behind the weights on the copy engine."""
    uploads, upload = list[str](), llama.batch._upload

    def seen(values: Tensor, device: torch.device) -> Tensor:
        uploads.append("upload")
        return upload(values, device)

    monkeypatch.setattr(llama.batch, "_upload", seen)
    kv = KVCache(model.config, len(PROMPTS), 64, CPU, torch.float32)
    options = GenerationOptions(4, 0.0, 1.0, 0, frozenset(), True, 64, len(PROMPTS), verify_rows)
    generate(model, kv, PROMPTS, options, uploads.append)
    assert uploads.index("upload") < uploads.index("prefill_done")
    assert "upload" not in uploads[uploads.index("prefill_done") :]


def test_sampling_follows_its_seed(model: Transformer) -> None:
    first = run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=3)
    assert run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=3).tokens == first.tokens
    assert run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=3, wave_rows=1).tokens == first.tokens
    assert run(model, PROMPTS, temperature=1.5, top_p=0.95, seed=4).tokens != first.tokens


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
