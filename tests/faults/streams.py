"""Standard streams that are closed, full, or have lost their reader, under runs and under what only prints."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from tests.faults.runner import Fault, Ran, Step
from tests.faults.stores import SHORT, right, run, tokens_of
from tests.tiny import hf_directory, hf_model

BROKEN = ("closed", "full", "gone")
_NO_SUCH = ["--synthetic", "no-such-model"]


class Streams:
    """A tiny model and its result; each command has a process of its own, whose streams are broken."""

    def __init__(self, home: Path) -> None:
        self.model = hf_directory(home / "hf", hf_model(num_hidden_layers=4), dtype=torch.bfloat16)
        self.cache, self.whole = home / "c", home / "r.json"
        run("--checkpoints", self.model, *SHORT, "--cache-dir", self.cache, "--out-json", self.whole)
        self.expected = tokens_of(self.whole)

    def fault(self, rng: random.Random, place: Path) -> Fault:
        streams = [rng.choice(("open", *BROKEN)) for _ in range(3)]
        streams[rng.randrange(1, 3)] = rng.choice(BROKEN)
        what = f"streams {', '.join(streams)}"
        model = ["--checkpoints", str(self.model), *SHORT, "--cache-dir", str(self.cache)]
        if rng.random() < 0.2:
            return Fault(what, [Step(_NO_SUCH, streams=streams, codes=(2,))])
        if rng.random() < 0.4:
            compared = ["compare", str(self.whole), str(self.whole)]
            cached = ["cache", "list", "--cache-dir", str(self.cache)]
            verb = rng.choice([["--help"], ["plan", *model], compared, cached])
            expected = 1 if streams[1] in ("closed", "full") else 0
            return Fault(what, [Step(verb, streams=streams, codes=(expected,))])
        out, trace = place / "r.json", place / "t.json"
        more = rng.choice([[], ["-o", rng.choice(["csv", "md", "json"])], ["--verbose"], ["--trace", str(trace)]])
        mode = rng.choice(["full", "preload", "stream", "mixed"])

        def check(ran: Ran) -> str | None:
            if "--trace" in more and not trace.exists():
                return "no timeline"
            return right(out, self.expected) if out.exists() else "no result"

        argv = [*model, "--mode", mode, "--out-json", str(out), *more]
        return Fault(what, [Step(argv, check, streams=streams, codes=(0,))])
