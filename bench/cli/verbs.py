"""The verbs other than ``run``. Modules are imported where they are used: torch, which most need, takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.options.flags import check_point
from bench.options.run_flags import PlanOptions
from bench.options.verb_flags import (
    CacheOptions,
    CompareOptions,
    Options,
    PackOptions,
    PromptsOptions,
    QualityOptions,
    ReportOptions,
    SweepOptions,
    VerifyOptions,
)
from bench.run.signals import importing
from llama.config import PRESETS, ModelConfig
from llama.files import read_json
from llama.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from wsm import stop
from wsm.disk.atomic import check_folder, write_atomically
from wsm.words import counted

if TYPE_CHECKING:
    from bench.compare.compare import Comparison


def run_verb(options: Options, argv: Sequence[str], user_set: Sequence[str]) -> int:
    """The exit code of the verb that takes these options."""
    if isinstance(options, CompareOptions):
        return _run_compare(options)
    if isinstance(options, PromptsOptions):
        return _run_prompts(options)
    if isinstance(options, ReportOptions):
        from bench.report.report import run_report

        return run_report(options)
    if isinstance(options, SweepOptions):
        from bench.sweep.sweep import run_sweep

        return run_sweep(options, user_set, check_point)
    if isinstance(options, CacheOptions):
        from bench.cli.cache import run_cache

        return run_cache(options)
    with importing():
        from bench.cli.models import run_pack, run_plan, run_verify
        from bench.cli.quality import run_quality
    stop.check()
    if isinstance(options, PlanOptions):
        return run_plan(options, argv)
    if isinstance(options, PackOptions):
        return run_pack(options)
    if isinstance(options, QualityOptions):
        return run_quality(options, argv)
    assert isinstance(options, VerifyOptions)
    return run_verify(options)


def _run_compare(options: CompareOptions) -> int:
    """Print results against the first; exit code 1 where ``--threshold`` or ``--equal-outputs`` found a fault."""
    from bench.compare.compare import are_equal, compare, outputs_of
    from bench.compare.sides import read_sides
    from bench.compare.text import as_csv, as_markdown, as_text, output_lines

    comparison = compare(read_sides(options.paths))
    if options.output == "csv":
        print(as_csv(comparison))
    else:
        print((as_text if options.output == "text" else as_markdown)(comparison, verbose=options.verbose))
    unequal = options.equal_outputs and not are_equal(outputs_of(comparison))
    if unequal:
        print(f"bench_infer.py: the outputs are {'; '.join(output_lines(comparison))}", file=sys.stderr)
    return 1 if (options.threshold is not None and _is_slower(comparison, options.threshold)) or unequal else 0


def _is_slower(comparison: Comparison, threshold: float) -> bool:
    """Whether a side is slower than the first by more than ``threshold`` percent; says which, and what is undecided."""
    from bench.compare.compare import regressions, undecided

    base, slower = comparison.sides[0].name, list(regressions(comparison, threshold))
    for side, percent in slower:
        print(
            f"bench_infer.py: {side.name} is slower than {base} by {percent:.1f} %, more than --threshold "
            f"{threshold:g}",
            file=sys.stderr,
        )
    for side, ratio in undecided(comparison, threshold):
        print(
            f"bench_infer.py: --threshold {threshold:g} is undecided for {side.name}: e2e_ms is {ratio.value:.4f} "
            f"times that of {base}, and the interval goes up to {ratio.high:.4f}: more samples tell",
            file=sys.stderr,
        )
    return bool(slower)


def _run_prompts(options: PromptsOptions) -> int:
    """Make a prompt file."""
    from bench.result.console import ConsoleReporter
    from bench.run.prompts import make_prompts, prompt_file

    tokenizer = _tokenizer_of(options.checkpoints)
    check_folder(options.out.absolute().parent, f"--out {options.out}")
    texts = []
    reporter = ConsoleReporter(quiet=False, verbose=options.verbose, bars=not options.quiet)
    with reporter.bar(options.count, "prompt", "prompts") as advance:
        for text in make_prompts(tokenizer, options.count, options.tokens, options.seed):
            stop.check()
            texts.append(text)
            advance(1)
    write_atomically(options.out, prompt_file(texts, options.tokens, options.out.suffix))
    print(f"[INFO] {counted(options.count, 'prompt')} of {counted(options.tokens, 'token')} in {options.out}")
    return 0


def _tokenizer_of(directory: Path | None) -> Tokenizer:
    """The tokenizer of a checkpoint, for which a directory's small files do; bytes, as of the built-in model."""
    if directory is None:
        return ByteTokenizer(PRESETS["Llama-3.2-1B"])
    name, in_gguf = directory.resolve().name, any(directory.glob("*.gguf"))
    if (directory / "config.json").exists() and not in_gguf:
        return load_tokenizer(directory, ModelConfig.from_hf(read_json(directory / "config.json"), name))
    if (directory / "params.json").exists() and not in_gguf:
        params = read_json(directory / "params.json")
        if params.get("vocab_size", -1) != -1:
            return load_tokenizer(directory, ModelConfig.from_meta(params, name))
    from llama.checkpoint import open_checkpoint  # needs torch: the size is that of the embedding

    checkpoint = open_checkpoint(directory)
    return load_tokenizer(checkpoint.directory, checkpoint.config, checkpoint.vocabulary)
