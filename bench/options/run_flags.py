"""What ``run`` and ``plan`` take: how and what is built, the work of the run, and where its result goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama.options import BuildOptions
from wsm.errors import UnusableInput
from wsm.option import NAME, PATH, SWITCH, TEXT, number, one_of, option, options_of, whole

NOWHERE = Path(os.devnull)
_work, _output = partial(option, group="work"), partial(option, group="output", swept=False)


@dataclass(frozen=True, slots=True)
class RunOptions(BuildOptions):
    """Everything that a run follows from, in one object from the command line to the plan."""

    prompts: Path | None = _work(
        None,
        PATH,
        "a prompt per line, `===== PROMPT … =====` blocks, `.jsonl`, `.json`, ShareGPT",
        shown="the file in prompts/",
    )
    prompt: str | None = _work(None, TEXT, "one prompt")
    chat: bool = _work(
        False, SWITCH, "each prompt is a user's message in the checkpoint's own chat template (docs/SPECULATION.md)"
    )
    prompt_len: int | None = _work(
        None,
        whole(1),
        "N random ids per prompt, no tokenizer needed; cut where `--max-seq-len` has no room",
        flags=("-p",),
    )
    batch_size: int = _work(1, whole(1), "rows: the first so many prompts, repeated to fill it", flags=("-b",))
    max_new_tokens: int = _work(32, whole(1), "tokens to make per row", flags=("-n",))
    max_seq_len: int = _work(
        2048,
        whole(2),
        "a prompt keeps its last `max_seq_len - max_new_tokens` tokens, special ones kept and counted in",
    )
    temperature: float = _work(0.6, number(0), "nucleus sampling; 0 is greedy")
    top_p: float = _work(0.9, number(0, 1, above=True), "nucleus sampling: the likeliest tokens of this probability")
    seed: int = _work(0, whole(0), "of random ids and sampling, not of synthetic weights: another packs nothing anew")
    ignore_eos: bool | None = _work(
        None, SWITCH, "go on after a stop token", shown="on for random ids or random weights, else off"
    )
    warmup_rounds: int = _work(1, whole(0), "untimed rounds")
    repeats: int = _work(1, whole(1), "timed rounds", flags=("-r",))
    no_probe: bool = _work(
        False,
        SWITCH,
        "take the ceilings from the cache, where an earlier run of this model in this mode with these budgets and "
        "drives left them, instead of measuring them",
    )
    print_text: bool = _work(False, SWITCH, "print the generated texts, and keep them in the JSON")
    out_json: Path = _output(Path("bench_results.json"), PATH, "the result")
    trace: Path | None = _output(None, PATH, "timeline of reads, copies, computing, for chrome://tracing or Perfetto")
    output: str | None = _output(
        None, one_of("md", "csv", "json"), "print a row instead of the summary; warnings go to stderr", flags=("-o",)
    )
    quiet: bool = _output(False, SWITCH, "show no progress")
    verbose: bool = _output(False, SWITCH, "tell more, and give tracebacks")

    @property
    def goes_on(self) -> bool:
        """Whether rows go on after a stop token: where prompt or weights are random, it ends nothing by meaning."""
        is_random = self.prompt_len is not None or self.checkpoints is None
        return is_random if self.ignore_eos is None else self.ignore_eos

    def check_together(self) -> None:
        sources = {"--prompts": self.prompts, "--prompt": self.prompt, "--prompt-len": self.prompt_len}
        if len(given := [flag for flag, value in sources.items() if value is not None]) > 1:
            raise UnusableInput(f"{' and '.join(given)} exclude each other: give one")
        if self.chat and self.prompt_len is not None:
            raise UnusableInput("--chat and --prompt-len exclude each other: random ids are no message")
        if self.prompt is not None and not self.prompt.strip():
            raise UnusableInput("--prompt is empty: give a text")
        if self.max_new_tokens >= self.max_seq_len:
            raise UnusableInput(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in --max-seq-len "
                f"{self.max_seq_len}: lower the first or raise the second"
            )
        BuildOptions.check_together(self)

    def to_json(self) -> dict[str, Any]:
        """Every option by name, paths as text, in the order in which results have always had them."""
        names = dict.fromkeys([*_JSON_FIRST.split(), *options_of(RunOptions)])
        values = {name: getattr(self, name) for name in names} | {"ignore_eos": self.goes_on}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


_RATE = number(0, 1e6, above=True, says="a number above 0, at most 1e+06")
_elsewhere = partial(option, group="another machine", swept=False)


@dataclass(frozen=True, slots=True)
class PlanOptions(RunOptions):
    """A run, the machine that it is planned for, and what is to be believed of its draft.

    It takes what says how a run draws, times and reports, too: so the command of a run is planned as it is.
    """

    machine: str | None = _elsewhere(
        None, NAME, "a card from the table in docs/TUNING.md instead of this machine, such as `RTX 4090`"
    )
    link_gbps: float | None = _elsewhere(None, _RATE, "CPU to GPU, in 10^9 bytes/s", shown="as measured here")
    ssd_gbps: float | None = _elsewhere(None, _RATE, "the drive, in 10^9 bytes/s", shown="as measured here")
    kv_gbps: float | None = _elsewhere(
        None, _RATE, "--kv-device, read or written, in 10^9 bytes/s", shown="as measured here"
    )
    hbm_gbps: float | None = _elsewhere(None, _RATE, "the GPU's memory, in 10^9 bytes/s", shown="as measured here")
    matmul_tflops: float | None = _elsewhere(
        None, _RATE, "dense matrix products, in 10^12 operations/s", shown="as measured here"
    )
    acceptance: float | None = _elsewhere(
        None, number(0, 1), "with `--draft`: predict tokens a second where a level's token is right so often"
    )
    tokens_a_pass: float | None = _elsewhere(
        None, number(1, 1e3), "with `--draft`: the same for a row's tokens a pass, as a run has shown them"
    )

    out_json: Path = _output(NOWHERE, PATH, "the plan, as `-o json` prints it", shown="nowhere")

    def check_together(self) -> None:
        RunOptions.check_together(self)
        given = {"--acceptance": self.acceptance, "--tokens-a-pass": self.tokens_a_pass}
        flags = [flag for flag, value in given.items() if value is not None]
        if len(flags) > 1:
            raise UnusableInput(f"{' and '.join(flags)} exclude each other: give one")
        if flags and self.draft is None:
            raise UnusableInput(f"{flags[0]} without --draft: name the draft, or leave it out")


_JSON_FIRST = """
checkpoints synthetic raw_device manifest prompts prompt prompt_len batch_size max_new_tokens max_seq_len temperature
top_p seed warmup_rounds repeats topk_blk kv_dtype kv_device prefill_chunk_tokens micro_batch device dtype tp load_model
no_probe auto trace cache_dir out_json output print_text ignore_eos verbose
"""
"""Before all others in ``config.resolved``."""
