"""What a run takes besides weights is bounded, not by far; what there is, is what the container leaves."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llama.config import ModelConfig
from llama.generation import GenerationOptions, generate
from llama.kv.cache import KVCache
from llama.llm import LLaMA
from llama.model import Transformer
from llama.weights import TensorWeights
from tests.plans import inputs_for
from wsm.plan.hardware import GIB, CgroupMemory, Hardware, cgroup_memory, cpu_available, limit_device_memory
from wsm.plan.inputs import RunShape
from wsm.plan.memory import MemoryKind, Portions, activation_bytes, decode_split_bytes, gpu_lines
from wsm.plan.placement import place
from wsm.settings import Settings


def peak_bytes(config: ModelConfig, prompts: list[list[int]], chunk_tokens: int) -> int:
    """The most memory that generating 2 tokens a row takes beside weights and KV, as the allocator sees it."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    longest = max(map(len, prompts)) + 2
    weights = TensorWeights(_Seeded(config), device, dtype)  # type: ignore[arg-type]
    kv = KVCache(config, len(prompts), longest, device, dtype)
    options = GenerationOptions(2, 0.6, 0.9, 0, frozenset(), True, chunk_tokens, len(prompts))
    model = Transformer(config, weights, device, longest)
    generate(model, kv, prompts, options)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        generate(model, kv, prompts, options)
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


class _Seeded:
    """Small random weights of any shape."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("lengths", "chunk_tokens", "vocab"),
    [
        ([768], 1024, 500),
        ([900, 300, 700], 512, 500),
        ([16] * 48, 16, 500),
        ([32] * 4, 64, 60_000),
        ([24] * 40, 2048, 30_000),
    ],
)
def test_activations_are_bounded_and_not_by_far(lengths: list[int], chunk_tokens: int, vocab: int) -> None:
    config = ModelConfig("m", 512, 2, 8, 2, 64, 1536, vocab)
    prompts = [[1 + i % 400 for i in range(length)] for length in lengths]
    peak = peak_bytes(config, prompts, chunk_tokens)
    shape = RunShape(len(lengths), max(lengths), 2, sum(lengths))
    inputs = inputs_for(config, shape=shape, hardware=Hardware("cpu", None, None, 0, GIB))
    bound = activation_bytes(inputs, Portions(chunk_tokens, len(lengths), len(lengths)))
    assert peak <= bound <= 1.5 * peak + (1 << 20), (peak, bound)


def test_what_the_splits_of_long_rows_leave_is_planned() -> None:
    """128 rows that grow to 8 192 tokens from short prompts: attention leaves more than a chunk's activations take."""
    config = ModelConfig("m", 512, 2, 8, 2, 64, 1536, 500)
    short, long = (RunShape(128, 8, new_tokens, 128 * 8) for new_tokens in (8, 8184))
    portions = Portions(1024, 128, 128)
    bounds = [activation_bytes(inputs_for(config, shape=shape), portions) for shape in (short, long)]
    splits = 128 * 2 * 64 * 16 * (64 + 2) * 4
    assert decode_split_bytes(128, 8, 2, 64, 8192) == splits
    assert bounds[0] < splits < bounds[1]
    inputs = inputs_for(config, Settings(mode="full"), long)
    lines = gpu_lines(inputs, place(2, inputs.settings), portions)
    assert sum(line.nbytes for line in lines if line.kind == MemoryKind.GRAPHS) > splits


# -- limits of this machine


def write_cgroup(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


def test_cgroup_v2_limit_counts_the_page_cache_as_free(tmp_path: Path) -> None:
    root, own = tmp_path / "fs", tmp_path / "own"
    own.write_text("0::/a/b\n")
    stat = "anon 5\ninactive_file 300\nactive_file 100\n"
    write_cgroup(root / "a" / "b", memory__max="max\n", memory__current="50\n")
    write_cgroup(root / "a", memory__max="1000\n", memory__current="700\n", memory__stat=stat)
    write_cgroup(root, memory__max="2000\n", memory__current="900\n")
    assert cgroup_memory(root, own) == CgroupMemory(1000, 700)


def test_cgroup_v1_limit_is_read_and_none_is_none(tmp_path: Path) -> None:
    root, own = tmp_path / "fs", tmp_path / "own"
    own.write_text("7:cpu,memory:/job\n1:name=systemd:/x\n")
    directory = root / "memory" / "job"
    write_cgroup(directory, memory__limit_in_bytes="5000", memory__usage_in_bytes="1500")
    write_cgroup(directory, memory__stat="total_inactive_file 500\n")
    assert cgroup_memory(root, own) == CgroupMemory(5000, 4000)
    write_cgroup(directory, memory__limit_in_bytes=str((1 << 63) - 4096))
    assert cgroup_memory(root, own) is None
    assert cgroup_memory(tmp_path / "nowhere", tmp_path / "nothing") is None


def test_cpu_budget_leaves_4_gib_or_5_percent() -> None:
    assert cpu_available(20 * GIB, 24 * GIB, None) == 16 * GIB
    assert cpu_available(400 * GIB, 500 * GIB, None) == 375 * GIB
    assert cpu_available(400 * GIB, 500 * GIB, CgroupMemory(64 * GIB, 50 * GIB)) == 46 * GIB
    assert cpu_available(GIB, 2 * GIB, None) == 0


@pytest.fixture
def fraction(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The only element: what a fake GPU of 80 GiB lets this process take."""
    allowed = [0.9]
    cuda = {
        "mem_get_info": lambda device: (1, 80 * GIB),
        "get_per_process_memory_fraction": lambda device: allowed[0],
        "set_per_process_memory_fraction": lambda fraction, device: allowed.__setitem__(0, fraction),
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return allowed


def test_a_lifted_limit_leaves_what_was_before(fraction: list[float]) -> None:
    lift = limit_device_memory(torch.device("cuda", 0), 21 * GIB, GIB)
    assert fraction == [0.25]
    lift()
    assert fraction == [0.9]
    fraction[0] = 0.8  # the user's own, since then
    lift()
    assert fraction == [0.8]
    limit_device_memory(torch.device("cuda", 0), None, GIB)()
    assert fraction == [0.8]


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_limits_the_one_that_is_left_counts(first: int, fraction: list[float]) -> None:
    lifts = [limit_device_memory(torch.device("cuda", 0), n * GIB, GIB) for n in (21, 41)]
    assert fraction == [0.5]
    lifts[first]()
    assert fraction == [[0.5, 0.25][first]]
    lifts[1 - first]()
    assert fraction == [0.9]


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_goes_lifts_its_limit(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lifted = list[bool]()
    monkeypatch.setattr("llama.llm.limit_device_memory", lambda *of: lambda: lifted.append(True))
    if fails:
        monkeypatch.setattr(LLaMA, "_load", lambda *of: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            LLaMA.build(None, "full", load_model=True, device="cpu", max_seq_len=16)
    else:
        llm = LLaMA.build(None, "full", load_model=True, device="cpu", max_seq_len=16)
        assert not lifted
        llm.close()
    assert lifted
