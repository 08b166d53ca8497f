"""Faults in quantised models: GGUF files, and Hugging Face directories of AWQ, GPTQ, compressed-tensors and fp8.

Neither has checksums. So what changes a weight, a scale, or what the model is made of, rightly changes the tokens.
Whether it did, the packages ``gguf`` and ``safetensors`` tell: where they read the same as before, tokens must be the
right ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.faults.checkpoints import DECIDING
from tests.faults.damage import damage_bytes, damage_json, place_instead
from tests.faults.runner import Fault, Ran, Step
from tests.faults.stores import SHORT, right, run, tokens_of
from tests.gguf_files import CONFIG, bpe_fields, random_tensors, write_gguf
from tests.quantised import METHODS, mixed_directory, quantised_directory
from tests.tiny import hf_tokenizer
from wsm.disk.files import parse_json

_SMALL = dataclasses.replace(CONFIG, n_layers=2)
_MEANING = {"dtype", "torch_dtype", "format", "checkpoint_format"}
"""Fields that make other numbers of the same codes."""
_NUMBERS = (0, 1, 2, 3, 7, 31, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)
_ALIKE = (("F32", "I32", "U32"), ("F16", "BF16", "I16"), ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), ("I64", "F64"))
"""Types of safetensors of the same size."""
_PLACES = ["--gpu-cached-layers", "1", "--cpu-cache-layers", "1", "--prefetch-distance", "1"]


class Quantised:
    """A GGUF file, one in two parts, and directories by AWQ, by GPTQ and of int8, int4 and fp8 side by side."""

    def __init__(self, home: Path) -> None:
        fields, tensors = bpe_fields(_SMALL.vocab_size), random_tensors(_SMALL)
        for name, split in (("gguf", {}), ("parts", {"split_max_tensors": 12})):
            (home / name).mkdir()
            write_gguf(home / name / "m.gguf", tensors, _SMALL, fields=fields, **split)
        for method in ("awq", "gptq"):
            quantised_directory(home / method, METHODS[method], num_hidden_layers=2)
        (home / "gptq" / "quantize_config.json").write_text(json.dumps(METHODS["gptq"].config))
        mixed_directory(home / "mixed")
        self._expected = {}
        for directory in sorted(home.iterdir()):
            if directory.name not in ("gguf", "parts"):
                hf_tokenizer(directory)
            run("--checkpoints", directory, "--mode", "full", *SHORT, "--out-json", home / "r.json")
            self._expected[directory] = tokens_of(home / "r.json")
        assert self._expected[home / "gguf"] == self._expected[home / "parts"]

    def fault(self, rng: random.Random, place: Path) -> Fault:
        chosen = rng.choice(list(self._expected))
        copy, out, text = place / "model", place / "r.json", rng.random() < 0.3
        shutil.copytree(chosen, copy)
        files = sorted(path for path in copy.iterdir() if not path.name.startswith("tokenizer"))
        file = rng.choice(files)
        if rng.random() < 0.1:
            what = place_instead(rng, file)
        elif file.suffix == ".gguf":
            what = _damage_gguf(rng, file)
        elif file.suffix == ".safetensors":
            what = _damage_safetensors(rng, file)
        else:
            what = _damage_config(rng, file)
        mode = rng.choice(["full", "stream", "preload", "mixed"])
        argv = ["--checkpoints", str(copy), "--mode", mode, *SHORT, *_PLACES, "--cache-dir", str(place / "c")]
        if text:
            argv = [word for word in argv if word not in ("--prompt-len", "9")] + ["--prompt", "a prompt"]

        def check(ran: Ran) -> str | None:
            free = ran.code != 0 or text or another_model(chosen, copy)
            return None if free else right(out, self._expected[chosen])

        return Fault(f"{chosen.name}, {mode}, {what}", [Step([*argv, "--out-json", str(out)], check)])


def _damage_gguf(rng: random.Random, path: Path) -> str:
    """Damage a part of the header, one of its numbers, or anything."""
    reader, content = gguf.GGUFReader(path), path.read_bytes()
    begins = [0, 24, max(content.find(b"tokenizer.ggml.model"), 24), reader.tensors[0].field.offset]
    ends = [*begins[1:], reader.data_offset, len(content)]
    begin, end = rng.choice([*zip([*begins, 0], ends, strict=True)])
    if rng.random() < 0.6 or end == len(content):
        return damage_bytes(rng, path, begin, end)
    at, size, name = rng.choice([*_numbers(reader)])
    value = rng.choice(_NUMBERS) & (1 << 8 * size) - 1
    path.write_bytes(content[:at] + value.to_bytes(size, "little") + content[at + size :])
    return f"{path.name}: {value} at {at} ({name})"


def _numbers(reader: gguf.GGUFReader) -> Iterator[tuple[int, int, str]]:
    """Where the header's numbers lie: lengths, types, counts, values, but for those of each token; their bytes."""
    for field in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
        at = field.offset
        for part in field.parts[:8]:
            if part.dtype.itemsize > 1:
                yield from ((at + n * part.dtype.itemsize, part.dtype.itemsize, field.name) for n in range(len(part)))
            at += part.nbytes


def _damage_safetensors(rng: random.Random, path: Path) -> str:
    """Damage the header as bytes or as the JSON that it is, or anything; or call a tensor something of equal size."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        return damage_bytes(rng, path, *rng.choice([(0, 8), (0, end), (8, end), (0, len(content))]))
    if rng.random() < 0.5:
        header = json.loads(content[8:end])
        name = rng.choice([name for name in header if name != "__metadata__"])
        found = header[name]
        if (what := rng.choice(["dtype", "shape", "name"])) == "dtype":
            alike = [kind for size in _ALIKE if found["dtype"] in size for kind in size]
            found["dtype"] = rng.choice(alike)
        elif what == "shape":
            found["shape"] = rng.choice([found["shape"][::-1], [*found["shape"], 1], [math.prod(found["shape"])]])
        else:
            header[rng.choice([name + "x", name.replace("1", "0"), name.rpartition(".")[0]])] = header.pop(name)
        changed, what = json.dumps(header).encode(), f"another {what} of {name}"
    else:
        changed, what = _damaged_json(rng, path, content[8:end])
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[end:])
    return f"{path.name}, {what}"


def _damage_config(rng: random.Random, path: Path) -> str:
    """Damage a field of config.json, most often of what it says of the quantisation."""
    config = json.loads(path.read_text())
    if "quantization_config" not in config or rng.random() < 0.4:
        return (damage_json if rng.random() < 0.9 else damage_bytes)(rng, path)
    changed, what = _damaged_json(rng, path, json.dumps(config["quantization_config"]).encode())
    mark = "what it says of the quantisation"
    path.write_text(json.dumps(config | {"quantization_config": mark}).replace(f'"{mark}"', changed.decode()))
    return f"{path.name}, quantization_config, {what}"


def _damaged_json(rng: random.Random, path: Path, text: bytes) -> tuple[bytes, str]:
    """The text of a JSON object, damaged, and how."""
    part = path.with_name("part.json")
    part.write_bytes(text)
    what = damage_json(rng, part)
    changed = part.read_bytes()
    part.unlink()
    return changed, what


def another_model(one: Path, other: Path) -> bool:
    """Whether a directory says something else of what the tokens follow from than the one it is a copy of."""
    for path in one.iterdir():
        copy = other / path.name
        if path.suffix == ".gguf" and _gguf(path) != _gguf(copy):
            return True
        if path.suffix == ".safetensors" and _tensors(path) != _tensors(copy):
            return True
        if path.name == "config.json":
            before, after = json.loads(path.read_text()), parse_json(copy.read_bytes(), "", "")
            if any(key in DECIDING | _MEANING for key in _changed(before, after)):
                return True
    return False


def _gguf(path: Path) -> Any:
    """What the ``gguf`` package reads: the fields of the model, and each tensor's type, shape and bytes."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    return fields, {one.name: (one.tensor_type, one.shape.tolist(), one.data.tobytes()) for one in reader.tensors}


def _tensors(path: Path) -> Any:
    """What the ``safetensors`` package reads: each tensor's type, shape and bytes."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError):
        return None
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in found.items()
    }


def _changed(before: Any, after: Any) -> Iterator[str]:
    """The keys, at any depth, whose values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if before.get(key, ...) != after.get(key, ...):
                yield key
                yield from _changed(before.get(key), after.get(key))
    elif isinstance(before, list) and isinstance(after, list):
        for one, other in zip(before, after, strict=False):
            yield from _changed(one, other)
