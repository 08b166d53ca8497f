"""Where a run's weights are read from: the checkpoint, a store that is named, or the cached one, packed when needed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from llama.inputs import Inputs
from llama.loading import Reporter
from llama.options import BuildOptions
from llama.plans import plan_run
from wsm.plan.advice import check_fits
from wsm.plan.inputs import RunShape
from wsm.plan.plan import Plan
from wsm.plan.time import Ceiling
from wsm.settings import Settings
from wsm.store.cache import cached_store
from wsm.store.description import StoreDescription
from wsm.store.match import compare_heads
from wsm.store.packed_store import PackedStore
from wsm.store.source import CheckpointSource, GroupSource

LOADING_THREADS = 8


def find_store(
    options: BuildOptions,
    inputs: Inputs,
    shape: RunShape,
    reporter: Reporter,
    ceilings: Mapping[str, Ceiling] | None = None,
) -> None:
    """Where weights are read in a format that takes encoding: the cached store of them, packed now if it is not there.

    So the draft's, too. Synthetic weights, and a checkpoint's own formats, need one only where a pass reads the SSD.
    Raises DoesNotFit before it packs what would not fit in memory (saying what would, by ``ceilings``), or on the
    drive; UnusableInput if it cannot pack.
    """
    draft = inputs.draft.inputs if inputs.draft is not None else None
    encoded = [each for each in (inputs, draft) if each is not None and each.encoded_here]
    if all(each.description is not None for each in encoded):
        return
    with reporter.bar(None, "", "planning"):
        plan = plan_run(options, inputs, shape)
    for each in encoded:
        streamed = each is inputs and "SSD" in plan.way
        if each.description is None and (streamed or not each.synthetic):
            check_fits(plan, ceilings)
            each.read_from(_cached(each, reporter))


def _cached(inputs: Inputs, reporter: Reporter) -> StoreDescription:
    """The packed file of these weights in the cache directory, packed if it is not there."""
    with contextlib.ExitStack() as stack, inputs.world.first_here():
        return cached_store(
            inputs.checkpoint,
            inputs.dtype,
            inputs.cache_dir,
            say=lambda line: reporter.say(f"[INFO] {line}"),
            progress=lambda total: stack.enter_context(reporter.bar(total, "B", "packing")),
            shard=inputs.world.shard,
            weight_format=inputs.weight_format,
        )


def open_source(inputs: Inputs, plan: Plan, reporter: Reporter, *, packed: bool = True) -> GroupSource:
    """What the groups are read from; to be closed. Raises StoreError for a store that is not the checkpoint's.

    Without ``packed`` the checkpoint is read also where a pass reads the SSD: for a pass or two.
    """
    if inputs.description is None and "SSD" in plan.way and packed:
        inputs.read_from(_cached(inputs, reporter))
    return source_of(inputs, plan.inputs.settings)


def source_of(inputs: Inputs, settings: Settings) -> GroupSource:
    """The store that is read, or else the checkpoint; as :func:`open_source`."""
    if inputs.description is None:
        return CheckpointSource(
            inputs.share,
            inputs.dtype,
            threads=LOADING_THREADS,
            layouts=inputs.layouts,
        )
    store = PackedStore(inputs.description, staging_bytes=settings.staging_mb * 10**6, verify=settings.verify_weights)
    try:
        compare_heads(store, inputs.share)
    except BaseException:
        store.close()
        raise
    return store
