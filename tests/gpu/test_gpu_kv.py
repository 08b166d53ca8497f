"""On a CUDA device: chosen KV blocks come over the link as they are, by the kernel as by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama.kv import format as kv_formats
from llama.kv.format import kv_format
from llama.llm import LLaMA
from wsm.engine.arena import PageLockedArena
from wsm.engine.device import open_device
from wsm.formats.backend import kernels_for
from wsm.kv import tiers
from wsm.kv.gather import gather, gather_on

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


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_the_kernel_changes_no_token(kv_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ragged rows of up to 8 blocks, 3 brought a step; all KV but a part of it below the GPU."""
    prompts = [[(7 * row + place) % 5000 + 100 for place in range(700 + 150 * row)] for row in range(8)]
    config: dict[str, Any] = {"synthetic": "Llama-3.2-1B:layers=8", "cache_dir": tmp_path, "gpu_cached_layers": 2}
    config |= {"kv_dtype": kv_dtype, "micro_batch": 3, "prefill_chunk_tokens": 512}

    def tokens(**more: Any) -> tuple[LLaMA, list[list[int]]]:
        with LLaMA.build(
            None,
            mode="stream",
            mode_config={**config, **more},
            device="cuda",
            max_seq_len=2048,
            max_batch_size=8,
            topk_blk=3,
        ) as llm:
            return llm, llm.generate(prompts, max_new_tokens=12, temperature=0.0, ignore_eos=True).tokens

    whole, _ = tokens()
    layout = whole.plan.kv.layout
    budget = (whole.plan.gpu_bytes - 0.5 * layout.batch * layout.row_bytes * layout.n_layers) / 2**30
    below, by_kernel = tokens(gpu_mem_gb=budget)
    assert len(below.plan.kv.below) > 4
    monkeypatch.setattr(tiers, "gather_on", lambda device: gather)
    assert tokens(gpu_mem_gb=budget)[1] == by_kernel
