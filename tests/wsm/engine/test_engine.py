"""The engine against a fake source: every group arrives whole, in order, as often as the plan says, and no more."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from bench.run.trace import chrome_trace
from tests.async_device import AsyncDevice
from tests.bench.run.test_trace import bars_by_lane
from tests.records import EVER, records_of, stats_over
from wsm.engine.device import CpuEvent, Device, Event, Link
from wsm.engine.schedule import RESIDENTS_IN_FLIGHT
from wsm.engine.slots import CopyJob, ReadJob, Slot
from wsm.engine.stream import WeightStreamingManager
from wsm.engine.telemetry import Telemetry
from wsm.errors import StoreError, UnusableInput
from wsm.layout.groups import KINDS, GroupId, GroupLayout, Kind, TensorLayout, pass_order
from wsm.plan.placement import LOADING_SLOTS, Placement, place
from wsm.settings import Settings
from wsm.store.source import ChunkRead, GroupRead

SLOT = {"attn": 8192, "ffn": 16384}


def image(group: GroupId | None, nbytes: int) -> Tensor:
    """Bytes that no other group has."""
    seed = 0 if group is None else 1 + group.layer * 2 + (group.kind == "ffn")
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class FakeSource:
    """Answers reads on one thread, in order; counts them; can be slow, or fail at the n-th read."""

    def __init__(self, *, delay_s: float = 0.0, fail_at: int | None = None) -> None:
        self.warnings: list[str] = []
        self.reads: Counter[GroupId | None] = Counter()
        self.asked: list[GroupId | None] = []
        self._delay_s, self._fail_at = delay_s, fail_at
        self._queue: list[tuple[GroupId | None, Tensor, GroupRead]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def layout(self, group: GroupId | None) -> GroupLayout:
        nbytes = SLOT[group.kind] if group is not None else 4096
        return GroupLayout(nbytes, (TensorLayout("data", torch.uint8, (nbytes,), 0, nbytes),))

    def slot_bytes(self, kind: Kind) -> int:
        return SLOT[kind]

    def read(self, group: GroupId | None, buffer: Tensor) -> GroupRead:
        read = GroupRead(Future(), Future(), [])
        with self._wake:
            self.asked.append(group)
            self._queue.append((group, buffer, read))
            self._wake.notify()
        return read

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                group, buffer, read = self._queue.pop(0)
            started = time.perf_counter()
            time.sleep(self._delay_s)
            self.reads[group] += 1
            if self._fail_at is not None and self.reads.total() >= self._fail_at:
                read.arrived.set_exception(StoreError(f"{group}: short read"))
                read.checked.set_exception(StoreError(f"{group}: short read"))
                continue
            data = image(group, self.layout(group).nbytes)
            buffer[: len(data)].copy_(data)
            read.chunks.append(ChunkRead(len(data), started, time.perf_counter()))
            read.arrived.set_result(None)
            read.checked.set_result(None)

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()


@contextmanager
def running(plan: Placement, settings: Settings, source: FakeSource) -> Iterator[WeightStreamingManager]:
    device = Device()
    with WeightStreamingManager(plan, source, device, settings, Telemetry(device)) as manager:
        watchdog = threading.Timer(60, manager.tiers.fail, [TimeoutError("nothing moves any more")])
        watchdog.start()
        try:
            manager.start()
            yield manager
        finally:
            watchdog.cancel()


def plan_for(n_layers: int, settings: Settings) -> Placement:
    return place(n_layers, settings)


def run_passes(manager: WeightStreamingManager, passes: int) -> None:
    for _ in range(passes):
        for group in pass_order(manager.n_layers):
            with manager.acquire(group) as weights:
                assert torch.equal(weights["data"], image(group, SLOT[group.kind])), group


switches = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["mixed", "stream", "preload"]),
        "gpu_cached_layers": st.integers(0, 9),
        "cpu_cache_layers": st.integers(1, 9),
        "prefetch_distance": st.integers(1, 5),
        "group_prefetch_depth": st.integers(1, 7),
        "aggressive_gpu_prefetch": st.integers(0, 3),
        "warmup_layers": st.integers(0, 9),
        "cpu_rolling_mode": st.booleans(),
        "cpu_evict": st.sampled_from(["belady", "fifo"]),
        "cpu_wrap_around": st.booleans(),
        "cpu_roll_sync": st.booleans(),
        "evict_finished": st.booleans(),
        "balance_prefetch": st.booleans(),
        "balance_tol": st.integers(0, 3),
        "pair_ahead": st.integers(0, 3),
        "kind_ahead_cap": st.integers(0, 3),
        "gpu_max_groups": st.integers(2, 10),
    }
)


@given(n_layers=st.integers(1, 9), chosen=switches, loaded_first=st.booleans())
@hypothesis_settings(max_examples=400, deadline=None)
def test_every_setting_delivers_every_group_whole_and_in_order(
    n_layers: int, chosen: dict[str, object], loaded_first: bool
) -> None:
    settings = replace(Settings(), **chosen)  # type: ignore[arg-type]
    with running(plan_for(n_layers, settings), settings, FakeSource()) as manager:
        if loaded_first:
            manager.tiers.wait_loaded()
        manager.tiers.wait_staged()
        run_passes(manager, 3)


@given(n_layers=st.integers(1, 8), chosen=switches, seed=st.integers(0, 1000))
@hypothesis_settings(max_examples=40, deadline=None)
def test_late_copies_and_computations_never_meet_another_group(
    n_layers: int, chosen: dict[str, object], seed: int
) -> None:
    """On a device that runs behind the host: a slot is rewritten only when its last reader is done."""
    settings = replace(Settings(), **chosen)  # type: ignore[arg-type]
    device, wrong = AsyncDevice(seed), list[GroupId]()

    def compute(weights: Mapping[str, Tensor], group: GroupId) -> None:
        before = torch.equal(weights["data"], image(group, SLOT[group.kind]))
        time.sleep(0.0004)
        if not before or not torch.equal(weights["data"], image(group, SLOT[group.kind])):
            wrong.append(group)

    with WeightStreamingManager(
        plan_for(n_layers, settings), FakeSource(), device, settings, Telemetry(device)
    ) as manager:
        manager.start()
        manager.tiers.wait_staged()
        for group in pass_order(n_layers) * 2:
            with manager.acquire(group) as weights:
                device.later(partial(compute, weights, group))
        device.synchronize()
        manager.stop()
        stats_over(manager.telemetry, range(2 * n_layers), range(1))
    device.end()
    assert not wrong


@pytest.mark.parametrize("evict", ["belady", "fifo"])
@pytest.mark.parametrize(("cached", "distance"), [(4, 2), (3, 1), (6, 2), (9, 3)])
def test_ssd_layers_a_pass_are_what_section_9_says(evict: str, cached: int, distance: int) -> None:
    layers, on_gpu, passes = 9, 2, 6
    settings = replace(
        Settings(),
        gpu_cached_layers=on_gpu,
        cpu_cache_layers=cached,
        prefetch_distance=distance,
        cpu_evict=evict,  # type: ignore[arg-type]
    )
    source = FakeSource()
    with running(plan_for(layers, settings), settings, source) as manager:
        run_passes(manager, passes)
        expected = layers - on_gpu - (cached - distance if evict == "belady" else 0)
        if cached >= layers - on_gpu:
            expected = 0
        stats = [stats_over(manager.telemetry, range(p * 18, (p + 1) * 18), range(p, p + 1)) for p in range(1, passes)]
    assert [phase.bytes["ssd_read"] for phase in stats] == [expected * sum(SLOT.values())] * (passes - 1)
    assert [phase.bytes["weight_h2d"] for phase in stats] == [(layers - on_gpu) * sum(SLOT.values())] * (passes - 1)


def test_a_failed_read_reaches_acquire_with_its_cause() -> None:
    settings = replace(Settings(), gpu_cached_layers=1, cpu_cache_layers=2, prefetch_distance=1)
    with (
        running(plan_for(6, settings), settings, FakeSource(fail_at=9)) as manager,
        pytest.raises(StoreError) as raised,
    ):
        run_passes(manager, 3)
    assert isinstance(raised.value.__cause__, StoreError)


@pytest.mark.parametrize("evict", ["belady", "fifo"])
@pytest.mark.parametrize("distance", [1, 2])
def test_staging_never_waits_for_slots_that_only_a_pass_can_free(
    distance: int, evict: Literal["belady", "fifo"]
) -> None:
    settings = replace(
        Settings(), gpu_cached_layers=2, cpu_cache_layers=distance + 1, prefetch_distance=distance, cpu_evict=evict
    )
    with running(plan_for(8, settings), settings, FakeSource()) as manager:
        manager.tiers.wait_staged()
        run_passes(manager, 2)


def test_what_is_asked_for_in_vain_is_refused_rather_than_waited_for() -> None:
    settings = replace(Settings(), mode="stream", gpu_cached_layers=2)
    with running(plan_for(4, settings), settings, FakeSource()) as manager:
        for group in (GroupId(4, "attn"), GroupId(-1, "ffn"), GroupId(0, "bogus")):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="no group of a model of 4 layers"), manager.acquire(group):
                pass
        with pytest.raises(ValueError, match="resident"), manager.acquire_all():
            pass
        run_passes(manager, 1)


def test_whatever_fails_while_a_read_is_recorded_reaches_acquire(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room for a record")

    monkeypatch.setattr("wsm.engine.telemetry.Telemetry.read_done", broken)
    settings = replace(Settings(), mode="stream", gpu_cached_layers=1)
    with running(plan_for(4, settings), settings, FakeSource()) as manager:
        with pytest.raises(RuntimeError) as failed:
            run_passes(manager, 1)
        assert isinstance(failed.value.__cause__, MemoryError)


def test_close_ends_every_thread_and_gives_back_every_page() -> None:
    before = set(threading.enumerate())
    settings = replace(Settings(), gpu_cached_layers=1, cpu_cache_layers=3, prefetch_distance=1)
    with running(plan_for(6, settings), settings, FakeSource(delay_s=0.001)) as manager:
        run_passes(manager, 1)
        assert any(thread.name.startswith("wsm-") for thread in set(threading.enumerate()) - before)
    # By name: an earlier test's watchdog may be ending meanwhile.
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("wsm-")]
    assert manager.memory.page_locked_bytes == 0


def test_telemetry_is_complete_once_the_manager_has_stopped() -> None:
    """Copies and reads that were under way when it stopped are in it, with an end."""
    settings = replace(Settings(), gpu_cached_layers=0, cpu_cache_layers=2, prefetch_distance=1, group_prefetch_depth=2)
    with running(plan_for(6, settings), settings, FakeSource(delay_s=0.002)) as manager:
        run_passes(manager, 2)
        manager.stop()
        copies = manager.telemetry.copies()
        assert all(copy.end >= copy.start for copy in copies)
        assert sum(copy.nbytes for copy in copies if copy.step is not None and copy.step < 24) == 12 * sum(
            SLOT.values()
        )
        with pytest.raises(RuntimeError, match="closed"), manager.acquire(GroupId(0, "attn")):
            pass


def test_close_in_the_middle_of_a_pass_does_not_hang() -> None:
    settings = replace(Settings(), gpu_cached_layers=1, cpu_cache_layers=3, prefetch_distance=1)
    with (
        running(plan_for(6, settings), settings, FakeSource(delay_s=0.01)) as manager,
        manager.acquire(GroupId(0, "attn")),
    ):
        pass


def test_a_pass_broken_off_is_passed_over() -> None:
    settings = replace(Settings(), gpu_cached_layers=1, cpu_cache_layers=3, prefetch_distance=1)
    with running(plan_for(6, settings), settings, FakeSource()) as manager:
        for group in pass_order(6)[:5]:
            with manager.acquire(group):
                pass
        run_passes(manager, 2)
        assert manager.tiers.next_step == 3 * 12


def test_on_demand_reads_wait_for_the_computation() -> None:
    settings = replace(Settings(), gpu_cached_layers=0, cpu_cache_layers=1, prefetch_distance=1, cpu_rolling_mode=False)
    source = FakeSource()
    with running(plan_for(4, settings), settings, source) as manager:
        time.sleep(0.1)
        assert source.reads[GroupId(0, "attn")] == 0
        run_passes(manager, 1)


def test_without_wrap_around_the_next_pass_is_not_read_ahead() -> None:
    settings = replace(Settings(), gpu_cached_layers=0, cpu_cache_layers=2, prefetch_distance=2, cpu_wrap_around=False)
    source = FakeSource()
    with running(plan_for(4, settings), settings, source) as manager:
        run_passes(manager, 1)
        time.sleep(0.1)
        assert source.reads[GroupId(0, "attn")] == 1


def test_finished_groups_stay_until_their_slot_is_needed() -> None:
    """With WSM_EVICT_FINISHED=0 and slots for all streamed layers, nothing is copied twice."""
    for evict, expected in ((True, 2), (False, 0)):
        settings = replace(Settings(), mode="stream", gpu_cached_layers=2, group_prefetch_depth=4, evict_finished=evict)
        with running(plan_for(4, settings), settings, FakeSource()) as manager:
            run_passes(manager, 3)
            phase = stats_over(manager.telemetry, range(16, 24), range(2, 3))
        assert phase.bytes["weight_h2d"] == expected * sum(SLOT.values())


def reads_before_the_compute_moves(**changes: object) -> set[GroupId | None]:
    """Which groups are read while the computation stays in its first layer, long enough for all that may be."""
    settings = replace(Settings(), gpu_cached_layers=0, cpu_cache_layers=2, prefetch_distance=2, **changes)  # type: ignore[arg-type]
    source = FakeSource()
    with running(plan_for(8, settings), settings, source) as manager, manager.acquire(GroupId(0, "attn")):
        time.sleep(0.2)
        return set(source.reads) - {None}


def test_roll_sync_holds_a_cpu_slot_until_the_compute_enters_its_layer() -> None:
    layers = {group.layer for group in reads_before_the_compute_moves(cpu_roll_sync=True) if group}
    assert layers == {0, 1, 2}
    layers = {group.layer for group in reads_before_the_compute_moves(cpu_roll_sync=False) if group}
    assert layers == {0, 1, 2, 3, 4}


def test_skipping_the_wait_lets_the_first_layers_compute_while_residents_load() -> None:
    settings = replace(Settings(), gpu_cached_layers=1, cpu_cache_layers=10, prefetch_distance=2, warmup_layers=1)
    with running(plan_for(16, settings), settings, FakeSource(delay_s=0.01)) as manager:
        manager.tiers.wait_staged()
        for group in pass_order(3):
            with manager.acquire(group):
                pass
        assert not manager.tiers.loaded()
        manager.tiers.wait_loaded()
        assert manager.tiers.loaded()
        assert manager.residents_s is not None


@pytest.mark.parametrize("evict", ["belady", "fifo"])
def test_residents_of_both_tiers_are_filled_in_one_sweep_over_the_store(evict: Literal["belady", "fifo"]) -> None:
    settings = replace(
        Settings(), gpu_cached_layers=5, cpu_cache_layers=12, prefetch_distance=3, warmup_layers=0, cpu_evict=evict
    )
    source, plan = FakeSource(), plan_for(24, settings)
    residents = {*plan.residency.gpu, *plan.residency.cpu}
    with running(plan, settings, source) as manager:
        manager.tiers.wait_loaded()  # nobody computes: so this waits for no slot that only a pass can free
        asked = [group for group in source.asked if group is not None and group.layer in residents]
    assert sorted(asked) == [group for group in pass_order(24) if group.layer in residents]
    for kind in KINDS:  # a group that waits for room lets the other kind pass
        on_gpu = [group for group in asked if group.kind == kind and group.layer in plan.residency.gpu]
        assert on_gpu == sorted(on_gpu)


def claims(manager: WeightStreamingManager) -> list[ReadJob]:
    """What the reader of a manager that was not started would read now; the bytes are there at once, unchecked."""
    found = []
    while (job := manager.tiers.claim_read()) is not None:
        found.append(job)
        if job.step is None:
            manager.tiers.resident_arrived()
    return found


def test_the_sweep_goes_on_beside_checksums_and_passes_over_what_has_no_room() -> None:
    settings = replace(Settings(), gpu_cached_layers=4, cpu_cache_layers=10, prefetch_distance=2, warmup_layers=0)
    plan, device = plan_for(16, settings), Device()
    assert (plan.residency.gpu, plan.residency.ssd) == ((2, 6, 10, 14), (1, 5, 9, 13))
    with WeightStreamingManager(plan, FakeSource(), device, settings, Telemetry(device)) as manager:
        tiers = manager.tiers
        # L1 is streamed, L2 comes through the other slot, L6 and L10 through the homes of L15 and L12.
        first = claims(manager)
        assert [job.group.layer for job in first[::2]] == [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]
        assert all(one.group.layer == other.group.layer for one, other in zip(first[::2], first[1::2], strict=True))
        job = next(job for job in first if job.group == GroupId(6, "ffn"))
        assert job.destination is tiers._cpu_homes[GroupId(15, "ffn")]
        tiers.read_done(job)
        assert claims(manager) == []
        copy = tiers.next_copy()
        assert copy is not None
        assert (copy.group, copy.step) == (GroupId(6, "ffn"), None)
        tiers.copy_queued(copy, device.record(device.stream()))
        # L12 is first in the line, and its home is still in use.
        assert [job.group for job in claims(manager)] == [GroupId(14, "ffn")]


def test_a_streamed_group_that_gets_room_waits_behind_few_residents() -> None:
    settings = replace(Settings(), gpu_cached_layers=4, cpu_cache_layers=10, prefetch_distance=2, warmup_layers=0)
    device = Device()
    with WeightStreamingManager(plan_for(16, settings), FakeSource(), device, settings, Telemetry(device)) as manager:
        jobs = []
        while (job := manager.tiers.claim_read()) is not None:
            jobs.append(job)
        assert sum(job.step is None for job in jobs) == RESIDENTS_IN_FLIGHT


@pytest.mark.parametrize("on_gpu", [0, 4])
def test_whoever_is_told_of_loaded_layers_may_fail_without_a_hang(on_gpu: int) -> None:
    """On the thread that reads and on the one that copies."""

    def fail(group: GroupId) -> None:
        raise OSError("the progress bar's terminal is gone")

    device, settings = Device(), Settings(mode="stream", gpu_cached_layers=on_gpu)
    with WeightStreamingManager(
        plan_for(4, settings), FakeSource(), device, settings, Telemetry(device), on_loaded=fail
    ) as manager:
        manager.start()
        with pytest.raises(RuntimeError, match="terminal is gone"):
            manager.tiers.wait_loaded()


@pytest.mark.parametrize("dry", [True, False])
def test_a_copy_s_record_is_broken_where_the_link_ran_dry(dry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 4096 bytes: a trace has a bar a group and pass all the same, and no byte is counted twice."""
    monkeypatch.setattr("wsm.engine.stream.PIECE_BYTES", 4096)
    monkeypatch.setattr(CpuEvent, "query", lambda event: dry)
    settings = Settings(mode="stream", gpu_cached_layers=1, group_prefetch_depth=2)
    with running(plan_for(4, settings), settings, FakeSource()) as manager:
        manager.tiers.wait_loaded()
        run_passes(manager, 2)
        manager.stop()
        monkeypatch.undo()
        copies = manager.telemetry.copies()
        assert manager.telemetry.copies() == copies
        trace = chrome_trace(records_of(manager.telemetry), {"decode": EVER})
    of_two_passes = [copy for copy in copies if copy.step is not None and copy.step < 16]
    assert sum(copy.nbytes for copy in of_two_passes) == 2 * 3 * sum(SLOT.values())
    pieces = 2 * 3 * sum(SLOT.values()) // 4096
    assert len(of_two_passes) == (pieces if dry else 2 * 3 * len(KINDS))
    assert pieces > 2 * 3 * len(KINDS)
    bars = [bar for track in bars_by_lane(trace)["H2D"].values() for bar in track]
    whole = {(copy.group, copy.step) for copy in copies}
    assert len(bars) == len(whole)
    assert {bar["args"]["bytes"] for bar in bars} == set(SLOT.values())


@pytest.mark.parametrize(
    ("mode", "on_gpu", "in_cpu", "layers_of_memory"),
    [("stream", 4, 1, 5), ("stream", 8, 1, 2), ("preload", 0, 1, 2), ("mixed", 4, 3, 3), ("mixed", 4, 5, 5)],
)
def test_loading_takes_memory_of_its_own_only_where_no_layer_has_any(
    mode: Literal["stream", "preload", "mixed"], on_gpu: int, in_cpu: int, layers_of_memory: int
) -> None:
    settings = replace(Settings(), mode=mode, gpu_cached_layers=on_gpu, cpu_cache_layers=in_cpu, prefetch_distance=1)
    with running(plan_for(9, settings), settings, FakeSource()) as manager:
        manager.tiers.wait_loaded()
        assert manager.memory.page_locked_peak_bytes == layers_of_memory * sum(SLOT.values())
        run_passes(manager, 2)


def test_a_copy_s_record_is_broken_where_another_s_piece_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowded(Device):
        """Counts copies."""

        copies = 0

        def copy(self, destination: Tensor, source: Tensor, stream: object) -> None:
            super().copy(destination, source, stream)
            self.copies += 1

    monkeypatch.setattr("wsm.engine.stream.PIECE_BYTES", 4096)
    monkeypatch.setattr(CpuEvent, "query", lambda event: False)
    device, settings = Crowded(), Settings(mode="stream", gpu_cached_layers=0, group_prefetch_depth=2)
    link, plan = Link(), plan_for(1, settings)
    with WeightStreamingManager(plan, FakeSource(), device, settings, Telemetry(device), link) as manager:
        group, tiers = GroupId(0, "ffn"), manager.tiers
        real = link.queued

        def crowded(end: Event) -> None:
            real(end)
            if device.copies == 2:
                real(device.record(device.stream()))

        monkeypatch.setattr(link, "queued", crowded)
        source = tiers._cpu_homes[group]
        manager._queue_pieces(CopyJob(group, 0, source, Slot(torch.empty_like(source.buffer))), device.stream())
        monkeypatch.undo()
        assert [copy.nbytes for copy in manager.telemetry.copies()] == [2 * 4096, SLOT["ffn"] - 2 * 4096]


def test_two_ways_in_stay_open_while_gpu_residents_wait() -> None:
    settings, device = Settings(mode="stream", gpu_cached_layers=4), Device()
    with WeightStreamingManager(plan_for(8, settings), FakeSource(), device, settings, Telemetry(device)) as manager:
        tiers, waiting = manager.tiers, set(manager.plan.residency.gpu)
        jobs = claims(manager)
        while jobs:
            unread = {group for group in tiers._residents.unread if group in tiers._cpu_homes}
            for kind in KINDS:
                if any(group.kind == kind and group.layer in waiting for group in tiers._residents.unread):
                    assert sum(group.kind == kind for group in unread) >= LOADING_SLOTS
            for job in jobs:
                tiers.read_done(job)
            while (copy := tiers._resident_copy()) is not None:
                tiers.copy_queued(copy, device.record(device.stream()))
            jobs = claims(manager)
        assert not tiers._residents.unread


def test_with_the_computation_on_its_heels_the_sweep_takes_streamed_groups_too() -> None:
    settings = replace(Settings(), gpu_cached_layers=3, cpu_cache_layers=10, prefetch_distance=6, warmup_layers=0)
    source = FakeSource(delay_s=0.003)
    with running(plan_for(16, settings), settings, source) as manager:
        run_passes(manager, 1)
    first_pass = [group for group in source.asked if group is not None][:32]
    assert first_pass[:20] == pass_order(16)[:20]  # while five streamed layers have room beside GPU residents
    assert sorted(first_pass) == pass_order(16)


def test_an_interrupted_wait_can_be_entered_again() -> None:
    settings = replace(Settings(), gpu_cached_layers=0, cpu_cache_layers=2, prefetch_distance=1, cpu_rolling_mode=False)
    with running(plan_for(4, settings), settings, FakeSource(delay_s=0.3)) as manager:
        timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt), manager.acquire(GroupId(0, "attn")):
            pass
        timer.join()
        run_passes(manager, 1)


def test_what_cannot_be_used_stays_what_it_is_on_its_way_through_the_threads() -> None:
    class Unusable(FakeSource):
        def read(self, group: GroupId | None, buffer: Tensor) -> GroupRead:
            if group is None:
                return super().read(group, buffer)
            failed: Future[None] = Future()
            failed.set_exception(UnusableInput("the checkpoint has no such tensor"))
            return GroupRead(failed, failed, [])

    settings = Settings(gpu_cached_layers=1, cpu_cache_layers=2)
    with running(plan_for(4, settings), settings, Unusable()) as manager, pytest.raises(UnusableInput):
        run_passes(manager, 1)


def test_a_device_that_fails_still_gives_every_page_back() -> None:
    class Failing(Device):
        def synchronize(self) -> None:
            raise RuntimeError("device lost")

    device = Failing()
    settings = Settings(gpu_cached_layers=1, cpu_cache_layers=2)
    manager = WeightStreamingManager(plan_for(4, settings), FakeSource(), device, settings, Telemetry(device))
    manager.start()
    with pytest.raises(RuntimeError, match="device lost"):
        manager.close()
    assert manager.memory.page_locked_bytes == 0
