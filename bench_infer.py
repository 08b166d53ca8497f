#!/usr/bin/env python3
"""Runs LLaMA models larger than the GPU and tells where the time went; see README.md.

:func:`run` tells, read from top to bottom, what a run is: flags, plan, build, warm up, measure, write. Modules that
need torch are imported where they are used: its import takes seconds, and a wrong flag is to be answered at once.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.cli.endings import DONE, INTERRUPTED, code_of, is_foreseen, sentence_of
from bench.cli.verbs import run_verb
from bench.options.flags import parse
from bench.options.run_flags import RunOptions
from bench.run.job import Job, Terminated
from wsm.settings import Ranks, preset_environment, read_ranks, unknown_variables

if TYPE_CHECKING:
    from bench.result.summary import ConsoleReporter
    from bench.result.types import Result
    from bench.run.measure import Sampling
    from bench.run.record import Progress
    from llama import LLaMA


def main() -> int:
    """The script, and the command ``bench-infer``: the exit code."""
    user_set = preset_environment(os.environ)  # before torch, whose OpenMP reads its variable once
    return command_line(sys.argv[1:], user_set)


def command_line(argv: Sequence[str], user_set: Sequence[str] = ()) -> int:
    """One verb's exit code; what goes wrong is one sentence on stderr, with ``--verbose`` the traceback too.

    Args:
        user_set: names of the variables that the user had set.
    """
    job, code = Job(Ranks()), DONE
    failure: BaseException | None = None
    try:
        job = Job(read_ranks(os.environ))
        verb, options = parse(argv, os.environ)
        if verb == "run" and isinstance(options, RunOptions):
            code = run(options, argv, user_set, job)
        else:
            job.refuse_other_ranks(verb)
            code = run_verb(options, argv, user_set)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        code, failure = code_of(error), error
    if failure is not None and ("--verbose" in argv or not is_foreseen(failure)):
        traceback.print_exception(failure)
    code, sentence = job.end(code, sentence_of(failure), failure)
    if sentence is not None:
        print(f"bench_infer.py: {sentence}", file=sys.stderr)
    return code


def run(options: RunOptions, argv: Sequence[str], user_set: Sequence[str], job: Job) -> int:
    """Measure, print, write the JSON; the exit code. Of several ranks all measure, and the first prints and writes."""
    from bench.result.summary import ConsoleReporter
    from bench.run.batch import batch_prompts, facts_of, fill_batch, shape_of
    from bench.run.ceilings import recall_near
    from bench.run.measure import Sampling
    from bench.run.messages import explained, print_result, say_plan, say_streaming, warnings_of
    from bench.run.outputs import check_outputs, finishing, write_outputs
    from bench.run.record import Progress
    from llama import LLaMA
    from llama.inputs import open_inputs, plan_run
    from wsm.plan.advice import check_fits

    job.check_tp(options.tp, argv)
    job.join()
    quiet = options.output is not None or not job.speaks
    reporter = ConsoleReporter(quiet=quiet, verbose=options.verbose, bars=job.speaks)
    if job.speaks:
        check_outputs(options)
    reporter.say("[INFO] Global state tracker initialized")

    # Plan: what is read, how much is to be computed, and what will be where.
    inputs = open_inputs(options, job.world)
    prompts = batch_prompts(options, inputs, reporter.say)
    job.world.agree(facts_of(options, prompts))
    plan = plan_run(options, inputs, shape_of(prompts, options))
    ceilings = recall_near(options, inputs)
    say_plan(reporter, options, inputs, plan, argv)
    check_fits(plan, ceilings)

    # Build, warm up, measure, write: after Ctrl-C with the rounds that were finished.
    rows, got = fill_batch(prompts, options.batch_size), Progress({}, [])
    warnings = [*unknown_variables(os.environ), *warnings_of(user_set, plan)]
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed, options.ignore_eos)
    with (
        explained(options, inputs, plan, ceilings),
        LLaMA.assemble(inputs, plan, reporter, before_load=lambda llm: _probe(options, llm, got)) as llm,
    ):
        say_streaming(reporter, plan)
        _warm_up(llm, rows, sampling, options.warmup_rounds)
        _measure(llm, rows, sampling, options.repeats, reporter, got)
        with finishing():
            result = _result(options, argv, user_set, llm, rows, got, [*warnings, *llm.warnings])
            if job.speaks:
                write_outputs(options, llm, got, result)
    if job.speaks:
        print_result(reporter, options, result)
    return INTERRUPTED if got.interrupted else DONE


def _probe(options: RunOptions, llm: LLaMA, got: Progress) -> None:
    """Measure what the hardware can do, while all memory is there and nothing is loaded."""
    from bench.run.ceilings import probe, recall_for, remember

    with llm.load_times.timed("probe_s"):
        got.ceilings = recall_for(options, llm.inputs) if options.no_probe else probe(llm)
    if not options.no_probe:
        remember(options, llm.inputs, got.ceilings)


def _warm_up(llm: LLaMA, rows: list[list[int]], sampling: Sampling, rounds: int) -> None:
    """Untimed rounds, after which every resident is in its place."""
    from bench.run.measure import warm_up

    with llm.load_times.timed("warmup_s"):
        for _ in range(rounds):
            llm.inputs.world.barrier()
            warm_up(llm, rows, sampling)
    if llm.manager is not None and rounds:
        llm.manager.wait_loaded()


def _measure(
    llm: LLaMA, rows: list[list[int]], sampling: Sampling, repeats: int, reporter: ConsoleReporter, got: Progress
) -> None:
    """The timed rounds; after Ctrl-C those that were finished, if any was."""
    import psutil

    from bench.run.conditions import Watch
    from bench.run.measure import run_round

    llm.load_times.parts["from_process_start_s"] = time.time() - psutil.Process().create_time()
    store = llm.inputs.description if llm.plan.placement.residency.ssd else None
    got.watch = Watch(llm.inputs.device, store.targets if store is not None else ())
    try:
        with got.watch:
            for number in range(repeats):
                with reporter.bar(sampling.max_new_tokens, "tok", f"round {number + 1}/{repeats}") as advance:
                    llm.inputs.world.barrier()
                    got.rounds.append(run_round(llm, rows, sampling, on_token=lambda: advance(1)))
    except KeyboardInterrupt:
        got.interrupted = True
        if not got.rounds:
            raise


def _result(
    options: RunOptions,
    argv: Sequence[str],
    user_set: Sequence[str],
    llm: LLaMA,
    rows: list[list[int]],
    got: Progress,
    warnings: list[str],
) -> Result:
    """The result, once all is still; of several ranks, each brings its report and rank 0's is the job's."""
    from bench.run.ranks import agreed_round, collect, rank_report, with_ranks
    from bench.run.record import result_of

    if got.interrupted:
        llm.inputs.world.abandon()
    llm.stop()
    got.chosen = agreed_round(llm, got.rounds, interrupted=got.interrupted)
    result = result_of(options, argv, user_set, llm, rows, got, warnings)
    if llm.inputs.world.shard.size == 1:
        return result
    mine = rank_report(llm, got.rounds[got.chosen], result)
    return with_ranks(result, collect(llm, mine, interrupted=got.interrupted))


if __name__ == "__main__":
    sys.exit(main())
