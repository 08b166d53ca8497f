"""The verb ``plan``."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bench.options.command import kept_command
from bench.options.run_flags import RunOptions
from bench.run.batch import batch_prompts, shape_of
from bench.run.ceilings import recall_near
from llama.inputs import open_inputs, plan_run
from llama.parallel.world import World
from wsm.layout.model import Shard
from wsm.plan.advice import check_fits, describe
from wsm.plan.levers import auto_flags
from wsm.settings import unknown_variables


def run_plan(options: RunOptions, argv: Sequence[str]) -> int:
    """Print what would lie where, and what each flag would buy; exit code 3 if it does not fit."""
    ranks = options.tp or 1
    inputs = open_inputs(options, World(Shard(0, ranks), Shard(0, ranks)))
    plan = plan_run(options, inputs, shape_of(batch_prompts(options, inputs, print), options))
    ceilings = recall_near(options, inputs)
    if not ceilings:
        print("[INFO] no floor is predicted: this machine's ceilings are measured, and kept, by the first run")
    print(describe(plan, ceilings))
    if options.auto:
        print(f"[INFO] to keep this choice: {kept_command(argv, auto_flags(plan))}")
    for warning in unknown_variables(os.environ):
        print(f"[WARNING] {warning}")
    check_fits(plan, ceilings)
    return 0
