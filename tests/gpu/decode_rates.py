"""Rates of the weight formats on one CUDA device: python tests/gpu/decode_rates.py [part …]

Parts: ``decode`` (GB/s of bfloat16 made of each format, by Triton and by torch), ``product`` (packed products against
cuBLAS), ``encode`` (the weighted search), and ``tune`` (each of the kernels' tunings: the constants come from here).
About 3 minutes for the first three, and 5 for the last; 8 GiB of GPU memory.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wsm.formats import backend, kernels
from wsm.formats.integer import Integer
from wsm.formats.registry import NAMES, get

GPU = torch.device("cuda", 0)
LARGE = {"w1": (28672, 8192), "w2": (8192, 28672), "wq": (8192, 8192)}
"""Of Llama-3.1-70B."""
SMALL = {"wq": (4096, 4096), "wk": (1024, 4096), "w1": (14336, 4096), "w2": (4096, 14336)}
"""Of Llama-3.1-8B; a layer has wq and wo, wk and wv, w1 and w3 alike."""
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
    for (matrix, shape), name in itertools.product(LARGE.items(), NAMES):
        out, form = weights(shape), get(name)
        planes = form.encode(out)
        assert planes is not None
        by_triton = rate(lambda: form.decode_(planes, out), out)  # noqa: B023 (called at once)
        moved = 1 + sum(plane.nbytes for plane in planes.values()) / out.nbytes
        with mock.patch.object(backend, "_loaded", return_value=(None, "torch")):
            by_torch = rate(lambda: form.decode_(planes, out), out)  # noqa: B023
        print(f"  {matrix} {name:8} {by_triton:6.0f} ({by_triton * moved:4.0f})  {by_torch:6.0f}", flush=True)


def copies(shape: tuple[int, int], form: Integer | None) -> list[dict[str, Tensor]]:
    """The planes of a matrix (None: itself), as often as it takes to be beyond the cache."""
    weight = weights(shape)
    planes = {"weight": weight} if form is None else form.encode(weight)
    count = -(-BEYOND_CACHE // sum(plane.nbytes for plane in planes.values()))
    return [{name: plane.clone() for name, plane in planes.items()} for _ in range(count)]


def layer_ms(form: Integer | None, rows: int, tuning: kernels.ProductTuning | None = None) -> float:
    """All products of an 8B layer with ``rows`` rows: packed, or cuBLAS in bfloat16."""
    total = 0.0
    for matrix, shape in SMALL.items():
        x, all_planes = torch.randn(rows, shape[1], device=GPU).bfloat16(), COPIES[matrix, form and form.name]

        def multiply(x: Tensor = x, all_planes: Sequence[dict[str, Tensor]] = all_planes) -> None:
            for planes in all_planes:
                if form is None:
                    F.linear(x, planes["weight"])
                else:
                    out = x.new_empty(rows, planes["values"].shape[0])
                    kernels.multiply_(
                        x, planes["values"], planes["scales"], planes.get("zeros"), out,
                        bits=form.bits, group=form.group, tuning=tuning or kernels.PRODUCT,
                    )  # fmt: skip

        total += IN_A_LAYER[matrix] * milliseconds(multiply, len(all_planes))
    return total


COPIES: dict[tuple[str, str | None], list[dict[str, Tensor]]] = {}


def prepare(*forms: Integer | None) -> None:
    for form, (matrix, shape) in itertools.product(forms, SMALL.items()):
        COPIES.setdefault((matrix, form and form.name), copies(shape, form))


def product() -> None:
    """An 8B layer's products; at more rows than a packed product takes, decoding and cuBLAS."""
    forms = [Integer.named(name) for name in ("int4", "int4-g32", "int8")]
    prepare(None, *forms)
    print("products of an 8B layer, ms: cuBLAS bfloat16; packed (its ratio)")
    for rows in (1, 8, 16):
        plain = layer_ms(None, rows)
        packed = [(form.name, layer_ms(form, rows)) for form in forms if form is not None]
        print(f"  B={rows:2} {plain:.4f}", *(f" {name} {ms:.4f} ({ms / plain:.2f})" for name, ms in packed), flush=True)
    plain = layer_ms(None, 32)
    for form in forms:
        assert form is not None
        total = 0.0
        for matrix, shape in SMALL.items():
            x, scratch = torch.randn(32, shape[1], device=GPU).bfloat16(), weights(shape)
            each = COPIES[matrix, form.name]

            def multiply(each=each, scratch=scratch, x=x, form=form) -> None:  # type: ignore[no-untyped-def]
                for planes in each:
                    form.decode_(planes, scratch)
                    F.linear(x, scratch)

            total += IN_A_LAYER[matrix] * milliseconds(multiply, len(each))
        print(f"  B=32 {plain:.4f}  {form.name}, decoded first {total:.4f} ({total / plain:.2f})", flush=True)


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


def tune() -> None:
    """Every tuning of each kernel, the best ones first."""
    out = weights(LARGE["w1"])
    for name, kernel in (("exact", "EXACT"), ("int4", "INT4"), ("int8", "BYTES"), ("fp8", "BYTES")):
        planes, rates = get(name).encode(out), []
        assert planes is not None
        for tuning in itertools.starmap(kernels.DecodeTuning, itertools.product((512, 1024, 2048, 4096, 8192), (4, 8))):
            with mock.patch.object(kernels, kernel, tuning):
                rates.append((rate(lambda: get(name).decode_(planes, out), out), tuning))  # noqa: B023
        print(name, *(f"{gbps:.0f} {tuple(tuning)};" for gbps, tuning in sorted(rates, reverse=True)), flush=True)
    forms = [Integer.named(name) for name in ("int4", "int8")]
    prepare(*forms)
    for form, rows in itertools.product(forms, (1, 8)):
        times = []
        for values in itertools.product((32, 64, 128), (4, 8), (3, 5), (264, 528, 1056), (2, 4)):
            tuning = kernels.ProductTuning(*values)
            if tuning.rows >= 16 * tuning.warps // 2:
                times.append((layer_ms(form, rows, tuning), tuning))
        ranked = [f"{ms:.4f} {tuple(tuning)};" for ms, tuning in sorted(times)]
        print(form and form.name, f"B={rows}", *ranked[:6], "…", ranked[-1], flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(GPU), torch.__version__, backend.decoder(GPU), flush=True)
    for part in sys.argv[1:] or ["decode", "product", "encode"]:
        {"decode": decode, "product": product, "encode": encode, "tune": tune}[part]()
