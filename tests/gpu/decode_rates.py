"""Rates of the weight formats on one CUDA device: python tests/gpu/decode_rates.py [part …]

Parts: ``decode`` (GB/s of bfloat16 made of each format, by Triton and by torch), ``product`` (packed products against
cuBLAS), ``encode`` (the weighted search), ``tune-decoders`` and ``tune-product`` (what the constants in
wsm/formats/*kernels.py come from). About a minute each, two for the last; 8 GiB of GPU memory.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.wsm.formats.matrices import planes_of
from wsm.formats import backend, gguf_kernels, kernels, product_kernels
from wsm.formats.format import MOST_ROWS, WeightFormat
from wsm.formats.integer import Integer
from wsm.formats.registry import ALL, BLOCK_TYPES, get

GPU = torch.device("cuda", 0)
LARGE = {"w1": (28672, 8192), "w2": (8192, 28672), "wq": (8192, 8192)}
"""Of Llama-3.1-70B."""
SMALL = {"wq": (4096, 4096), "wk": (1024, 4096), "w1": (14336, 4096), "w2": (4096, 14336)}
"""Of Llama-3.1-8B; a layer has wq and wo, wk and wv, w1 and w3 alike."""
Planes = dict[str, Tensor]
IN_A_LAYER = {"wq": 2, "wk": 2, "w1": 2, "w2": 1}
BEYOND_CACHE = 256 << 20
"""Bytes of weights that a measured graph goes through, so that none are in the GPU's cache when it comes to them."""


def milliseconds(work: Callable[[], object], times: int = 1) -> float:
    """Of one of the ``times`` that ``work`` does it: the median of 7 replays of a CUDA graph of it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        samples = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / times)
    return statistics.median(samples[1:])


def weights(shape: tuple[int, int]) -> Tensor:
    torch.manual_seed(7)
    return (torch.randn(shape, device=GPU) * 0.02).bfloat16()


def rate(work: Callable[[], object], out: Tensor) -> float:
    """GB/s of ``out`` that ``work`` fills."""
    return out.nbytes / milliseconds(work) / 1e6


def decode() -> None:
    """GB/s of bfloat16, and those of all bytes that are read and written."""
    print("decode, GB/s of bfloat16: Triton (with what it reads), torch")
    for (matrix, shape), name in itertools.product(LARGE.items(), ALL):
        out, form = weights(shape), get(name)
        planes = planes_of(form, out)
        by_triton = rate(lambda: form.decode_(planes, out), out)  # noqa: B023 (called at once)
        moved = 1 + sum(plane.nbytes for plane in planes.values()) / out.nbytes
        with mock.patch.object(backend, "_loaded", return_value=(None, "torch")):
            by_torch = rate(lambda: form.decode_(planes, out), out)  # noqa: B023
        print(f"  {matrix} {name:8} {by_triton:6.0f} ({by_triton * moved:4.0f})  {by_torch:6.0f}", flush=True)


def copies(shape: tuple[int, int], form: WeightFormat | None) -> list[Planes]:
    """The planes of a matrix (None: itself), as often as it takes to be beyond the cache."""
    weight = weights(shape)
    planes = {"weight": weight} if form is None else planes_of(form, weight)
    count = -(-BEYOND_CACHE // sum(plane.nbytes for plane in planes.values()))
    return [{name: plane.clone() for name, plane in planes.items()} for _ in range(count)]


def layer_ms(form: WeightFormat | None, rows: int, *, decoded: bool = False) -> list[float]:
    """All products of an 8B layer with ``rows`` rows, matrix by matrix, counted as often as a layer has each: packed,
    decoded first, or (no ``form``) cuBLAS in bfloat16."""
    times = []
    for matrix, shape in SMALL.items():
        x, out = torch.randn(rows, shape[1], device=GPU).bfloat16(), torch.empty(rows, shape[0], device=GPU).bfloat16()
        all_planes, scratch = COPIES[matrix, form and form.name], weights(shape)

        def multiply(
            x: Tensor = x, out: Tensor = out, scratch: Tensor = scratch, all_planes: list[Planes] = all_planes
        ) -> None:
            for planes in all_planes:
                if form is None:
                    torch.mm(x, planes["weight"].t(), out=out)
                elif decoded:
                    form.decode_(planes, scratch)
                    torch.mm(x, scratch.t(), out=out)
                else:
                    assert form.linear(x, planes, (out.shape[1], x.shape[1]), out) is not None

        times.append(IN_A_LAYER[matrix] * milliseconds(multiply, len(all_planes)))
    return times


COPIES: dict[tuple[str, str | None], list[Planes]] = {}


def prepare(*forms: WeightFormat | None) -> None:
    for form, (matrix, shape) in itertools.product(forms, SMALL.items()):
        COPIES.setdefault((matrix, form and form.name), copies(shape, form))


def product() -> None:
    """An 8B layer's products; at more rows than a packed product takes, decoding and cuBLAS."""
    forms = [get(name) for name in ("int4", "int4-g32", "int8", *BLOCK_TYPES)]
    prepare(None, *forms)
    print(f"products of an 8B layer, ms: all (its ratio to cuBLAS in bfloat16), and those of {', '.join(SMALL)}")
    for rows in (1, 8, 16, 32):
        plain = layer_ms(None, rows)
        for form in (None, *forms):
            times = plain if form is None else layer_ms(form, rows, decoded=rows > MOST_ROWS)
            each = " ".join(f"{ms:.4f}" for ms in times)
            name = form.name if form is not None else "bfloat16"
            print(f"  B={rows:2} {name:8} {sum(times):.4f} ({sum(times) / sum(plain):.2f})  {each}", flush=True)


def encode() -> None:
    """Weights a second of the weighted search; all 80 layers of 70B are 68.5e9."""
    weight, importance = weights(LARGE["w1"]), torch.rand(LARGE["w1"][1], device=GPU).square()
    print("encode with a search, 1e9 weights/s")
    for name in ("int4", "int4-g32", "int8"):
        get(name).encode(weight, importance)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        get(name).encode(weight, importance)
        end.record()
        end.synchronize()
        print(f"  {name:8} {weight.numel() / begin.elapsed_time(end) / 1e6:.2f}", flush=True)


def tune_decoders() -> None:
    """Every tuning of each decoder, the best ones first."""
    out = weights(LARGE["w1"])
    tuned = {"exact": "EXACT", "int4": "INT4", "int8": "BYTES", "fp8": "BYTES"}
    for name, kernel in (tuned | dict.fromkeys(BLOCK_TYPES, "BLOCKS")).items():
        planes, rates = planes_of(get(name), out), []
        for tuning in itertools.starmap(kernels.DecodeTuning, itertools.product((512, 1024, 2048, 4096, 8192), (4, 8))):
            with mock.patch.object(kernels if name in tuned else gguf_kernels, kernel, tuning):
                rates.append((rate(lambda: get(name).decode_(planes, out), out), tuning))  # noqa: B023
        print(name, *(f"{gbps:.0f} {tuple(tuning)};" for gbps, tuning in sorted(rates, reverse=True)), flush=True)


def tune_product() -> None:
    """The best tunings of the packed product, with the milliseconds of each matrix."""
    for name, rows in (("int4", 1), ("int4", 8), ("int8", 1), ("q8_0", 1), ("q4_K", 1), ("q6_K", 1)):
        form, times = get(name), []
        prepare(form)
        for values in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4), (264, 528, 1056), (2, 4)):
            tuning = product_kernels.ProductTuning(*values)
            if 8 <= tuning.rows // tuning.warps <= 32:
                with (
                    mock.patch.dict(product_kernels.PRODUCT, {form.bits: tuning})
                    if isinstance(form, Integer)
                    else mock.patch.object(gguf_kernels, "PRODUCT", tuning)
                ):
                    each = layer_ms(form, rows)
                times.append((sum(each), tuple(tuning), " ".join(f"{ms:.4f}" for ms in each)))
        print(
            name, f"B={rows}", *(f"\n  {ms:.4f} {tuning} {each}" for ms, tuning, each in sorted(times)[:8]), flush=True
        )


if __name__ == "__main__":
    print(torch.cuda.get_device_name(GPU), torch.__version__, backend.decoder(GPU), flush=True)
    for part in sys.argv[1:] or ["decode", "product", "encode"]:
        {
            "decode": decode,
            "product": product,
            "encode": encode,
            "tune-decoders": tune_decoders,
            "tune-product": tune_product,
        }[part]()
