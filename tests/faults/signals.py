"""Signals at random times over a running engine, seeded: ``python -m tests.faults.signals [FAULTS [SEED]]``.

Two ways in. As a command, SIGINT, SIGTERM or SIGHUP must end a run within seconds with one sentence, its exit code and
every finished round in its JSON. In a user's own program KeyboardInterrupt is Python's, comes between any two of its
instructions, and must leave nothing that waits for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from bench.run import measure, signals
from bench_infer import command_line
from llama import LLaMA
from tests.tiny import hf_directory, hf_model

HANG_S = 90.0
SMALL = ["--mode", "stream", "--no-probe", "--device", "cpu", "--prompt-len", "8", "--ignore-eos", "--temperature", "0"]
PLACES = ["--gpu-cached-layers", "1", "--cpu-cache-layers", "2", "--prefetch-distance", "1", "--max-new-tokens", "2"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@contextlib.contextmanager
def _fired(number: int, after_s: float, again_s: float | None = None) -> Iterator[None]:
    """A signal to this process after so many seconds, perhaps twice; a block that hangs ends it, and says where.

    A block that is not over a quarter of the limit later gets another one: the first came before it could be heard.
    """
    over = threading.Event()

    def fire() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), number)
        if again_s is not None:
            time.sleep(again_s)
            os.kill(os.getpid(), number)
        if not over.wait(HANG_S / 4):
            os.kill(os.getpid(), number)

    faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
    thread = threading.Thread(target=fire)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def in_commands(faults: int, seed: int, model: Path) -> Counter[str]:
    """Runs of a tiny model that would not end by themselves; each is asked to at a random time."""
    found, number_of = Counter[str](), random.Random(seed)
    for _ in range(faults):
        number = number_of.choice(list(CODES))
        after_s = number_of.choice((0.02, 0.3, 0.8)) * number_of.random()
        again_s = number_of.choice((None, None, 0.05 * number_of.random()))
        with tempfile.TemporaryDirectory() as folder, _outside_commands_ignored() as outside:
            found.update(_command(model, Path(folder) / "r.json", number, (after_s, again_s), outside))
    return found


def _command(
    model: Path, out: Path, number: int, when: tuple[float, float | None], outside: list[int]
) -> Iterator[str]:
    real, finished = measure.run_round, list[object]()

    def run_round(*args: object, **named: object) -> object:
        finished.append(real(*args, **named))  # type: ignore[arg-type]
        return finished[-1]

    argv = ["--checkpoints", str(model), *SMALL, *PLACES, "--warmup-rounds", "0", "--repeats", "1000000"]
    said, before, end_now = io.StringIO(), set(threading.enumerate()), signals._end_now

    def unless_begun(number: int, why: str) -> None:
        """This process goes on where a command that has not begun would end its own."""
        if why.endswith("nothing was begun"):
            outside.append(number)
        else:
            end_now(number, why)

    with (
        mock.patch.object(signals, "_end_now", unless_begun),
        mock.patch.object(measure, "run_round", run_round),
        mock.patch.object(signals, "importing", contextlib.nullcontext),  # all is imported, and this process goes on
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
        _fired(number, *when),
    ):
        began = time.monotonic()
        code = command_line([*argv, "--out-json", str(out), "--cache-dir", str(out.parent)]) if not outside else 0
        took_s = time.monotonic() - began - when[0]
    if outside:
        return iter(["came before the command, which was left out"])
    return _judged(code, said.getvalue(), out, len(finished), number, took_s, before)


def _judged(
    code: int, said: str, out: Path, finished: int, number: int, took_s: float, before: set[threading.Thread]
) -> Iterator[str]:
    yield "faults"
    yield "slower than 5 s" if took_s > 5 else "ended"
    if code != CODES[number]:  # type: ignore[index]
        yield f"WRONG exit code {code} of {number}"
    if "Traceback" in said or len(said.strip().splitlines()) != 1:
        yield f"WRONG words: {said}"
    kept = json.loads(out.read_text())["repeats"]["n"] if out.exists() else 0
    if kept != finished:
        yield f"WRONG: {finished} rounds were finished, {kept} kept"
    yield "with rounds kept" if kept else "before the first round"
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("wsm-"):
            thread.join(5)  # one that waited for another may be the last to see its end
            if thread.is_alive():
                yield f"WRONG: thread {thread.name} is left"


@contextlib.contextmanager
def _outside_commands_ignored() -> Iterator[list[int]]:
    """What comes before or after a command's own handlers is noted here."""
    came = list[int]()
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in CODES}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_programs(faults: int, seed: int, model: Path) -> Counter[str]:
    """A user's program that builds and generates until KeyboardInterrupt comes, wherever that is."""
    found, number_of = Counter[str](), random.Random(seed)
    config = {"gpu_cached_layers": 1, "cpu_cache_layers": 2, "prefetch_distance": 1}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(faults):
            found["faults"] += 1
            llm: LLaMA | None = None
            with contextlib.suppress(KeyboardInterrupt), _fired(signal.SIGINT, 0.15 * number_of.random()):
                try:
                    llm = LLaMA.build(model, "stream", config, device="cpu", max_seq_len=64)
                    while True:
                        llm.generate([[1, 2, 3]], max_new_tokens=2, temperature=0, ignore_eos=True)
                except KeyboardInterrupt:
                    found["in use" if llm is not None else "while it was built"] += 1
                except RuntimeError as error:
                    found[f"WRONG: {error}"] += 1
                if llm is not None:
                    llm.close()
    finally:
        signal.signal(signal.SIGINT, before)
    return found


def main(faults: int = 1000, seed: int = 0) -> int:
    """Both, half of the faults each; the counts, and 1 if anything was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        model = hf_directory(Path(folder), hf_model())
        tables = {"commands": in_commands(faults // 2, seed, model), "programs": in_programs(faults // 2, seed, model)}
    for name, table in tables.items():
        print(name, *(f"  {count:6d}  {what}" for what, count in sorted(table.items())), sep="\n")
    return int(any(what.startswith("WRONG") for table in tables.values() for what in table))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
