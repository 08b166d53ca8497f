"""The part ``parallel`` of a result: what every rank moved and waited for, and the floor over all their links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from bench.options.run_flags import RunOptions
from bench.result.fields import ByPhase
from bench.result.types import LinkRates, Result
from bench.result.types_phases import JobPhase, Parallel, Phase, Rank, RankPhase, Traffic
from bench.run.measure import Round, link_rates, median_round
from bench.run.record import Progress, gpu_peak, result_of
from llama.llm import LLaMA
from llama.parallel.watch import RankFailed

INTERRUPTED_LIMIT_S = 5.0
"""How long the other ranks' reports are waited for after Ctrl-C."""


def job_result(options: RunOptions, llm: LLaMA, got: Progress) -> Result:
    """The result, once all is still; of several ranks, each sends its report and rank 0's is the job's.

    The round of median time on rank 0 counts. Raises RuntimeError if the ranks sampled different tokens.
    """
    world = llm.inputs.world
    if got.interrupted:
        world.abandon()
    try:
        llm.stop()
    except Exception as error:  # a drive that hangs, say: the finished rounds are as good as they were
        if world.shard.size > 1 and not got.interrupted:
            raise
        got.failure = got.failure or error
        got.warnings.append(f"the end of the run failed: {error}")
    mine = median_round(got.rounds)
    theirs = _exchange(llm, str(mine), got)[0]
    got.chosen = min(int(theirs), len(got.rounds) - 1) if theirs is not None else mine
    result = result_of(options, llm, got)
    if world.shard.size == 1:
        return result
    report = msgspec.json.encode((_rank(llm, got.rounds[got.chosen], result), result.output.sha256)).decode()
    answers = _exchange(llm, report, got)
    reports = [None if text is None else msgspec.json.decode(text, type=tuple[Rank, str]) for text in answers]
    for number, other in enumerate(reports):
        if other is not None and reports[0] is not None and other[1] != reports[0][1]:
            raise RuntimeError(
                f"rank {number} on {other[0].host} sampled other tokens than rank 0: their devices or libraries "
                "compute differently; use hosts of one kind, or --temperature 0"
            )
    return with_ranks(result, [None if other is None else other[0] for other in reports])


def _exchange(llm: LLaMA, mine: str, got: Progress) -> list[str | None]:
    """Every rank's text; after Ctrl-C, None for a rank that is gone."""
    world = llm.inputs.world
    try:
        return world.exchange(mine, INTERRUPTED_LIMIT_S if got.interrupted else None)
    except RankFailed:
        if not got.interrupted:
            raise
        return [mine if rank == world.shard.rank else None for rank in range(world.shard.size)]


def _rank(llm: LLaMA, timed: Round, result: Result) -> Rank:
    """What this rank measured in the round that its ``result`` is of; to be asked when the device is idle."""
    world, rates = llm.inputs.world, msgspec.structs.asdict(result.ceilings)
    phases = {}
    for (name, whole), stretch in zip(msgspec.structs.asdict(result.phases).items(), timed.stretches, strict=True):
        shared = {key: getattr(whole, key) for key in RankPhase.__struct_fields__ if hasattr(whole, key)}
        in_graphs = name == "decode" and llm.graphs is not None
        collectives_ms = None if in_graphs else stretch.collectives_cover.ms
        phases[name] = RankPhase(**shared, collectives_ms=collectives_ms, collectives=stretch.collectives)
    return Rank(
        rank=world.shard.rank,
        host=world.hosts[world.shard.rank],
        device=result.device,
        gpu=result.provenance.gpu,
        numa_node=None,
        gpu_peak_allocated_bytes=result.memory.gpu_peak_allocated_bytes,
        gpu_peak_reserved_bytes=result.memory.gpu_peak_reserved_bytes,
        cpu_page_locked_bytes=result.memory.cpu_page_locked_bytes,
        ceilings_MBps={name: rate.value for name, rate in rates.items() if rate and rate.unit == "MBps"},
        phases=ByPhase(**phases),
        warnings=result.warnings,
    )


def with_ranks(result: Result, ranks: list[Rank | None]) -> Result:
    """Rank 0's result as the whole job's: the fixed keys over all ranks, and the part ``parallel``."""
    there = [rank for rank in ranks if rank is not None]
    page_locked = Counter[str]()
    for rank in there:
        page_locked[rank.host] += rank.cpu_page_locked_bytes
    jobs, phases = dict[str, JobPhase](), dict[str, Phase]()
    for name, own in msgspec.structs.asdict(result.phases).items():
        jobs[name] = job = _job_phase([(rank.rank, getattr(rank.phases, name)) for rank in there])
        floor = {key: getattr(job, key) for key in ("floor_ms", "bound_by", "roofline_pct")}
        phases[name] = msgspec.structs.replace(own, **floor)
    parallel = Parallel(
        world_size=len(ranks),
        hosts=list(page_locked),
        cpu_page_locked_bytes=dict(page_locked),
        phases=ByPhase(**jobs),
        ranks=ranks,
    )
    rates = [link_rates(rank.phases) for rank in there]  # the links run side by side: their rates add up
    links = {name: sum(getattr(rate, name) or 0.0 for rate in rates) or None for name in LinkRates.__struct_fields__}
    allocated = [rank.gpu_peak_allocated_bytes for rank in there if rank.gpu_peak_allocated_bytes is not None]
    reserved = [rank.gpu_peak_reserved_bytes for rank in there if rank.gpu_peak_reserved_bytes is not None]
    return msgspec.structs.replace(
        result,
        io_bw_MBps=LinkRates(**links),
        gpu_mem_GB=gpu_peak(max(allocated, default=None), max(reserved, default=None)),  # of the GPU that holds most
        phases=ByPhase(**phases),
        parallel=parallel,
        warnings=[
            *result.warnings,
            *(f"rank {r.rank}: {line}" for r in there[1:] for line in r.warnings if line not in result.warnings),
        ],
    )


def _job_phase(ranks: Sequence[tuple[int, RankPhase]]) -> JobPhase:
    """The slowest rank's floor is the job's; collectives take what the rank that waits least spends in them."""
    parts = [part for _, part in ranks]
    wall_ms = parts[0].wall_ms
    floors = [(part.floor_ms, rank, part.bound_by) for rank, part in ranks if part.floor_ms is not None]
    floor_ms, rank, bound_by = max(floors) if len(floors) == len(ranks) else (None, None, None)
    beaten = any(part.roofline_pct is None for number, part in ranks if number == rank)
    known = [part.collectives_ms for part in parts if part.collectives_ms is not None]
    collectives_ms = min(known) if len(known) == len(parts) else None
    return JobPhase(
        bytes=Traffic(**{key: sum(getattr(part.bytes, key) for part in parts) for key in Traffic.__struct_fields__}),
        floor_ms=floor_ms,
        bound_by=bound_by,
        bound_rank=rank,
        roofline_pct=None if floor_ms is None or beaten or not wall_ms else 100 * floor_ms / wall_ms,
        collectives=parts[0].collectives,
        collectives_ms=collectives_ms,
        collectives_pct=100 * collectives_ms / wall_ms if wall_ms and collectives_ms is not None else None,
    )
