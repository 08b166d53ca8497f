"""On a CUDA device: chosen KV blocks come over the link as they are, by the kernel as by torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.run.ceilings import probe
from llama.kv import format as kv_formats
from llama.kv.format import kv_format
from llama.llm import LLaMA
from wsm.engine.arena import PageLockedArena
from wsm.engine.device import open_device
from wsm.formats.backend import kernels_for
from wsm.kv import tiers
from wsm.kv.gather import gather, gather_on
from wsm.plan.time import Ceiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]


@pytest.mark.parametrize("block_bytes", [256 * 2 * 256, 256 * 2 * 136, 256 * 2 * 24])
@pytest.mark.parametrize(("rows", "heads", "blocks", "k"), [(5, 8, 8, 4), (1, 1, 3, 2), (32, 8, 32, 8)])
def test_the_kernel_reads_page_locked_memory_as_it_is(
    rows: int, heads: int, blocks: int, k: int, block_bytes: int
) -> None:
    device = open_device(torch.device("cuda"))
    arena = PageLockedArena(rows * heads * blocks * block_bytes, device)
    host = arena.take(rows * heads * blocks * block_bytes)
    host.view(torch.int64).random_()
    kernel = gather_on(device)
    assert kernel is not gather, "Triton works on every machine that these tests are for"
    home = device.mapped(host).view(torch.int64).view(rows, heads * blocks, -1)
    wanted = torch.randint(0, blocks, (rows, heads, k), device="cuda")
    found, expected = (torch.full((rows, heads * k, home.shape[-1]), 7, device="cuda") for _ in range(2))
    stream = device.stream()
    device.wait(stream, device.record(device.compute_stream()))
    device.run(stream, lambda: kernel(home, wanted, found))
    gather(home, wanted, expected)
    device.synchronize()
    assert torch.equal(found, expected)
    of = host.view(torch.int64).view(rows, heads, blocks, -1)
    places = wanted.cpu().unsqueeze(-1).expand(-1, -1, -1, of.shape[-1])
    assert torch.equal(found.cpu().view(rows, heads, k, -1), of.gather(2, places))
    arena.close()


def test_blocks_beyond_2_gib_are_gathered_as_they_are() -> None:
    """A home of more than 2^31 bytes, of which the last row's blocks are wanted, in words of one byte each."""
    device, shape = open_device(torch.device("cuda")), (36, 8 * 32, 256 * 2 * 480)
    arena = PageLockedArena(shape[0] * shape[1] * shape[2], device)
    host = arena.take(shape[0] * shape[1] * shape[2])
    home = device.mapped(host).view(shape)
    host.view(shape)[-1].view(torch.int64).random_()
    wanted = torch.randint(0, 32, (36, 8, 2), device="cuda")
    found, expected = (torch.zeros(36, 16, shape[2], dtype=torch.uint8, device="cuda") for _ in range(2))
    gather_on(device)(home, wanted, found)
    gather(home, wanted, expected)
    device.synchronize()
    assert expected[-1].any()
    assert torch.equal(found[-1], expected[-1])
    arena.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "tokens", "dim"), [((5, 8, 512), 512, 128), ((3, 2, 256), 70, 24), ((2, 768), 601, 64)]
)
def test_8_bits_are_read_by_the_kernel_bit_by_bit_as_by_torch(
    shape: tuple[int, ...], tokens: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = kv_format("int8", dtype, dim)
    window = torch.zeros(*shape, 2, form.record_bytes, dtype=torch.uint8, device="cuda")
    for row in window if window.dim() == 5 else window.unsqueeze(0):
        form.write_span_(row, 0, torch.randn(shape[-1], 2, shape[-2], dim, device="cuda").to(dtype))
    assert kernels_for(window) is not None, "Triton works on every machine that these tests are for"
    by_kernel = torch.stack(form.read(window, tokens))
    monkeypatch.setattr(kv_formats, "kernels_for", lambda tensor: None)
    assert torch.equal(by_kernel, torch.stack(form.read(window, tokens)))


def test_8_bits_are_read_to_the_end_of_a_window_beyond_2_gib() -> None:
    """2.3 GB of records, and 4.4 GB of values: the last row is read as by itself."""
    form = kv_format("int8", torch.bfloat16, 128)
    window = torch.zeros(130, 8, 8192, 2, form.record_bytes, dtype=torch.uint8, device="cuda")
    form.write_span_(window[-1], 0, torch.randn(8192, 2, 8, 128, device="cuda").bfloat16())
    for whole, alone in zip(form.read(window, 8192), form.read(window[-1], 8192), strict=True):
        assert alone.any()
        assert torch.equal(whole[-1], alone)
        assert not whole[0].any()


PROMPTS = [[(7 * row + place) % 5000 + 100 for place in range(700 + 150 * row)] for row in range(8)]
"""Eight ragged rows."""


def answered(cache: Path, topk_blk: int, **more: Any) -> tuple[LLaMA, list[list[int]]]:
    """With rows of up to 8 blocks, three of them moved at a time."""
    config = {"synthetic": "Llama-3.2-1B:layers=8", "cache_dir": cache, "gpu_cached_layers": 2, **more}
    config |= {"micro_batch": 3, "prefill_chunk_tokens": 512}
    sizes: dict[str, Any] = {"device": "cuda", "max_seq_len": 2048, "max_batch_size": 8, "topk_blk": topk_blk}
    with LLaMA.build(None, mode="stream", mode_config=config, **sizes) as llm:
        return llm, llm.generate(PROMPTS, max_new_tokens=12, temperature=0.0, ignore_eos=True).tokens


def less_kv(llm: LLaMA, share: float) -> float:
    """Bytes of so much of the KV, in GiB."""
    layout = llm.plan.kv.layout
    return share * layout.batch * layout.row_bytes * layout.n_layers / 2**30


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_the_kernel_changes_no_token(kv_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 of 8 blocks are brought a step; all KV but a part of it below the GPU."""
    whole, _ = answered(tmp_path, 3, kv_dtype=kv_dtype)
    budget = whole.plan.gpu_bytes / 2**30 - less_kv(whole, 0.5)
    below, by_kernel = answered(tmp_path, 3, kv_dtype=kv_dtype, gpu_mem_gb=budget)
    assert len(below.plan.kv.below) > 4
    monkeypatch.setattr(tiers, "gather_on", lambda device: gather)
    assert answered(tmp_path, 3, kv_dtype=kv_dtype, gpu_mem_gb=budget)[1] == by_kernel


@pytest.mark.parametrize("topk_blk", [0, 3])
def test_kv_on_a_device_is_that_of_cpu_memory_and_its_rates_are_probed(
    topk_blk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = answered(tmp_path, topk_blk)
    budget = whole.plan.gpu_bytes / 2**30 - less_kv(whole, 0.5)
    below, in_memory = answered(tmp_path, topk_blk, gpu_mem_gb=budget)
    found = dict[str, Ceiling]()
    probing = partial(LLaMA.assemble, before_load=lambda llm: found.update(probe(llm)))
    monkeypatch.setattr(LLaMA, "assemble", probing)
    short = below.plan.cpu_bytes / 2**30 - less_kv(whole, 0.4)
    device = tmp_path / "kv"
    llm, tokens = answered(tmp_path, topk_blk, gpu_mem_gb=budget, cpu_mem_gb=short, kv_device=str(device))
    assert llm.plan.kv.disk
    assert tokens == in_memory
    assert not device.exists()
    assert {"h2d", "matmul", "matmul_burst", "kv_read", "kv_write"} <= found.keys()
    assert all(ceiling.value >= ceiling.median > 0 for ceiling in found.values())
