"""Faults in prompts: files of every form and from what is no file."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.faults.damage import damage_bytes, damage_json, place_instead
from tests.faults.runner import Fault, Step
from tests.faults.stores import SHORT
from tests.tiny import hf_directory, hf_model, hf_tokenizer

_TEXTS = ["once upon a time", "a line\nand another", "日本語 🙂", "x" * 3000]
_TALK = [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]} for text in _TEXTS]
_FORMS = {
    "p.txt": "\n".join(text.replace("\n", " ") for text in _TEXTS),
    "blocks.txt": "".join(f"===== PROMPT {n:04d} =====\n{text}\n\n" for n, text in enumerate(_TEXTS)),
    "p.jsonl": "\n".join(json.dumps({"prompt": text}) for text in _TEXTS),
    "p.NDJSON": "\n".join(json.dumps(text, ensure_ascii=False) for text in _TEXTS),
    "p.json": json.dumps([{"text": text} for text in _TEXTS], indent=1),
    "share.json": json.dumps(_TALK),
    "unnamed": json.dumps(_TALK),
}
_ENCODINGS = ("utf-16", "utf-32", "latin-1", "gb18030")


class Prompts:
    """A small model with a tokenizer, which runs on the prompts."""

    def __init__(self, home: Path) -> None:
        self.hf = hf_tokenizer(hf_directory(home / "hf", hf_model(num_hidden_layers=1)))

    def fault(self, rng: random.Random, place: Path) -> Fault:
        name = rng.choice(sorted(_FORMS))
        file = place / name
        file.write_text(_FORMS[name], encoding="utf-8")
        chance = rng.random()
        if chance < 0.25:
            what = place_instead(rng, file)
        elif chance < 0.35:
            encoding = rng.choice(_ENCODINGS)
            file.write_bytes(_FORMS[name].encode(encoding, errors="replace"))
            what = f"{name}: {encoding}"
        elif chance < 0.65 and name in ("p.json", "share.json", "unnamed"):
            what = damage_json(rng, file)
        else:
            what = damage_bytes(rng, file)
        kept = [word for word in SHORT if word not in ("--prompt-len", "9")]
        size = rng.choice(["1", "2", "5"])
        argv = ["--checkpoints", str(self.hf), "--mode", "full", *kept, "--batch-size", size, "--prompts", str(file)]
        return Fault(what, [Step([*argv, "--out-json", str(place / "r.json")])])
