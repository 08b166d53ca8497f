"""Where a layer's time goes on one CUDA device: python tests/gpu/profile_layer.py [part …]

Parts: ``decode`` (a pass of the 8B shape at B=1, 8 and 32, in bf16 and int4: captured, its time against the bytes; then
kernel by kernel; norm and head), ``prefill`` (a chunk of the 70B shape), each with what is fused and without. Some 20 s
each; 16 GiB of GPU memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama.batch import decode_batch, prefill_batch
from llama.config import PRESETS, ModelConfig
from llama.fused import ops
from llama.graphs import DecodeGraphs
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.names import QKV
from tests.gpu.decode_rates import GPU, milliseconds, weights
from wsm.formats.registry import get
from wsm.layout.groups import Encoded, GroupId, Stored, pass_order

LAYERS, PROMPT, CHUNK = 8, 160, 2048


class Resident:
    """A model's weights, made on the device."""

    resident = True

    def __init__(self, config: ModelConfig, weight_format: str | None) -> None:
        self.globals = {spec.name: made(spec.shape) for spec in config.specs(None)}
        self._groups = {group: self._group(config, group, weight_format) for group in pass_order(config.n_layers)}

    def _group(self, config: ModelConfig, group: GroupId, weight_format: str | None) -> dict[str, Stored]:
        shapes = {spec.name: spec.shape for spec in config.specs(group.kind)}
        plain = {name: made(shape) for name, shape in shapes.items() if name not in QKV}
        if group.kind == "attn":
            rows = [shapes[name][0] for name in QKV]
            plain |= dict(zip(QKV, made((sum(rows), config.dim)).split(rows), strict=True))
        if weight_format is None:
            return dict(plain)
        form = get(weight_format)
        return {
            name: tensor if tensor.dim() == 1 else Encoded(form.name, tuple(tensor.shape), tensor.dtype, encoded)
            for name, tensor in plain.items()
            for encoded in [form.encode(tensor) or {} if tensor.dim() == 2 else {}]
        }

    def acquire(self, group: GroupId) -> AbstractContextManager[Mapping[str, Stored]]:
        return nullcontext(self._groups[group])

    def acquire_all(self) -> AbstractContextManager[Mapping[GroupId, Mapping[str, Stored]]]:
        return nullcontext(self._groups)

    def nbytes(self) -> int:
        """Of all layers."""
        parts = itertools.chain.from_iterable(group.values() for group in self._groups.values())
        return sum(sum(p.nbytes for p in t.planes.values()) if isinstance(t, Encoded) else t.nbytes for t in parts)


def made(shape: tuple[int, ...]) -> Tensor:
    return weights(shape) if len(shape) == 2 else torch.ones(shape, device=GPU, dtype=torch.bfloat16)


def both_ways(work: Callable[[str], None]) -> None:
    with mock.patch.object(ops, "_launchers", return_value=None):  # torch's own operations
        work("before")
    work("fused ")


def kernels_of(work: Callable[[], object], layers: int, most: int = 14) -> None:
    """The kernels of one of the ``layers``: how many, microseconds in all, name."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    total, count = sum(e.self_device_time_total for e in events), sum(e.count for e in events)
    print(f"    each: {count / layers:.1f} kernels, {total / layers:.1f} us in them")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:most]:
        print(f"    {event.count / layers:6.2f} {event.self_device_time_total / layers:8.2f} us  {event.key[:100]}")
    sys.stdout.flush()


@torch.inference_mode()
def decode() -> None:
    hbm = read_gbps()
    print(f"decode, 8B shape, {LAYERS} layers, {PROMPT} tokens before; a read of memory runs at {hbm:.0f} GB/s")
    config = dataclasses.replace(PRESETS["Llama-3.1-8B"], n_layers=LAYERS, vocab_size=1024)
    for weight_format, rows in itertools.product((None, "int4"), (1, 8, 32)):
        if weight_format and rows == 32:
            continue
        held = Resident(config, weight_format)

        def measure(which: str, held: Resident = held, rows: int = rows, name: str = weight_format or "bf16") -> None:
            model, kv = Transformer(config, held, GPU, 512), KVCache(config, rows, 512, GPU, torch.bfloat16)
            graphs = DecodeGraphs(model.groups, kv, GPU)
            graphs.prepare(model.layers, rows, PROMPT + 1, PROMPT + 1, CHUNK)
            (graph, _), *_ = graphs.captured.values()
            zeros = torch.zeros(rows, dtype=torch.int64, device=GPU)
            batch = decode_batch(zeros, zeros + PROMPT, [PROMPT] * rows)
            graphs.replayed(batch)  # its positions
            ms = replayed_ms(graph) / LAYERS
            floor = held.nbytes() / LAYERS / hbm / 1e6
            print(f"  {name} B={rows:2} {which}: {ms * 1e3:7.1f} us a layer, {ms / floor:.3f} x its bytes", flush=True)
            kernels_of(lambda: model.layers(batch, kv, lambda g: model.groups.acquire(g), CHUNK), LAYERS)

        both_ways(measure)
    head(hbm)


def read_gbps() -> float:
    read = weights((1 << 15, 1 << 14)).view(torch.float32)
    return read.nbytes / milliseconds(read.sum) / 1e6


def replayed_ms(graph: torch.cuda.CUDAGraph) -> float:
    samples = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return statistics.median(samples[2:])


def head(hbm: float) -> None:
    """Norm and head of the whole vocabulary."""
    held = Resident(dataclasses.replace(PRESETS["Llama-3.1-8B"], n_layers=1), None)
    model = Transformer(dataclasses.replace(PRESETS["Llama-3.1-8B"], n_layers=1), held, GPU, 512)
    for rows in (1, 8, 32):
        h = torch.randn(rows, 4096, device=GPU).bfloat16()
        floor = held.globals["output"].nbytes / hbm / 1e6

        def measure(which: str, h: Tensor = h, rows: int = rows, floor: float = floor) -> None:
            ms = milliseconds(lambda: model.head(h, CHUNK))
            print(f"  head B={rows:2} {which}: {ms * 1e3:.1f} us, {ms / floor:.3f} x its bytes", flush=True)
            kernels_of(lambda: model.head(h, CHUNK), 1)

        both_ways(measure)


@torch.inference_mode()
def prefill() -> None:
    print(f"prefill, 70B shape, 2 layers, one chunk of {CHUNK} tokens: 2 016 of a row and 32 of the next")
    config = dataclasses.replace(PRESETS["Llama-3.1-70B"], n_layers=2, vocab_size=1024)
    held = Resident(config, None)
    flops = 2 * CHUNK * held.nbytes() / 2 + 4 * 2 * config.n_heads * config.head_dim * 2016 * 2017 / 2
    a, b = weights((8192, 8192)), weights((8192, 8192))
    burst = 2 * 8192**3 / milliseconds(lambda: torch.mm(a, b.t())) / 1e9
    many = 400
    long = 2 * 8192**3 / milliseconds(lambda: [torch.mm(a, b.t()) for _ in range(many)], many) / 1e9
    print(f"  products of 8192^3: {burst:.0f} TFLOPs in a burst, {long:.0f} sustained")

    def measure(which: str) -> None:
        model, kv = Transformer(config, held, GPU, 2304), KVCache(config, 2, 2304, GPU, torch.bfloat16)
        batch = prefill_batch([[7] * 2016, [9] * 32], range(2), GPU)
        work = lambda: model.layers(batch, kv, lambda g: model.groups.acquire(g), CHUNK)  # noqa: E731
        ms = milliseconds(work)
        print(f"  {which}: {ms / 2 * 1e3:.0f} us a layer, {flops / ms / 1e9:.0f} TFLOPs", flush=True)
        kernels_of(work, 2)

    both_ways(measure)


if __name__ == "__main__":
    PARTS = {"decode": decode, "prefill": prefill}
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
