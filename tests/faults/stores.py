"""Faults in packed stores and their manifests, named and in the cache directory."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from pathlib import Path

import torch

from bench_infer import command_line
from llama.checkpoint import open_checkpoint
from tests.faults.damage import damage_bytes, damage_json, place_instead
from tests.faults.runner import Fault, Ran, Step
from tests.stores import write_v1
from tests.tiny import hf_directory, hf_model, hf_tokenizer

SHORT = [
    *("--device", "cpu", "--prompt-len", "9", "--max-new-tokens", "3", "--temperature", "0", "--ignore-eos"),
    *("--warmup-rounds", "0", "--no-probe"),
]
_PLACES = ["--gpu-cached-layers", "1", "--cpu-cache-layers", "1", "--prefetch-distance", "1"]


def run(*argv: object) -> None:
    """A command that makes the undamaged files."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command_line([str(word) for word in argv]) == 0, out.getvalue()


def tokens_of(path: Path) -> str:
    """The hash of a result's tokens."""
    return str(json.loads(path.read_text())["output"]["sha256"])


def right(out: Path, expected: str) -> str | None:
    """For a run that ended well: whether its tokens are the right ones."""
    return None if tokens_of(out) == expected else "wrong tokens"


class Stores:
    """A tiny model, its store of version 2, another store, one of version 1, and a cache directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.hf = hf_tokenizer(hf_directory(home / "hf", hf_model(num_hidden_layers=4), dtype=torch.bfloat16))
        other = hf_directory(home / "other", hf_model(num_hidden_layers=4, initializer_range=0.1), dtype=torch.bfloat16)
        for name, model in (("s", self.hf), ("t", other)):
            run("pack", "--checkpoints", model, "--to", home / f"{name}.wsm", "--manifest", home / f"{name}.json")
        write_v1(home, open_checkpoint(self.hf))
        out = home / "r.json"
        probed = [word for word in SHORT if word != "--no-probe"]
        run("--checkpoints", self.hf, *probed, *_PLACES, "--cache-dir", home / "c", *_to(out))
        self.expected = tokens_of(out)

    def fault(self, rng: random.Random, place: Path) -> Fault:
        return self._cached(rng, place) if rng.random() < 0.2 else self._named(rng, place)

    def _named(self, rng: random.Random, place: Path) -> Fault:
        store, manifest = place / "s.wsm", place / "s.json"
        old = rng.random() < 0.15
        shutil.copy(self.home / ("v1.raw" if old else "s.wsm"), store)
        shutil.copy(self.home / ("v1.json" if old else "s.json"), manifest)
        if rng.random() < 0.15:
            what = place_instead(rng, rng.choice([store, manifest]))
        elif old:  # it has no checksums: what is behind a tensor's first 4 KiB may change its weights
            what = damage_json(rng, manifest)
        elif rng.random() < 0.1:
            what = self._other(rng, store, manifest)
        else:
            file, kind = rng.choice([(store, damage_bytes)] * 2 + [(manifest, damage_json), (manifest, damage_bytes)])
            what = kind(rng, file)
        named = ["--manifest", str(manifest), "--raw-device", str(store), "--checkpoints", str(self.hf)]
        if rng.random() < 0.15:
            return Fault(f"verify, {what}", [Step(["verify", *named], sentences=True)])
        mode, out = rng.choice(["mixed", "mixed", "stream", "preload"]), place / "r.json"
        run = Step([*named, "--mode", mode, *SHORT, *_PLACES, *_to(out)], lambda ran: self._right(ran, out))
        return Fault(f"{'v1, ' * old}{mode}, {what}", [run])

    def _other(self, rng: random.Random, store: Path, manifest: Path) -> str:
        """Something of another model's store."""
        if rng.random() < 0.5:
            shutil.copy(self.home / "t.json", manifest)
            return "another store's manifest"
        whole, other = store.read_bytes(), (self.home / "t.wsm").read_bytes()
        end = rng.choice([4096, len(whole) // 2, len(other)])
        store.write_bytes(other[:end] + whole[end:])
        return f"another store's first {end} bytes"

    def _cached(self, rng: random.Random, place: Path) -> Fault:
        """The next run but one has mended it, unless something that is no file is in its place."""
        cache = place / "c"
        shutil.copytree(self.home / "c", cache)
        [store] = cache.glob("*.wsm")
        [ceilings] = cache.glob("ceilings.*.json")
        file = rng.choice([store, store, store.with_suffix(".json"), ceilings, store.with_suffix(".lock")])
        if strange := rng.random() < 0.2 or not file.stat().st_size:
            what = place_instead(rng, file)
        else:
            kind = damage_json if file.suffix == ".json" and rng.random() < 0.5 else damage_bytes
            what = kind(rng, file)
        out = place / "r.json"
        argv = ["--checkpoints", str(self.hf), "--cache-dir", str(cache), *SHORT, *_PLACES, *_to(out)]
        again = Step(argv, lambda ran: self._right(ran, out) if ran.code == 0 or strange else f"exit {ran.code} again")
        return Fault(f"cache, {what}", [Step(argv, lambda ran: self._right(ran, out)), again])

    def _right(self, ran: Ran, out: Path) -> str | None:
        return right(out, self.expected) if ran.code == 0 else None


def _to(out: Path) -> list[str]:
    return ["--out-json", str(out)]
