"""`pack --calibrate`: a text is read by the unquantised model, so that quantising knows which errors matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from bench.options.verb_flags import PackOptions
from bench.run.quality import read_text, windows_of
from llama.calibration import Calibration as Prefill
from llama.inputs import Inputs
from llama.llm import LLaMA
from llama.loading import Reporter
from llama.opening import open_inputs
from llama.options import BuildOptions
from llama.plans import plan_run
from wsm.errors import DoesNotFit, UnusableInput
from wsm.formats import registry
from wsm.formats.format import GPU_PIECE
from wsm.formats.integer import Integer
from wsm.layout.groups import KINDS
from wsm.plan.hardware import GIB, measure_hardware
from wsm.plan.inputs import RunShape
from wsm.plan.plan import Plan
from wsm.store.pack import Calibration
from wsm.words import counted


@contextmanager
def calibrated(options: PackOptions, reporter: Reporter) -> Iterator[Calibration | None]:
    """What packing asks for the importance of each group's inputs; None where no text was given.

    The model streams from its checkpoint, beside the memory that quantising its largest matrix takes. Where that is not
    there, errors are weighted with the mean square of each input, and nothing makes up for them.
    """
    if options.calibrate is None:
        yield None
        return
    named = ("checkpoints", "synthetic", "cache_dir", "dtype", "device", "gpu_mem_gb", "cpu_mem_gb")
    build = BuildOptions(mode="mixed", auto=True, **{name: getattr(options, name) for name in named})
    inputs = open_inputs(build)
    _check(options, inputs)
    text = read_text(options.calibrate, "--calibrate")
    windows = windows_of(inputs.tokenizer, text, options.window, options.windows, f"--calibrate {options.calibrate}")
    feedback, plan, taken = _planned(build, inputs, windows)
    windows = windows[: plan.shape.batch]
    tokens, how = sum(map(len, windows)), "error feedback" if feedback else "a weighted search"
    reporter.say(
        f"[INFO] quantising with {how}, by {counted(tokens, 'token')} of {options.calibrate} in "
        f"{counted(len(windows), 'window')}"
    )
    told = {
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": tokens,
        "window": options.window,
        "error_feedback": feedback,
    }
    with (
        LLaMA.assemble(inputs, plan, reporter, measured=False, packed=False, beside_bytes=taken) as llm,
        Prefill(llm, windows, feedback=feedback) as prefill,
    ):
        yield Calibration(prefill.moments, told)


def _check(options: PackOptions, inputs: Inputs) -> None:
    name, config, brought = options.weight_format, inputs.checkpoint.config, inputs.checkpoint.formats
    if brought is not None:
        raise UnusableInput(
            f"--calibrate has no use for {config.name}, which is quantised already, in {brought.name}, and packed as "
            "it is: leave it out, or take the unquantised checkpoint"
        )
    if name in ("auto", "bfloat16", "float16", "float32") or not isinstance(registry.get(name), Integer):
        raise UnusableInput(f"--calibrate has no use for --weight-format {name}: int4 and int8 are quantised with it")
    if (options.tp or 1) > 1:
        raise UnusableInput("--calibrate packs for one rank: leave out --tp")


def _planned(build: BuildOptions, inputs: Inputs, windows: list[list[int]]) -> tuple[bool, Plan, int]:
    """Whether there is memory for error feedback, the plan of the most windows that fit in one prefill, and the bytes
    that quantising takes beside it."""
    config, hardware = inputs.checkpoint.config, measure_hardware(inputs.device)
    free = hardware.gpu_available_bytes if hardware.has_gpu else hardware.cpu_available_bytes
    asked = build.gpu_mem_gb if hardware.has_gpu else build.cpu_mem_gb
    room = min(free or 0, int(asked * GIB)) if asked is not None else free or 0
    matrices = {kind: [spec.shape for spec in config.specs(kind) if len(spec.shape) == 2] for kind in KINDS}
    searched, solved = (max(map(bytes_of, matrices.values())) for bytes_of in (_search_bytes, _solver_bytes))
    budget = "gpu_mem_gb" if hardware.has_gpu else "cpu_mem_gb"
    for feedback, taken in ((True, solved + searched), (False, searched)):
        rows = len(windows)
        while rows and room > taken:
            longest = len(windows[0])
            less: dict[str, Any] = {budget: (room - taken) / GIB}
            plan = plan_run(replace(build, **less), inputs, RunShape(rows, longest, 1, rows * longest))
            if plan.fits and plan.wave_rows >= rows:
                return feedback, plan, taken
            rows //= 2
    raise DoesNotFit("there is no memory for one window of the text beside the model: lower --window")


def _search_bytes(matrices: Sequence[tuple[int, ...]]) -> int:
    """What quantising the largest of a group's matrices takes: it in bf16 and float32, and a piece that is searched."""
    weights = max(rows * columns for rows, columns in matrices)
    return 10 * weights + 32 * min(weights, GPU_PIECE)


def _solver_bytes(matrices: Sequence[tuple[int, ...]]) -> int:
    """The moments of a group's inputs, and what turning the largest into error feedback takes beside them."""
    squares = [4 * columns * columns for _, columns in matrices]
    return sum(squares) + 2 * max(squares)
