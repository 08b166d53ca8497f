"""What the program says of itself: its version, and the models whose shapes it knows. Imports no torch."""

from __future__ import annotations

import platform
from importlib import metadata
from math import prod

from tabulate import tabulate

from bench import __version__
from llama.config import PRESETS, ModelConfig
from wsm.layout.groups import KINDS, Kind


def version_text() -> str:
    """The program's version, torch's and Python's; torch, whose import takes seconds, is asked from outside."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    return f"bench_infer.py {__version__}, torch {torch}, Python {platform.python_version()}"


def models_text() -> str:
    """A line each model that ``--synthetic`` knows: layers, parameters, and bytes in bf16, in all and of a layer."""
    rows = []
    for name, config in PRESETS.items():
        layer = sum(_parameters(config, kind) for kind in KINDS)
        total = config.n_layers * layer + _parameters(config, None)
        rows.append([name, config.n_layers, f"{total / 1e9:.2f}", f"{2 * total / 1e9:.2f}", f"{2 * layer / 1e9:.3f}"])
    head = ["model", "layers", "10^9 parameters", "GB in bf16", "GB a layer"]
    align = ["left", *("right" for _ in head[1:])]
    return str(tabulate(rows, head, "plain", disable_numparse=True, colalign=align))


def _parameters(config: ModelConfig, kind: Kind | None) -> int:
    return sum(prod(spec.shape) for spec in config.specs(kind))
