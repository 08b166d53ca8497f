"""How synthetic models are named on the command line: ``--synthetic NAME…`` and ``--draft synthetic:NAME…``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from llama.checkpoint.agreement import Agreement, CycleDraft, CycleTarget
from llama.checkpoint.synthetic import SyntheticCheckpoint
from llama.config import PRESETS, ModelConfig
from wsm.errors import UnusableInput
from wsm.option import meant

SYNTHETIC_DRAFT = "synthetic:"
"""What a ``--draft`` that is no file begins with."""
DRAFT_SEED = 1
"""Of a draft's weights: a draft of the target's own shape is another model."""


def synthetic_checkpoint(
    spec: str, *, seed: int, dtype: torch.dtype, of_pair: bool = False
) -> SyntheticCheckpoint | CycleTarget:
    """``NAME``, ``NAME:layers=N`` or ``NAME:cycle``, NAME a known model's in any case.

    ``of_pair``: it goes round its vocabulary whether the name says ``cycle`` or not, as a draft of known agreement
    asks. UnusableInput for an unknown name or option.
    """
    config, given = _named(spec, f"--synthetic {spec}", ":layers=N and :cycle", ("cycle",))
    if of_pair or "cycle" in given:
        return CycleTarget(config, seed=seed, dtype=dtype)
    return SyntheticCheckpoint(config, seed=seed, dtype=dtype)


def synthetic_draft(spec: str, *, dtype: torch.dtype) -> SyntheticCheckpoint | CycleDraft:
    """What follows ``synthetic:``: as for ``--synthetic``, or ``NAME:agree=P,second=Q`` (see :func:`is_of_pair`).

    UnusableInput for an unknown name or option, or shares that are none.
    """
    said = f"--draft {SYNTHETIC_DRAFT}{spec}"
    config, given = _named(spec, said, ":layers=N and :agree=P,second=Q", ("agree=", "second="))
    if not given:
        return SyntheticCheckpoint(config, seed=DRAFT_SEED, dtype=dtype)
    agree, second = (_share(given.get(key, "0"), said) for key in ("agree=", "second="))
    if agree + second > 1:
        raise UnusableInput(f"{said}: agree and second are shares of all tokens, and together at most 1")
    return CycleDraft(config, Agreement(agree, second), seed=DRAFT_SEED, dtype=dtype)


def is_of_pair(draft: str | None) -> bool:
    """Whether a ``--draft`` is one of known agreement, which needs the target to go round its vocabulary."""
    return draft is not None and draft.startswith(SYNTHETIC_DRAFT) and ("agree=" in draft or "second=" in draft)


def shape_without_layers(spec: str) -> str:
    """What ``--synthetic`` names, less its ``layers=N``."""
    name, *words = spec.replace(",", ":").split(":")
    return ":".join([name, *(word for word in words if not word.startswith("layers="))])


def _named(spec: str, said: str, known: str, options: Sequence[str]) -> tuple[ModelConfig, dict[str, str]]:
    """The shape, ``layers`` applied, and the other options with their values; colons or commas stand between them.

    An option that has a value is named with its ``=``; ``known`` are all in words.
    """
    asked, colon, rest = spec.partition(":")
    config: ModelConfig | None = {name.lower(): config for name, config in PRESETS.items()}.get(asked.lower())
    if config is None:
        raise UnusableInput(
            f"{said}: {asked!r} is no known model{meant(asked, PRESETS)} (see bench_infer.py --list-models)"
        )
    words = [word.partition("=") for word in rest.replace(":", ",").split(",")] if colon else []
    given = {key + equals: value for key, equals, value in words}
    count = given.pop("layers=", "1")
    is_count = count.isascii() and count.isdecimal() and len(count) <= 6 and int(count) >= 1
    if not is_count or len({key.rstrip("=") for key, _, _ in words}) < len(words) or not given.keys() <= set(options):
        other = next((key for key in given if key not in options), "")
        hint = meant(other, ("layers=", *options)) if other else ""
        raise UnusableInput(f"{said}: after the name only {known} are understood, each once, N at least 1{hint}")
    if any(key == "layers" for key, _, _ in words):
        config = dataclasses.replace(config, name=f"{config.name}:layers={int(count)}", n_layers=int(count))
    return config, given


def _share(text: str, said: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UnusableInput(f"{said}: agree and second are numbers from 0 to 1, not {text!r}")
    return share
