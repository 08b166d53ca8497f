"""The other verbs: pack, verify, plan, prompts, compare."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.compare.compare import compare, regressions
from bench.compare.sides import read_sides
from bench.compare.text import as_csv, as_markdown, as_text
from bench.options.command import kept_command
from bench.options.flags import PackOptions, PromptsOptions, RunOptions, VerifyOptions
from bench.options.verb_flags import CompareOptions
from bench.result.summary import ConsoleReporter
from bench.run.ceilings import recall_near
from bench.run.prompts import make_prompts, prompt_file
from bench.run.run import batch_prompts, build_options, shape_of
from llama.checkpoint import (
    Checkpoint,
    WeightlessCheckpoint,
    builtin_checkpoint,
    has_weights,
    open_checkpoint,
    share_of,
)
from llama.inputs import BuildOptions, open_inputs, plan_run
from llama.parallel.world import World
from llama.stores import pack, read_manifest
from llama.tokenizer import load_tokenizer
from wsm.disk.atomic import write_atomically
from wsm.errors import UnusableInput
from wsm.layout.model import Shard
from wsm.plan.advice import check_fits
from wsm.plan.levers import auto_flags
from wsm.plan.text import describe
from wsm.settings import Settings
from wsm.store.extents import plan_store
from wsm.store.heads import compare_heads
from wsm.store.pack import PackRequest
from wsm.store.packed_store import PackedStore
from wsm.store.verify import verify


def run_pack(options: PackOptions) -> int:
    """Pack a checkpoint."""
    reporter = ConsoleReporter(quiet=False, verbose=options.verbose)
    inputs = open_inputs(
        BuildOptions(
            settings=Settings(mode="full"),
            checkpoints=options.checkpoints,
            synthetic=options.synthetic,
            cache_dir=options.cache_dir,
            device="cpu",
            dtype=options.dtype,
        )
    )
    tp = options.tp or 1
    size = plan_store(inputs.checkpoint.config, inputs.dtype, len(options.to), tp).target_bytes
    ranks = f" for {tp} ranks" if tp > 1 else ""
    reporter.say(
        f"[INFO] packing {inputs.checkpoint.config.name}{ranks}: {size / 1e9:.3f} GB on each of {len(options.to)} "
        "target(s)"
    )

    def confirm(question: str) -> bool:
        if options.yes:
            return True
        if not sys.stdin.isatty():
            raise UnusableInput(f"{question} There is no terminal to ask on: --yes confirms; nothing was written")
        try:
            return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    with reporter.bar(size * len(options.to), "B", "packing") as advance:
        request = PackRequest(options.to, options.manifest, inputs.dtype, options.force, tp)
        pack(inputs.checkpoint, request, confirm=confirm, progress=advance)
    reporter.say(f"[INFO] packed; the manifest is {options.manifest}")
    return 0


def run_verify(options: VerifyOptions) -> int:
    """Read a store back; exit code 4 if any group is bad."""
    reporter = ConsoleReporter(quiet=False, verbose=options.verbose)
    checkpoint: Checkpoint | None = None
    if options.checkpoints is not None:
        weightless = options.checkpoints.is_dir() and not has_weights(options.checkpoints)
        checkpoint = WeightlessCheckpoint(options.checkpoints) if weightless else open_checkpoint(options.checkpoints)
    shares = [
        read_manifest(options.manifest, raw_device=options.raw_device, checkpoint=checkpoint, rank=rank)
        for rank in range(read_manifest(options.manifest, checkpoint=checkpoint).shard.size)
    ]
    nbytes, groups = sum(share.nbytes for share in shares), sum(len(share.groups) for share in shares)
    bad: list[str] = []
    warnings: dict[str, None] = {}
    with reporter.bar(nbytes, "B", "verifying") as advance:
        for share in shares:
            store = PackedStore(share, staging_bytes=options.staging_mb * 10**6, verify="always")
            try:
                if checkpoint is not None:
                    compare_heads(store, share_of(checkpoint, share.shard))
                bad += verify(store, progress=advance)
            finally:
                store.close()
            warnings |= dict.fromkeys(store.warnings)
    for warning in warnings:
        reporter.say(f"[WARNING] {warning}")
    for sentence in bad:
        print(sentence, file=sys.stderr)
    what = "read back" if shares[0].version == 1 else "sound"
    reporter.say(f"[INFO] {groups - len(bad)} of {groups} groups {what}, {nbytes / 1e9:.3f} GB")
    return 4 if bad else 0


def run_plan(options: RunOptions, argv: Sequence[str]) -> int:
    """Print what would lie where, and what each flag would buy; exit code 3 if it does not fit."""
    ranks = options.tp or 1
    built, warnings = build_options(options, World(Shard(0, ranks), Shard(0, ranks)))
    inputs = open_inputs(built)
    plan = plan_run(inputs, shape_of(batch_prompts(options, inputs, print), options))
    ceilings = recall_near(inputs)
    if not ceilings:
        print("[INFO] no floor is predicted: this machine's ceilings are measured, and kept, by the first run")
    print(describe(plan, ceilings))
    if options.auto:
        print(f"[INFO] to keep this choice: {kept_command(argv, auto_flags(plan))}")
    for warning in warnings:
        print(f"[WARNING] {warning}")
    check_fits(plan, ceilings)
    return 0


def run_prompts(options: PromptsOptions) -> int:
    """Make a prompt file."""
    checkpoint = (
        open_checkpoint(options.checkpoints)
        if options.checkpoints is not None
        else builtin_checkpoint(options.cache_dir.expanduser())
    )
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config)
    if not options.out.absolute().parent.is_dir():
        raise UnusableInput(f"--out {options.out}: its directory does not exist")
    texts = []
    with ConsoleReporter(quiet=False, verbose=options.verbose).bar(options.count, "prompt", "prompts") as advance:
        for text in make_prompts(tokenizer, options.count, options.tokens, options.seed):
            texts.append(text)
            advance(1)
    write_atomically(options.out, prompt_file(texts, options.tokens))
    print(f"[INFO] {options.count} prompts of {options.tokens} tokens in {options.out}")
    return 0


def run_compare(options: CompareOptions) -> int:
    """Print results against the first; with ``--threshold``, exit code 1 if one is slower by more."""
    comparison = compare(read_sides(options.paths))
    print({"text": as_text, "md": as_markdown, "csv": as_csv}[options.output](comparison))
    if options.threshold is None:
        return 0
    slower = regressions(comparison, options.threshold)
    for against in slower:
        assert against.ratio is not None
        print(
            f"bench_infer.py: {against.side.name} is slower than {comparison.sides[0].name} by "
            f"{100 * (against.ratio.value - 1):.1f} %, more than --threshold {options.threshold:g}",
            file=sys.stderr,
        )
    return 1 if slower else 0
