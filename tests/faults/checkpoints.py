"""Faults in checkpoint directories: Hugging Face's and Meta's, their JSON, their shards' headers, their tokenizers.

Neither format has checksums. So what changes a weight, a token of the vocabulary, or a figure that the model is made
of, rightly changes the tokens; these are told apart, and asked only not to end in any other way.
"""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import open_checkpoint
from tests.faults.damage import damage_bytes, damage_json, place_instead
from tests.faults.runner import Fault, Ran, Step
from tests.faults.stores import SHORT, right, run, tokens_of
from tests.tiny import hf_directory, hf_model, hf_tokenizer, llama3_tokenizer, meta_directory
from wsm.disk.files import parse_json
from wsm.errors import UnusableInput

DECIDING = {
    *("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "partial_rotary_factor"),
    *("original_max_position_embeddings", "max_position_embeddings", "norm_eps", "use_scaled_rope"),
    *("rope_scaling_factor", "rope_high_freq_factor", "model_type", "attention_bias", "mlp_bias", "head_dim"),
}
"""Fields that make another model of the same shapes; one that is missing has a default."""


class Checkpoints:
    """A model as one Hugging Face file, as several with an index, and as two of Meta's shards."""

    def __init__(self, home: Path) -> None:
        model = hf_model(num_hidden_layers=2)
        hf_tokenizer(hf_directory(home / "one", model, dtype=torch.bfloat16))
        hf_tokenizer(hf_directory(home / "many", model, dtype=torch.bfloat16, max_shard_size="100KB"))
        wide = hf_model(num_hidden_layers=2, vocab_size=552)
        hf_directory(home / "wide", wide, dtype=torch.bfloat16)
        llama3_tokenizer(meta_directory(home / "meta", open_checkpoint(home / "wide"), 2) / "tokenizer.model")
        self._directories = [home / name for name in ("one", "many", "meta")]
        self._expected = {}
        for directory in self._directories:
            run("--checkpoints", directory, "--mode", "full", *SHORT, "--out-json", home / "r.json")
            self._expected[directory] = tokens_of(home / "r.json")

    def fault(self, rng: random.Random, place: Path) -> Fault:
        chosen = rng.choice(self._directories)
        copy, out = place / "model", place / "r.json"
        shutil.copytree(chosen, copy)
        small = sorted(path for path in copy.iterdir() if path.suffix in (".json", ".model"))
        shards = sorted(path for path in copy.iterdir() if path.suffix in (".safetensors", ".pth"))
        file = rng.choice([*small, *rng.sample(shards, 1) * 2])
        if rng.random() < 0.2:
            what, free = place_instead(rng, file), False
        elif file.suffix == ".json":
            before = json.loads(file.read_text())
            what = (damage_json if rng.random() < 0.7 else damage_bytes)(rng, file)
            free = _decides(before, file)
        elif file.suffix == ".model":
            what, free = damage_bytes(rng, file), True
        else:
            what, free = _damage_header(rng, file), False
        argv = ["--checkpoints", str(copy), "--mode", rng.choice(["full", "stream"]), *SHORT, "--out-json", str(out)]
        if file.name.startswith("tokenizer") and rng.random() < 0.7:
            argv = [word for word in argv if word not in ("--prompt-len", "9")] + ["--prompt", "a prompt"]
            free = True

        def check(ran: Ran) -> str | None:
            return right(out, self._expected[chosen]) if ran.code == 0 and not free else None

        return Fault(f"{chosen.name}, {what}", [Step(argv, check)])


def _decides(before: Any, file: Path) -> bool:
    """Whether a file that was JSON says something else of what the tokens follow from."""
    try:
        after = parse_json(file.read_bytes(), "", "")
    except UnusableInput:
        return False
    return any(key in DECIDING for key in _changed(before, after))


def _changed(before: Any, after: Any, outer: str = "") -> Iterator[str]:
    """The keys at the top whose values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            if before.get(key, ...) != after.get(key, ...):
                yield key


def _damage_header(rng: random.Random, shard: Path) -> str:
    """Damage what is no weight: the header of safetensors, the pickle or the directory of a .pth, or its length."""
    size = shard.stat().st_size
    if shard.suffix == ".safetensors":
        end = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        if rng.random() < 0.3:
            return _cut(rng, shard, size)
        return damage_bytes(rng, shard, 0, end)
    if rng.random() < 0.3:
        return _cut(rng, shard, size)
    with zipfile.ZipFile(shard) as archive:
        [pickled] = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        directory = archive.start_dir
    start, end = rng.choice([(pickled.header_offset, pickled.header_offset + pickled.file_size), (directory, size)])
    return damage_bytes(rng, shard, start, end)


def _cut(rng: random.Random, shard: Path, size: int) -> str:
    at = rng.randrange(size)
    with shard.open("r+b") as file:
        file.truncate(at)
    return f"{shard.name}: cut at {at}"
