"""Faults in results, in sweeps' folders and in traces, as compare and report read them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from bench.result.sweep_folder import Point, Sweep
from tests.faults.damage import damage_bytes, damage_json, place_instead
from tests.faults.runner import Fault, Ran, Step
from tests.faults.stores import SHORT, run
from tests.results import stored, varied
from tests.tiny import hf_directory, hf_model


class Results:
    """Two results, one with its trace; a file of lines; a sweep's folder with results and a failure."""

    def __init__(self, home: Path) -> None:
        model = hf_directory(home / "hf", hf_model(num_hidden_layers=2))
        self.whole = home / "whole"
        self.whole.mkdir()
        out = ["--out-json", self.whole / "a.json", "--trace", self.whole / "a.trace.json"]
        run("--checkpoints", model, *SHORT, "--mode", "stream", "--repeats", 3, *out)
        measured = json.loads((self.whole / "a.json").read_text())
        stored(self.whole / "b.json", varied(measured, [10.0, 11.0, 12.0]))
        lines = [json.dumps(varied(measured, [10.0 + n, 11.0, 12.0])) for n in range(3)]
        (self.whole / "l.jsonl").write_text("\n".join(lines) + "\n")
        points = tuple(Point(n, {"--mode": mode}) for n, mode in enumerate(("stream", "full"), 1))
        sweep = Sweep({"--mode": ("stream", "full")}, (), points)
        stored(self.whole / "sweep" / "sweep.json", sweep.as_json())
        for point in points:
            for repeat in (1, 2):
                ours = varied(measured, [10.0 + repeat, 11.0, 12.0], config__resolved__mode=point.values["--mode"])
                stored(self.whole / "sweep" / point.folder / f"r{repeat}.json", ours)
        failure = {"exit_code": 3, "reason": "it does not fit"}
        stored(self.whole / "sweep" / points[0].folder / "r3.failed.json", failure)

    def fault(self, rng: random.Random, place: Path) -> Fault:
        copy = place / "results"
        shutil.copytree(self.whole, copy)
        file = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        if rng.random() < 0.2:
            what = place_instead(rng, file)
        elif file.suffix == ".json" and rng.random() < 0.7:
            what = damage_json(rng, file)
        else:
            what = damage_bytes(rng, file)
        top = file.relative_to(copy).parts[0]
        named = copy / ("a.json" if top == "a.trace.json" else top)
        paths = [str(named)] if named.is_dir() else rng.sample([str(named), str(copy / "b.json")], 2)
        page = place / "report.html"
        verb = rng.choice([["compare", "-o", rng.choice(["text", "md", "csv"])], ["report", "--out", str(page)]])

        def check(ran: Ran) -> str | None:
            written = page.exists() if verb[0] == "report" else bool(ran.out.strip())
            return None if written == (ran.code == 0) else "half an answer"

        return Fault(f"{verb[0]}, {what}", [Step([*verb, *paths], check)])
