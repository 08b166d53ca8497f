"""The verbs on a packed store: pack and verify."""

from __future__ import annotations

import sys

from bench.options.verb_flags import PackOptions, VerifyOptions
from bench.result.summary import ConsoleReporter
from llama.checkpoint import Checkpoint, WeightlessCheckpoint, has_weights, open_checkpoint
from llama.inputs import open_inputs
from llama.options import BuildOptions
from llama.stores import read_manifest
from wsm.errors import UnusableInput
from wsm.store.layout import plan_store
from wsm.store.match import compare_heads
from wsm.store.pack import PackRequest, pack
from wsm.store.packed_store import PackedStore, verify


def run_pack(options: PackOptions) -> int:
    """Pack a checkpoint."""
    reporter = ConsoleReporter(quiet=False, verbose=options.verbose)
    inputs = open_inputs(
        BuildOptions(
            mode="full",
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
                    compare_heads(store, checkpoint.share(share.shard))
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
