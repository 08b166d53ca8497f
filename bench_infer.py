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
from functools import partial
from typing import TYPE_CHECKING

from bench.options import program
from bench.run import signals, streams

if __name__ == "__main__":
    signals.hear()  # before the modules below

try:
    from bench.cli.verbs import run_verb
    from bench.options.flags import parse
    from bench.options.run_flags import RunOptions
    from bench.run.job import DONE, FAILED, Job, is_foreseen
    from wsm import stop
    from wsm.settings import Ranks, preset_environment, read_ranks, unknown_variables
    from wsm.stop import Stopped
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"bench_infer.py: {program.lacks(error.name)}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from bench.result.console import ConsoleReporter
    from bench.run.record import Progress
    from llama import LLaMA


_PRINTING, _ASKING = (["plan"], ["compare"], ["cache"]), {"-h", "--help", "--version", "--list-models"}


def main() -> int:
    """The script, and the command ``bench-infer``: the exit code."""
    signals.hear()
    streams.make_lossy()
    user_set = preset_environment(os.environ)  # before torch, whose OpenMP reads its variable once
    argv = sys.argv[1:]
    try:
        code = command_line(argv, user_set)
    except SystemExit as ended:  # --help
        code = int(ended.code or DONE)
    if (why := streams.lost()) is not None and code == DONE:
        print(f"bench_infer.py: {why}", file=sys.stderr)
        if argv[:1] in _PRINTING or not _ASKING.isdisjoint(argv):  # other results are in files, or the code itself
            code = FAILED
    return code


def command_line(argv: Sequence[str], user_set: Sequence[str] = ()) -> int:
    """One verb's exit code; what goes wrong is one sentence on stderr, with ``--verbose`` the traceback too.

    ``user_set`` names the variables that the user had set.
    """
    with signals.heard():
        return _command_line(argv, user_set)


def _command_line(argv: Sequence[str], user_set: Sequence[str]) -> int:
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
    except (Exception, Stopped) as error:
        failure = error
    if failure is not None and ("--verbose" in argv or not is_foreseen(failure)):
        traceback.print_exception(failure)
    code, sentence = job.end(code, failure)
    if sentence is not None:
        print(f"bench_infer.py: {sentence}", file=sys.stderr)
    return code


def run(options: RunOptions, argv: Sequence[str], user_set: Sequence[str], job: Job) -> int:
    """Measure, print, write the JSON; the exit code. Of several ranks all measure, and the first prints and writes."""
    from bench.result.console import ConsoleReporter

    silent = options.output is not None or not job.speaks
    reporter = ConsoleReporter(quiet=silent, verbose=options.verbose, bars=job.speaks and not options.quiet)
    with signals.importing(), reporter.doing("starting torch"):
        from bench.run import outputs
        from bench.run.ceilings import recall_near
        from bench.run.prompts import batch_prompts, facts_of, fill_batch, shape_of
        from bench.run.record import Progress
        from llama import LLaMA
        from llama.opening import open_inputs
        from llama.plans import plan_run
        from llama.sources import find_store
        from wsm.plan.advice import check_fits
    stop.check()

    job.check_tp(options.tp, argv)
    job.join()
    if job.speaks:
        outputs.check_outputs(options)
    reporter.say("[INFO] Global state tracker initialized")

    # Plan: what is read, how much is to be computed, and what will be where.
    with reporter.doing("reading what the run needs"):
        inputs = open_inputs(options, job.world)
        prompts, cut = batch_prompts(options, inputs)
        job.world.agree(facts_of(options, prompts))
        shape, ceilings = shape_of(prompts, options), recall_near(options, inputs)
    reporter.notes(cut)
    find_store(options, inputs, shape, reporter, ceilings)
    with reporter.doing("planning"):
        plan = plan_run(options, inputs, shape)
    outputs.say_plan(reporter, options, inputs, plan, argv)
    check_fits(plan, ceilings)
    if job.speaks:
        outputs.check_room(options, plan)

    # Build, warm up, measure, write: after Ctrl-C with the rounds that were finished.
    warnings = [*unknown_variables(os.environ), *cut, *outputs.warnings_of(user_set, plan)]
    got = Progress(argv, user_set, fill_batch(prompts, options.batch_size), warnings)
    with (
        outputs.explained(options, inputs, plan, ceilings),
        LLaMA.assemble(inputs, plan, reporter, before_load=lambda llm: _probe(options, llm, got, reporter)) as llm,
    ):
        outputs.say_streaming(reporter, plan)
        _warm_up(options, llm, got, reporter)
        _measure(options, llm, got, reporter, job)
        _write(options, llm, got, reporter, job)
    return DONE if got.stopped_by is None else signals.exit_code(got.stopped_by)


def _probe(options: RunOptions, llm: LLaMA, got: Progress, reporter: ConsoleReporter) -> None:
    """Measure what the hardware can do, while all memory is there and nothing is loaded."""
    from bench.run.ceilings import probe, recall_for, remember

    with llm.load_times.timed("probe_s"), reporter.doing("probing what the hardware can do"):
        got.ceilings = recall_for(options, llm.inputs) if options.no_probe else probe(llm)
    if not options.no_probe:
        remember(options, llm.inputs, got.ceilings)


def _warm_up(options: RunOptions, llm: LLaMA, got: Progress, reporter: ConsoleReporter) -> None:
    """Untimed rounds, after which every resident is in its place."""
    from bench.run.measure import prefill_place, warm_up, warm_up_tokens

    with llm.load_times.timed("warmup_s"):
        for number in range(1, options.warmup_rounds + 1):
            what, tokens = f"warm-up {number}/{options.warmup_rounds}", warm_up_tokens(options)
            with reporter.bar(tokens, "tok", what, partial(prefill_place, llm)) as advance:
                llm.inputs.world.barrier()
                warm_up(llm, got.prompts, options, advance, last=number == options.warmup_rounds)
    if llm.manager is not None and options.warmup_rounds:
        with reporter.doing("loading what stays in memory"):
            llm.manager.tiers.wait_loaded()


def _measure(options: RunOptions, llm: LLaMA, got: Progress, reporter: ConsoleReporter, job: Job) -> None:
    """The timed rounds; where a stop is wished those that were finished, if any was."""
    import psutil

    from bench.run.conditions import Watch
    from bench.run.measure import forget_records, prefill_place, run_round

    llm.load_times.parts["from_process_start_s"] = time.time() - psutil.Process().create_time()
    store = llm.inputs.description if llm.plan.placement.residency.ssd else None
    got.watch = Watch(llm.inputs.device, store.targets if store is not None else ())
    try:
        with got.watch:
            for number in range(1, options.repeats + 1):
                what = f"round {number}/{options.repeats}"
                with reporter.bar(options.max_new_tokens, "tok", what, partial(prefill_place, llm)) as advance:
                    llm.inputs.world.barrier()
                    stop.check()
                    got.rounds.append(run_round(llm, got.prompts, options, on_tokens=advance))
                if options.trace is not None:
                    forget_records(got.rounds, options.repeats)
    except Stopped as wish:
        if not got.rounds:
            raise
        job.blame(wish)
        got.stopped_by = wish.number
    except Exception as error:
        if not got.rounds or llm.inputs.world.shard.size > 1:  # ranks end together, and one that failed has no say
            raise
        got.failure = error
        got.warnings.append(f"round {len(got.rounds) + 1} failed, and only those before it are here: {error}")


def _write(options: RunOptions, llm: LLaMA, got: Progress, reporter: ConsoleReporter, job: Job) -> None:
    """The result, with the rounds that were finished; then it raises what ended a round, or could not be written."""
    from bench.run import outputs
    from bench.run.ranks import job_result

    with stop.held():  # a wish to stop comes too late to lose finished rounds
        result = job_result(options, llm, got)
        written = outputs.write_outputs(options, llm, got, result) if job.speaks else outputs.Written(None, None)
    if job.speaks:
        outputs.print_result(reporter, options, result, written, got.stopped_by)
    if got.failure is not None and written.failure is not None:
        print(f"bench_infer.py: {written.failure}", file=sys.stderr)
    if (error := got.failure or written.failure) is not None:
        raise error


if __name__ == "__main__":
    sys.exit(main())
