"""KV below the device through the front door: the tokens of transformers, whatever the mode and the tier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llama.llm import LLaMA
from tests.tiny import hf_directory, hf_model
from wsm.layout.kv import WINDOWS
from wsm.plan.hardware import GIB
from wsm.plan.kv import DISK_SLOTS, fresh_bytes, tail_bytes
from wsm.plan.memory import MemoryKind

LENGTHS = (300, 5, 256, 1, 77, 40, 511, 130)
PROMPTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
NEW, ROOM = 5, 600
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "prefill_chunk_tokens": 64}


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """The oracle: each prompt alone, without padding, whatever ends it."""
    found = []
    for prompt in prompts:
        row, held, step = list[int](), dict[str, Any](), list(prompt)
        while len(row) < new:
            out = model(torch.tensor([step]), **held, use_cache=True)
            held, step = {"past_key_values": out.past_key_values}, [int(out.logits[0, -1].argmax())]
            row += step
        found.append(row)
    return found


def build(directory: Path, mode: str, rows: int, room: int, **config: Any) -> LLaMA:
    return LLaMA.build(directory, mode, config, device="cpu", max_seq_len=room, max_batch_size=rows, topk_blk=0)


def budgets(whole: LLaMA, kv_device: Path | None) -> dict[str, Any]:
    """Flags that leave one part of KV on the device and push the rest below, with ``kv_device`` most of it there."""
    plan, layout = whole.plan, whole.plan.kv.layout
    window = layout.window_bytes
    gpu = plan.gpu_bytes - plan.kv.bytes_of(plan.kv.gpu) + (WINDOWS + 1) * window
    flags: dict[str, Any] = {"gpu_mem_gb": gpu / GIB}
    if kv_device is not None:
        parts = len(layout.units())
        beside = fresh_bytes(layout) + parts * tail_bytes(layout, layout.stretch_rows)
        cpu = plan.cpu_bytes - plan.gpu_bytes + beside + (DISK_SLOTS + 1) * window
        flags |= {"kv_device": str(kv_device), "cpu_mem_gb": (gpu + cpu) / GIB}
    return flags


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Layers enough for some KV in every tier, also where a part of it has all rows."""
    shape = {"num_hidden_layers": 10, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    return hf_model(**shape, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def directory(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("model"), model)


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM) -> list[list[int]]:
    return greedy(model, PROMPTS, NEW)


def tokens(llm: LLaMA, prompts: Sequence[Sequence[int]] = PROMPTS, new: int = NEW) -> list[list[int]]:
    return llm.generate(prompts, max_new_tokens=new, temperature=0.0, ignore_eos=True).tokens


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("mode", ["stream", "full"])
def test_every_tier_gives_the_tokens_of_transformers(
    mode: str, micro_batch: int, directory: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """Prompts of 1 to 511 tokens, in chunks of 64; 3 does not divide the batch; again in the same memory."""
    config = {**PLACES, "micro_batch": micro_batch}
    with build(directory, mode, len(PROMPTS), ROOM, **config) as whole:
        assert not whole.plan.kv.below
        assert tokens(whole) == expected
        logits = whole.logits([PROMPTS[0]])
    for kv_device in (None, tmp_path / "kv"):
        with build(directory, mode, len(PROMPTS), ROOM, **config, **budgets(whole, kv_device)) as llm:
            placed = llm.plan.kv
            assert placed.gpu
            assert placed.cpu
            assert bool(placed.disk) == (kv_device is not None)
            assert tokens(llm) == expected
            assert tokens(llm, PROMPTS[2:4]) == expected[2:4]  # fewer prompts than rows
            assert torch.equal(llm.logits([PROMPTS[0]]), logits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["stream", "full"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_kv_takes_the_page_locked_memory_of_the_plan_to_the_byte(
    mode: str, on_disk: bool, directory: Path, tmp_path: Path
) -> None:
    config = {**PLACES, "micro_batch": 3}
    with build(directory, mode, len(PROMPTS), ROOM, **config) as whole:
        flags = budgets(whole, tmp_path / "kv" if on_disk else None)
    with build(directory, mode, len(PROMPTS), ROOM, **config, **flags) as llm:
        assert llm.kv_tiers is not None
        locked = llm.manager.memory.page_locked_peak_bytes if llm.manager is not None else 0
        assert llm.kv_tiers.page_locked_bytes + locked == llm.plan.page_locked_bytes
        on_device = next(line.nbytes for line in llm.plan.gpu_lines if line.kind == MemoryKind.KV)
        assert llm.kv.nbytes == on_device


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_filled_to_their_last_token(
    on_disk: bool, model: LlamaForCausalLM, directory: Path, tmp_path: Path
) -> None:
    """512 of 512 tokens: the pass that is expected next would have no room."""
    prompts = [PROMPTS[6][:508], PROMPTS[0]]
    with build(directory, "stream", 2, 512, **PLACES, micro_batch=1) as whole:
        flags = budgets(whole, tmp_path / "kv" if on_disk else None)
    with build(directory, "stream", 2, 512, **PLACES, micro_batch=1, **flags) as llm:
        for _ in range(2):
            assert tokens(llm, prompts, 4) == greedy(model, prompts, 4)
