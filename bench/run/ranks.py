"""The part ``parallel`` of a result: what every rank moved and waited for, and the floor over all their links."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.run.measure import Round, phases_of
from bench.run.phases import floor_of, median_round
from llama.llm import LLaMA
from llama.parallel.watch import RankFailed
from wsm.plan.time import Ceiling

Report = dict[str, Any]
PHASES = ("prefill", "decode")
INTERRUPTED_LIMIT_S = 5.0
"""How long the other ranks' reports are waited for after Ctrl-C."""


def agreed_round(llm: LLaMA, rounds: Sequence[Round], *, interrupted: bool) -> int:
    """The round of median time on rank 0; where the others are going, this rank's own."""
    mine = median_round(rounds)
    try:
        answers = llm.inputs.world.exchange(str(mine), INTERRUPTED_LIMIT_S if interrupted else None)
    except RankFailed:
        if not interrupted:
            raise
        return mine
    return min(int(answers[0]), len(rounds) - 1) if answers[0] is not None else mine


def collect(llm: LLaMA, report: Report, *, interrupted: bool) -> list[Report | None]:
    """Every rank's report; None for a rank that is gone after Ctrl-C.

    Raises:
        RuntimeError: if the ranks sampled different tokens.
    """
    try:
        answers = llm.inputs.world.exchange(json.dumps(report), INTERRUPTED_LIMIT_S if interrupted else None)
    except RankFailed:
        if not interrupted:
            raise
        answers = [None] * llm.inputs.world.shard.size
        answers[llm.inputs.world.shard.rank] = json.dumps(report)
    reports = [None if text is None else json.loads(text) for text in answers]
    for rank, other in enumerate(reports):
        if other is not None and reports[0] is not None and other["output_sha256"] != reports[0]["output_sha256"]:
            raise RuntimeError(
                f"rank {rank} on {other['host']} sampled other tokens than rank 0: their devices or libraries compute "
                "differently; use hosts of one kind, or --temperature 0"
            )
    return reports


def rank_report(
    llm: LLaMA, timed: Round, prompts: Sequence[Sequence[int]], ceilings: Mapping[str, Ceiling], warnings: Sequence[str]
) -> Report:
    """What this rank measured in a round; to be asked when the device is idle."""
    world, device = llm.inputs.world, llm.inputs.device
    on_gpu = device.type == "cuda"
    phases = {}
    windows = ((timed.start, timed.prefill_done), (timed.prefill_done, timed.done))
    for name, window, stats in zip(PHASES, windows, phases_of(llm, timed, prompts), strict=True):
        floor_ms, bound_by = floor_of(stats, ceilings)
        collectives_ms, count = llm.collectives.within(window)
        phases[name] = {
            "wall_ms": stats.wall_ms,
            "bytes": stats.bytes,
            "bytes_moved": stats.bytes_moved,
            "busy_ms": stats.busy_ms,
            "stall_ms": stats.stall_ms,
            "idle_ms": stats.idle_ms,
            "floor_ms": floor_ms,
            "bound_by": bound_by,
            "collectives_ms": collectives_ms,
            "collectives": count,
        }
    return {
        "rank": world.shard.rank,
        "host": world.hosts[world.shard.rank],
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "numa_node": None,
        "gpu_peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "cpu_page_locked_bytes": llm.page_locked_bytes,
        "ceilings_MBps": {name: ceiling.value for name, ceiling in ceilings.items() if ceiling.unit == "MBps"},
        "phases": phases,
        "output_sha256": hashlib.sha256(json.dumps(timed.generation.tokens).encode()).hexdigest(),
        "warnings": list(warnings),
    }


def with_ranks(result: Mapping[str, Any], reports: Sequence[Report | None]) -> dict[str, Any]:
    """Rank 0's result as the whole job's: the fixed keys over all ranks, and the part ``parallel``."""
    there = [report for report in reports if report is not None]
    phases = {name: _job_phase(name, there) for name in PHASES}
    hosts = list(dict.fromkeys(report["host"] for report in there))
    parallel = {
        "world_size": len(reports),
        "hosts": hosts,
        "cpu_page_locked_bytes": {
            host: sum(report["cpu_page_locked_bytes"] for report in there if report["host"] == host) for host in hosts
        },
        "phases": phases,
        "ranks": [
            None if report is None else {key: value for key, value in report.items() if key != "output_sha256"}
            for report in reports
        ],
    }
    floors = ("floor_ms", "bound_by", "roofline_pct")
    own = result["warnings"]
    return {
        **result,
        "io_bw_MBps": _job_rates(there),
        "gpu_mem_GB": _largest_memory(there),
        "phases": {
            name: {**part, **{key: phases[name][key] for key in floors}} for name, part in result["phases"].items()
        },
        "parallel": parallel,
        "warnings": [
            *own,
            *(f"rank {r['rank']}: {warning}" for r in there[1:] for warning in r["warnings"] if warning not in own),
        ],
    }


def _job_phase(name: str, reports: Sequence[Report]) -> dict[str, Any]:
    """The slowest rank's floor is the job's; collectives take what the rank that waits least spends in them."""
    parts = [report["phases"][name] for report in reports]
    floors = [(part["floor_ms"], report["rank"], part["bound_by"]) for part, report in zip(parts, reports, strict=True)]
    known = all(floor is not None for floor, _, _ in floors)
    floor_ms, rank, bound_by = max(floors) if known else (None, None, None)
    wall_ms = parts[0]["wall_ms"]
    collectives_ms = min(part["collectives_ms"] for part in parts)
    return {
        "bytes": {key: sum(part["bytes"][key] for part in parts) for key in parts[0]["bytes"]},
        "floor_ms": floor_ms,
        "bound_by": bound_by,
        "bound_rank": rank,
        "roofline_pct": None if floor_ms is None or not wall_ms else 100 * floor_ms / wall_ms,
        "collectives": parts[0]["collectives"],
        "collectives_ms": collectives_ms,
        "collectives_pct": 100 * collectives_ms / wall_ms if wall_ms else None,
    }


def _job_rates(reports: Sequence[Report]) -> dict[str, float | None]:
    """The links run side by side, so their rates add up."""

    def rate(moved: str, busy: str) -> float | None:
        total = 0.0
        for report in reports:
            nbytes = sum(report["phases"][name]["bytes_moved"][moved] for name in PHASES)
            busy_ms = sum(report["phases"][name]["busy_ms"].get(busy) or 0.0 for name in PHASES)
            total += nbytes / busy_ms / 1e3 if nbytes and busy_ms else 0.0
        return total or None

    return {
        "weight_h2d_MBps": rate("weight_h2d", "h2d"),
        "kv_h2d_MBps": rate("kv_h2d", "kv_h2d"),
        "kv_d2h_MBps": rate("kv_d2h", "kv_d2h"),
    }


def _largest_memory(reports: Sequence[Report]) -> dict[str, float | None]:
    """Of the GPU that holds most."""

    def largest(key: str) -> float | None:
        sizes = [report[key] for report in reports if report[key] is not None]
        return max(sizes) / 2**30 if sizes else None

    return {"allocated_GB": largest("gpu_peak_allocated_bytes"), "reserved_GB": largest("gpu_peak_reserved_bytes")}
