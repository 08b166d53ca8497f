"""The part ``parallel`` of a result: what every rank moved and waited for, and the floor over all their links."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from bench.result.fields import ByPhase, Part
from bench.result.types import GpuPeak, LinkRates, Result
from bench.result.types_phases import JobPhase, Parallel, Phase, Rank, RankPhase, Traffic
from bench.run.measure import Round, link_rates, median_round
from bench.run.record import gpu_peak
from llama.llm import LLaMA
from llama.parallel.watch import RankFailed

INTERRUPTED_LIMIT_S = 5.0
"""How long the other ranks' reports are waited for after Ctrl-C."""


class Report(Part, frozen=True, kw_only=True):
    """What a rank sends to the others."""

    rank: Rank
    output_sha256: str


def agreed_round(llm: LLaMA, rounds: Sequence[Round], *, interrupted: bool) -> int:
    """The round of median time on rank 0; where the others are going, this rank's own."""
    mine = median_round(rounds)
    answer = _exchange(llm, str(mine), interrupted=interrupted)[0]
    return min(int(answer), len(rounds) - 1) if answer is not None else mine


def _exchange(llm: LLaMA, mine: str, *, interrupted: bool) -> list[str | None]:
    """Every rank's text; after Ctrl-C, None for a rank that is gone."""
    world = llm.inputs.world
    try:
        return world.exchange(mine, INTERRUPTED_LIMIT_S if interrupted else None)
    except RankFailed:
        if not interrupted:
            raise
        return [mine if rank == world.shard.rank else None for rank in range(world.shard.size)]


def collect(llm: LLaMA, report: Report, *, interrupted: bool) -> list[Rank | None]:
    """Every rank's report; None for a rank that is gone after Ctrl-C.

    Raises:
        RuntimeError: if the ranks sampled different tokens.
    """
    answers = _exchange(llm, json.dumps(msgspec.to_builtins(report)), interrupted=interrupted)
    reports = [None if text is None else msgspec.convert(json.loads(text), Report) for text in answers]
    for rank, other in enumerate(reports):
        if other is not None and reports[0] is not None and other.output_sha256 != reports[0].output_sha256:
            raise RuntimeError(
                f"rank {rank} on {other.rank.host} sampled other tokens than rank 0: their devices or libraries "
                "compute differently; use hosts of one kind, or --temperature 0"
            )
    return [None if report is None else report.rank for report in reports]


def rank_report(llm: LLaMA, timed: Round, result: Result) -> Report:
    """What this rank measured in the round that its ``result`` is of; to be asked when the device is idle."""
    world = llm.inputs.world

    def phase(name: str, whole: Phase) -> RankPhase:
        collectives_ms, count = llm.collectives.within(timed.windows[name])
        shared = {key: getattr(whole, key) for key in RankPhase.__struct_fields__ if hasattr(whole, key)}
        return RankPhase(**shared, collectives_ms=collectives_ms, collectives=count)

    rates = msgspec.structs.asdict(result.ceilings)
    rank = Rank(
        rank=world.shard.rank,
        host=world.hosts[world.shard.rank],
        device=result.device,
        gpu=result.provenance.gpu,
        numa_node=None,
        gpu_peak_allocated_bytes=result.memory.gpu_peak_allocated_bytes,
        gpu_peak_reserved_bytes=result.memory.gpu_peak_reserved_bytes,
        cpu_page_locked_bytes=result.memory.cpu_page_locked_bytes,
        ceilings_MBps={name: rate.value for name, rate in rates.items() if rate and rate.unit == "MBps"},
        phases=ByPhase(prefill=phase("prefill", result.phases.prefill), decode=phase("decode", result.phases.decode)),
        warnings=result.warnings,
    )
    return Report(rank=rank, output_sha256=result.output.sha256)


def with_ranks(result: Result, ranks: list[Rank | None]) -> Result:
    """Rank 0's result as the whole job's: the fixed keys over all ranks, and the part ``parallel``."""
    there = [rank for rank in ranks if rank is not None]
    hosts = list(dict.fromkeys(rank.host for rank in there))
    prefill = _job_phase([(rank.rank, rank.phases.prefill) for rank in there])
    decode = _job_phase([(rank.rank, rank.phases.decode) for rank in there])
    parallel = Parallel(
        world_size=len(ranks),
        hosts=hosts,
        cpu_page_locked_bytes={
            host: sum(rank.cpu_page_locked_bytes for rank in there if rank.host == host) for host in hosts
        },
        phases=ByPhase(prefill=prefill, decode=decode),
        ranks=ranks,
    )
    return msgspec.structs.replace(
        result,
        io_bw_MBps=_job_rates(there),
        gpu_mem_GB=_largest_memory(there),
        phases=ByPhase(prefill=_bounded(result.phases.prefill, prefill), decode=_bounded(result.phases.decode, decode)),
        parallel=parallel,
        warnings=[
            *result.warnings,
            *(f"rank {r.rank}: {line}" for r in there[1:] for line in r.warnings if line not in result.warnings),
        ],
    )


def _bounded(phase: Phase, job: JobPhase) -> Phase:
    """Rank 0's phase with the job's floor."""
    return msgspec.structs.replace(phase, floor_ms=job.floor_ms, bound_by=job.bound_by, roofline_pct=job.roofline_pct)


def _job_phase(ranks: Sequence[tuple[int, RankPhase]]) -> JobPhase:
    """The slowest rank's floor is the job's; collectives take what the rank that waits least spends in them."""
    parts = [part for _, part in ranks]
    wall_ms = parts[0].wall_ms
    floors = [(part.floor_ms, rank, part.bound_by) for rank, part in ranks if part.floor_ms is not None]
    floor_ms, rank, bound_by = max(floors) if len(floors) == len(ranks) else (None, None, None)
    collectives_ms = min(part.collectives_ms for part in parts)
    return JobPhase(
        bytes=Traffic(**{key: sum(getattr(part.bytes, key) for part in parts) for key in Traffic.__struct_fields__}),
        floor_ms=floor_ms,
        bound_by=bound_by,
        bound_rank=rank,
        roofline_pct=None if floor_ms is None or not wall_ms else 100 * floor_ms / wall_ms,
        collectives=parts[0].collectives,
        collectives_ms=collectives_ms,
        collectives_pct=100 * collectives_ms / wall_ms if wall_ms else None,
    )


def _job_rates(ranks: Sequence[Rank]) -> LinkRates:
    """The links run side by side, so their rates add up."""
    rates = [link_rates(rank.phases) for rank in ranks]
    return LinkRates(
        **{name: sum(getattr(rate, name) or 0.0 for rate in rates) or None for name in LinkRates.__struct_fields__}
    )


def _largest_memory(ranks: Sequence[Rank]) -> GpuPeak:
    """Of the GPU that holds most."""
    allocated = [rank.gpu_peak_allocated_bytes for rank in ranks if rank.gpu_peak_allocated_bytes is not None]
    reserved = [rank.gpu_peak_reserved_bytes for rank in ranks if rank.gpu_peak_reserved_bytes is not None]
    return gpu_peak(max(allocated, default=None), max(reserved, default=None))
