"""How a Hugging Face directory says that its matrices are quantised: AWQ, GPTQ, compressed-tensors, fp8."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llama.fields import Fields, whole
from llama.files import read_json
from wsm.errors import UnusableInput

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of old releases, and the method of one that names none."""
_ON_CONFIG = ("quantization_config", "compression_config")
_MOST_REPEATS, _MOST_CHOICES, _MOST_PATTERNS = 4, 8, 32
"""Of a pattern, and the patterns of a description: what a hostile one can make a match cost is bounded by them."""
_WHAT_RUNS = (
    "AWQ (gemm) in 4 bits, GPTQ in 4 or 8, compressed-tensors in int4, int8 and fp8, and fp8 with a scale a tensor or "
    "row run here, and so does the same model in bfloat16 or float16"
)


class Layout(Enum):
    """Which tensors a quantised matrix consists of, and how its codes lie in them."""

    AWQ = "awq"
    GPTQ = "gptq"
    PACKED = "packed"
    INT8 = "int8"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is quantised: ``group`` inputs share a scale, 0: a whole row; ``minus_one``: zeros are stored so."""

    layout: Layout
    bits: int = 8
    group: int = 0
    has_zeros: bool = False
    minus_one: bool = False
    act_order: bool = False


Schemes = tuple[tuple[tuple[str, ...], Scheme], ...]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What a directory's configuration says of all its matrices; which are quantised, their tensors show."""

    place: str
    """The file that says so."""
    schemes: Schemes
    """By target: a module's name, ``re:`` and a pattern, or the class Linear."""
    activations: bool = False
    """Whether the model was made for quantised activations or KV."""

    def scheme(self, module: str) -> Scheme | None:
        """That of a module; None where no target is meant for it."""
        fits: tuple[Callable[[str], bool], ...] = (
            lambda target: target == module,
            lambda target: target.startswith("re:") and re.match(target[3:], module) is not None,
            lambda target: target == "Linear",
        )
        return next((scheme for fit in fits for targets, scheme in self.schemes if any(map(fit, targets))), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What runs otherwise than the model was made for."""
        if not self.activations:
            return ()
        return (f"{self.place} asks for quantised activations or KV, which stay as they are computed here",)


def read_quantisation(directory: Path, config: Mapping[str, Any]) -> tuple[Quantisation | None, tuple[str, ...]]:
    """What ``config`` (config.json) says, else a file beside it; None where the model is not quantised; warnings.

    UnusableInput for a method or a setting that does not run here, by name.
    """
    fields, name = Fields(config, f"{directory.name}/config.json"), directory.name
    parts = [part for field in _ON_CONFIG if (part := fields.part(field)) is not None]
    beside = [(directory / file, method) for file, method in _BESIDE.items() if (directory / file).exists()]
    found = [parse_quantisation(part, "config.json") for part in parts[:1]]
    for path, method in beside:
        try:
            found.append(parse_quantisation(Fields(read_json(path), f"{name}/{path.name}"), path.name, method))
        except UnusableInput:
            if not found:
                raise
            return found[0], (*found[0].warnings, _disagree(found[0], path))
        if (found[0].schemes, found[0].activations) != (found[-1].schemes, found[-1].activations):
            return found[0], (*found[0].warnings, _disagree(found[0], path))
    return (found[0], found[0].warnings) if found else (None, ())


def parse_quantisation(fields: Fields, place: str, method: str = "") -> Quantisation:
    """One description, of the file ``place``; ``method`` is that of one that names none.

    UnusableInput for what does not run here.
    """
    named = fields.values.get("quant_method") or method
    reader = _METHODS.get(named) if isinstance(named, str) else None
    if reader is None:
        bits = fields.values.get("bits")
        raise _refused(fields, f"the method {named!r:.40}" + (f" ({bits!r:.20} bits)" if bits else ""))
    return Quantisation(place, *reader(fields))


def _disagree(counts: Quantisation, path: Path) -> str:
    return f"{counts.place} and {path.name} say different things of how the weights are quantised: the first counts"


def _refused(fields: Fields, what: str) -> UnusableInput:
    return UnusableInput(f"{fields.file}: {what} does not run here; {_WHAT_RUNS}")


def _bits(fields: Fields, field: str, known: tuple[int, ...]) -> int:
    bits = fields.values.get(field)
    if bits is None:
        raise UnusableInput(
            f"{fields.file}: field {field} is missing; take the file from the original checkpoint again"
        )
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in known:
        raise _refused(fields, f"{field} {bits!r:.40}")
    return bits


def _group(fields: Fields, field: str) -> int:
    """Inputs to a scale; 0 where -1 says that it is the whole row."""
    size = fields.values.get(field)
    if size == -1:
        return 0
    size = whole(size, f"{fields.file}: field {field}")
    if size % 32:
        raise _refused(fields, f"{field} {size}, no multiple of 32,")
    return size


def _spelled(fields: Fields, names: tuple[str, ...], known: Mapping[str, Any], default: str) -> Any:
    """What the one value stands for that all ``names`` have which are there; UnusableInput for one not ``known``."""
    found = {name: value for name in names if (value := fields.values.get(name)) is not None} or {names[0]: default}
    for name, value in found.items():
        if not isinstance(value, str) or value.lower() not in known:
            raise _refused(fields, f"{name} {value!r:.40}")
    if len({value.lower() for value in found.values()}) > 1:
        raise UnusableInput(f"{fields.file}: {' and '.join(found)} say different things; keep the one that is true")
    return known[next(iter(found.values())).lower()]


def _awq(fields: Fields) -> tuple[Schemes, bool]:
    old = "w_bit" in fields.values
    _spelled(fields, ("version", "format", "checkpoint_format"), {"gemm": None}, "gemm")
    if fields.values.get("zero_point") is False:
        raise _refused(fields, "AWQ without zero_point")
    bits = _bits(fields, "w_bit" if old else "bits", (4,))
    scheme = Scheme(Layout.AWQ, bits, _group(fields, "q_group_size" if old else "group_size"), has_zeros=True)
    return ((("Linear",), scheme),), False


def _gptq(fields: Fields) -> tuple[Schemes, bool]:
    for field in ("is_marlin_format", "lora"):
        if fields.values.get(field):
            raise _refused(fields, f"{field} {fields.values[field]!r:.40}")
    if fields.values.get("pack_dtype") not in (None, "int32"):
        raise _refused(fields, f"pack_dtype {fields.values['pack_dtype']!r:.40}")
    dynamic = fields.part("dynamic")
    for pattern in dynamic.values if dynamic is not None else ():
        if not str(pattern).startswith("-:"):  # what is left out lies there in float weights
            raise _refused(fields, f"dynamic, settings of their own for {pattern!r:.40},")
    bits, group = _bits(fields, "bits", (4, 8)), _group(fields, "group_size")
    minus_one = _spelled(fields, ("checkpoint_format", "format"), {"gptq": True, "gptq_v2": False}, "gptq")
    symmetric = fields.values.get("sym") is None or fields.flag("sym")
    scheme = Scheme(Layout.GPTQ, bits, group, not symmetric, minus_one, fields.flag("desc_act"))
    return ((("Linear",), scheme),), False


def _fp8(fields: Fields) -> tuple[Schemes, bool]:
    if fields.values.get("weight_block_size") is not None:
        raise _refused(
            fields, f"fp8 with a scale a block (weight_block_size {fields.values['weight_block_size']!r:.20})"
        )
    if fields.values.get("fmt") not in (None, "e4m3"):
        raise _refused(fields, f"fmt {fields.values['fmt']!r:.20}")
    return ((("Linear",), Scheme(Layout.FP8)),), True


def _compressed(fields: Fields) -> tuple[Schemes, bool]:
    for field in ("sparsity_config", "transform_config"):
        found = fields.part(field)
        if found is not None and (found.values.get("format") != "dense" or field == "transform_config"):
            raise _refused(fields, field)
    groups = fields.part("config_groups")
    if groups is not None and len(groups.values) > _MOST_PATTERNS:
        raise UnusableInput(f"{groups.file} has {len(groups.values)} groups, more than {_MOST_PATTERNS}")
    if groups is None:
        raise UnusableInput(f"{fields.file}: field config_groups is missing or empty; take the file again")
    schemes, activations = [], fields.part("kv_cache_scheme") is not None
    for name in groups.values:
        group = groups.part(name)
        if group is None:
            continue
        weights, targets = group.part("weights"), group.values.get("targets")
        activations |= any(bool(group.values.get(field)) for field in ("input_activations", "output_activations"))
        if weights is None:
            continue
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise UnusableInput(f"{group.file}: field targets must be a list of names, not {targets!r:.60}")
        written = group.values.get("format") or fields.values.get("format")
        schemes.append((_patterns(group.file, targets), _compressed_scheme(weights, written)))
    if not schemes:
        raise UnusableInput(f"{groups.file} quantises no weights: then the model needs no such description")
    return tuple(schemes), activations


def _patterns(file: str, targets: list[str]) -> tuple[str, ...]:
    """``targets``, the patterns among them simple enough to be matched in no time whatever they are."""
    patterns = [target[3:] for target in targets if target.startswith("re:")]
    if len(patterns) > _MOST_PATTERNS:
        raise UnusableInput(f"{file}: field targets has {len(patterns)} patterns, more than {_MOST_PATTERNS}")
    for pattern in patterns:
        try:
            re.compile(pattern)
            repeats, choices = len(re.findall(r"[*+?{]", pattern)), pattern.count("|")
            simple = repeats <= _MOST_REPEATS and choices <= _MOST_CHOICES and not re.search(r"\)[*+{]", pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UnusableInput(f"{file}: the target {pattern!r:.60} is no pattern ({error})") from error
        if not simple:
            raise UnusableInput(f"{file}: the target {pattern!r:.60} repeats too much for a pattern of module names")
    return tuple(targets)


def _compressed_scheme(weights: Fields, written: Any) -> Scheme:
    kind = weights.values.get("type") or "int"
    layouts = {"pack-quantized": Layout.PACKED, "int-quantized": Layout.INT8, "float-quantized": Layout.FP8}
    layouts["naive-quantized"] = Layout.FP8 if kind == "float" else Layout.INT8
    layout = layouts.get(written) if isinstance(written, str) else None
    if layout is None or kind != ("float" if layout is Layout.FP8 else "int"):
        raise _refused(weights, f"compressed-tensors in the format {written!r:.40} of type {kind!r:.20}")
    bits = _bits(weights, "num_bits", (4, 8) if layout is Layout.PACKED else (8,))
    strategy = weights.values.get("strategy")
    if strategy is None:
        size = weights.values.get("group_size")
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    known = ("tensor", "channel") if layout is Layout.FP8 else ("tensor", "channel", "group")
    if strategy not in known:
        raise _refused(weights, f"the strategy {strategy!r:.40} of {written}")
    symmetric = weights.values.get("symmetric") is None or weights.flag("symmetric")
    act_order = weights.values.get("actorder") not in (None, False, "weight", "static")
    group = _group(weights, "group_size") if strategy == "group" else 0
    return Scheme(layout, bits, group, not symmetric, act_order=act_order)


_METHODS: dict[str, Callable[[Fields], tuple[Schemes, bool]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
}
