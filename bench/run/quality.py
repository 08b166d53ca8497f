"""Two models over one text: how far a weight format moves what the model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.options.verb_flags import QualityOptions
from bench.result.quality import WindowQuality
from llama.inputs import Inputs
from llama.llm import LLaMA
from llama.loading import Reporter
from llama.opening import open_inputs
from llama.options import BuildOptions
from llama.plans import plan_run
from llama.sources import find_store
from llama.tokenizer import Tokenizer
from wsm.disk.files import read_file, text_of
from wsm.errors import DoesNotFit, UnusableInput
from wsm.option import options_of
from wsm.plan.hardware import GIB, measure_hardware
from wsm.plan.inputs import RunShape
from wsm.words import counted

POSITIONS_AT_ONCE = 128
"""Whose probabilities are compared together: three float32 copies of so many vocabularies."""


def options_of_both(options: QualityOptions) -> tuple[BuildOptions, BuildOptions]:
    """Of the reference, which is the checkpoint as it is, and of the model that is measured."""
    model = BuildOptions(**{name: getattr(options, name) for name in options_of(BuildOptions)})
    # A KV device is one model's own.
    plain: dict[str, Any] = {"weight_format": "auto", "manifest": None, "raw_device": None, "kv_device": None}
    return dataclasses.replace(model, checkpoints=options.reference or model.checkpoints, **plain), model


def read_text(path: Path, flag: str) -> str:
    """A UTF-8 file; UnusableInput where it is none."""
    label = f"{flag} {path}"
    return text_of(read_file(path, label, pipes=True), label)


def windows_of(tokenizer: Tokenizer, text: str, window: int, most: int | None, label: str) -> list[list[int]]:
    """``text`` in windows of equal length, each behind the special tokens that a text begins with; the rest is left."""
    prefix, ids = list(tokenizer.prefix), tokenizer.encode(text)
    length = window - len(prefix)
    if length < 2:
        raise UnusableInput(
            f"--window {window} has no room for text behind {counted(len(prefix), 'special token')}: raise it"
        )
    found = [[*prefix, *ids[begin : begin + length]] for begin in range(0, len(ids) - length + 1, length)]
    if not found:
        raise UnusableInput(
            f"{label} has {counted(len(ids), 'token')}, fewer than a window of {window}: take a longer text or "
            "a smaller --window"
        )
    return found[:most]


def compare_windows(
    options: QualityOptions, windows: Sequence[Sequence[int]], reporter: Reporter, advance: Callable[[int], None]
) -> list[WindowQuality]:
    """Both models over all windows, teacher-forced, a batch of windows at a time; in memory are the logits of one."""
    found = list[WindowQuality]()
    shape = RunShape(options.batch_size, options.window - 1, 1, options.batch_size * (options.window - 1))
    with ExitStack() as stack:
        opened = [(build, open_inputs(build)) for build in options_of_both(options)]
        for _, inputs in opened:
            stack.callback(inputs.close)
        budgets, logits = _half_budgets(options, opened[0][1])
        beside = int(budgets.get("gpu_mem_gb", 0) * GIB) + logits  # of the device: the other model's half, too
        models = []
        for build, inputs in opened:
            build = dataclasses.replace(build, **budgets)
            find_store(build, inputs, shape, reporter)
            plan = plan_run(build, inputs, shape)
            llm = LLaMA.assemble(inputs, plan, reporter, measured=False, beside_bytes=beside)
            models.append(stack.enter_context(llm))
        _check_alike(*models)
        for begin in range(0, len(windows), options.batch_size):
            some = windows[begin : begin + options.batch_size]
            reference, model = (llm.logits(some) for llm in models)
            for row, tokens in enumerate(some):
                found.append(_window(reference[row, :-1], model[row, :-1], tokens[1:]))
                advance(len(tokens) - 1)
            del reference, model
    return found


def _half_budgets(options: QualityOptions, inputs: Inputs) -> tuple[dict[str, Any], int]:
    """Half of the memory for each of the two models, in GiB, without what the logits of both take; and those bytes."""
    hardware = measure_hardware(inputs.device)
    logits = 2 * options.batch_size * options.window * inputs.checkpoint.config.vocab_size * 4
    logits += 3 * POSITIONS_AT_ONCE * inputs.checkpoint.config.vocab_size * 4
    available = {"gpu_mem_gb": hardware.gpu_available_bytes, "cpu_mem_gb": hardware.cpu_available_bytes}
    budgets = dict[str, Any]()
    for name, free in available.items():
        asked = getattr(options, name)
        limits = [free] if free is not None else []
        limits += [int(asked * GIB)] if asked is not None else []
        if not limits:
            continue
        here, room = name == ("gpu_mem_gb" if hardware.has_gpu else "cpu_mem_gb"), min(limits)
        budgets[name] = (room - logits * here) / 2 / GIB
        if budgets[name] <= 0:
            raise DoesNotFit(
                f"the logits of {counted(options.batch_size, 'window')} take {logits / GIB:.2f} GiB, and there are "
                f"{room / GIB:.2f}: lower --batch-size or --window"
            )
    return budgets, logits


def _check_alike(reference: LLaMA, model: LLaMA) -> None:
    sizes = reference.inputs.checkpoint.config.vocab_size, model.inputs.checkpoint.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UnusableInput(
            f"--reference has a vocabulary of {sizes[0]}, the model one of {sizes[1]}: they cannot be compared"
        )


def _window(reference: Tensor, model: Tensor, following: Sequence[int]) -> WindowQuality:
    """Sums over the positions of float32 logits ``[n, vocab]``, whose next tokens are ``following``."""
    sums = torch.zeros(4, dtype=torch.float64, device=model.device)
    targets = torch.tensor(following, device=model.device).unsqueeze(1)
    for begin in range(0, len(following), POSITIONS_AT_ONCE):
        part = slice(begin, begin + POSITIONS_AT_ONCE)
        theirs, ours = (F.log_softmax(logits[part].to(model.device), dim=-1) for logits in (reference, model))
        sums[0] -= theirs.gather(1, targets[part]).double().sum()
        sums[1] -= ours.gather(1, targets[part]).double().sum()
        sums[3] += (theirs.argmax(1) == ours.argmax(1)).sum()
        sums[2] += F.kl_div(ours, theirs, reduction="none", log_target=True).double().sum()
    reference_nll, nll, kl, equal = sums.tolist()
    return WindowQuality(len(following), reference_nll, nll, kl, int(equal))
