"""The verbs other than ``run``. Each is imported where it is called: most need torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

from bench.options.flags import Options, check_point
from bench.options.run_flags import RunOptions
from bench.options.sweep_flags import SweepOptions
from bench.options.verb_flags import CompareOptions, PackOptions, PromptsOptions, VerifyOptions


def run_verb(options: Options, argv: Sequence[str], user_set: Sequence[str]) -> int:
    """The exit code of the verb that takes these options."""
    if isinstance(options, RunOptions):
        from bench.cli.plan import run_plan

        return run_plan(options, argv)
    if isinstance(options, PackOptions):
        from bench.cli.store import run_pack

        return run_pack(options)
    if isinstance(options, VerifyOptions):
        from bench.cli.store import run_verify

        return run_verify(options)
    if isinstance(options, PromptsOptions):
        from bench.cli.prompts import run_prompts

        return run_prompts(options)
    if isinstance(options, SweepOptions):
        from bench.sweep.sweep import run_sweep

        return run_sweep(options, user_set, check_point)
    if isinstance(options, CompareOptions):
        from bench.cli.compare import run_compare

        return run_compare(options)
    from bench.report.report import run_report

    return run_report(options)
