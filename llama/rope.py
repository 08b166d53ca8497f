"""Rotary embeddings as checkpoints describe them: every field that changes a frequency is read, or refused by name.

Hugging Face's files are read as transformers 5 reads them (``modeling_rope_utils.py``), Meta's as llama-models does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from llama.fields import Fields, is_positive
from wsm.errors import UnusableInput


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the original context.

    ``linear`` divides every frequency by ``factor``; ``llama3`` divides the low ones only (Llama 3.1); ``factors``
    divides each by its own, as GGUF's ``rope_freqs.weight`` has them.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "factors"):
            raise UnusableInput(f"RoPE scaling of type {self.kind!r:.60} does not run here; linear and llama3 do")
        factors = (self.factor, self.low_freq_factor, self.high_freq_factor)
        positive = all(map(is_positive, (*factors, self.original_max_position, *self.factors)))
        if not positive or factors[2] < factors[1] or bool(self.factors) != (self.kind == "factors"):
            raise UnusableInput(f"RoPE scaling with impossible factors: {self}")


class Rope(NamedTuple):
    """The base of the frequencies, and how they are stretched."""

    theta: float
    scaling: RopeScaling | None


_META_FACTORS = {(2048, 32): 32.0, (3072, 24): 32.0, (4096, 32): 8.0, (8192, 64): 8.0, (16384, 128): 8.0}
"""By width and heads, of the published models with scaled RoPE: Llama 3.2 1B and 3B; 3.1 and 3.3.

Their ``params.json`` does not tell, and Meta's own code, written for 3.1, has 8 for all of them; 32 is what the 3.2
models were trained with (config.json of their Hugging Face releases; meta-llama/llama-models, issues 166 and 241). A
model that was pruned in depth keeps both numbers, and the factor.
"""


def meta_rope(fields: Fields) -> Rope:
    """From ``params.json``; UnusableInput where it names no factor and no published model has its shape."""
    if not fields.flag("use_scaled_rope"):
        # LLaMA 2 names no rope_theta: its code has 10 000.
        return Rope(fields.number("rope_theta", 10000.0), None)
    factor = _META_FACTORS.get((fields.whole("dim"), fields.whole("n_heads")))
    if factor is None and fields.values.get("rope_scaling_factor") is None:
        raise UnusableInput(
            f"{fields.file} sets use_scaled_rope but no rope_scaling_factor, and no published model has its shape: add "
            '"rope_scaling_factor" (8 for models made from Llama 3.1 or 3.3, 32 from Llama 3.2)'
        )
    scaling = RopeScaling(
        "llama3",
        fields.number("rope_scaling_factor", factor),
        high_freq_factor=fields.number("rope_high_freq_factor", 4.0),
    )
    return Rope(fields.number("rope_theta", 500000.0), scaling)


def hf_rope(fields: Fields, max_position: int) -> Rope:
    """From ``config.json``, old spellings and new.

    Where both ``rope_scaling`` and ``rope_parameters`` are given, the first counts alone. ``rope_theta`` counts inside
    before outside, ``original_max_position_embeddings`` outside before inside.
    """
    rope = fields.part("rope_scaling") or fields.part("rope_parameters") or Fields({}, fields.file)
    if nested := sorted(key for key, value in rope.values.items() if isinstance(value, Mapping)):
        raise UnusableInput(f"{rope.file} is given per kind of layer ({', '.join(nested)}), which no plain LLaMA has")
    for place in (fields, rope):
        if place.values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnusableInput(f"{place.file} sets partial_rotary_factor, which does not run here; full RoPE does")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return Rope(theta, None)
    inside = rope.whole("original_max_position_embeddings", max_position)
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", rope.number("factor"), original_max_position=inside))
    if kind == "llama3":
        factor, low, high = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        original = fields.whole("original_max_position_embeddings", inside)
        return Rope(theta, RopeScaling("llama3", factor, low, high, original))
    raise UnusableInput(f"{rope.file}: scaling of type {kind!r:.60} does not run here; default, linear and llama3 do")


def ambiguous_rope(config: Mapping[str, object], file: str) -> str | None:
    """The warning where ``config.json`` describes RoPE twice, and differently."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if not old or not new or old == new:
        return None
    return (
        f"{file} has both rope_scaling and rope_parameters: rope_scaling counts, as in transformers, and of "
        "rope_parameters nothing, its rope_theta neither; keep one of them"
    )
