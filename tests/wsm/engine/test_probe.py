"""The ceilings' probe: what it measures, within its time, and what it is remembered by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.run import ceilings, ceilings_file
from bench.run.ceilings import recall_for, recall_near, remember
from llama.opening import open_inputs
from llama.options import BuildOptions
from tests.wsm.engine.test_engine import SLOT, FakeSource
from wsm.engine.device import Device
from wsm.engine.probe import ON_CPU, _window_rates, ceiling_from, probe_link, probe_ssd
from wsm.engine.probe_compute import probe_compute, sustained
from wsm.errors import StoreError
from wsm.layout.groups import GroupId
from wsm.layout.model import Shard
from wsm.plan.time import Ceiling
from wsm.store.source import ChunkRead

GROUPS = [GroupId(layer, "attn") for layer in range(4)]


def buffers(count: int = 9) -> list[Tensor]:
    return [torch.zeros(SLOT["attn"], dtype=torch.uint8) for _ in range(count)]


def test_every_ceiling_has_its_best_sample_its_median_and_its_spread() -> None:
    source, memory = FakeSource(delay_s=0.002), torch.zeros(8 << 20, dtype=torch.uint8)
    found = probe_compute(Device(), torch.float32) | probe_link(Device(), memory, memory.clone())
    found |= probe_ssd(Device(), source, GROUPS, buffers(), memory)
    source.close()
    assert set(found) == {"hbm", "matmul", "h2d", "d2h", "h2d_d2h", "ssd", "h2d_with_ssd"}
    for ceiling in found.values():
        assert ceiling.value >= ceiling.median > 0
        assert ceiling.spread_pct >= 100 * (ceiling.value - ceiling.median) / ceiling.median
    assert 0 < found["ssd"].value < 1.05 * SLOT["attn"] / 0.002 / 1e6


def test_products_of_seconds_are_measured_after_the_clocks_came_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a card that makes 1000 products in its first 0.3 s of work, and 800 a second from then on."""
    made = [0]

    def seconds(device: Device, work: Callable[[], object]) -> float:
        before = made[0]
        work()
        fast = max(0, min(made[0], 300) - before)
        return fast / 1000 + (made[0] - before - fast) / 800

    def product() -> None:
        made[0] += 1

    monkeypatch.setattr("wsm.engine.probe_compute._seconds", seconds)
    found = sustained(Device(), product, 1.0, 1.0, "TFLOPs", "products")
    assert (found.value, found.median) == (pytest.approx(800.0), pytest.approx(800.0))
    assert found.how == "products back to back, the last 5 of 8 samples of 125"
    assert made[0] >= 1000


def test_a_gpu_has_a_lasting_rate_of_products_and_one_from_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsm.engine.probe.ON_CPU", ON_CPU._replace(matmul_s=0.05, matmul_n=128))
    found = probe_compute(Device(), torch.float32)
    assert set(found) == {"hbm", "matmul", "matmul_burst"}
    assert "back to back" in found["matmul"].how
    assert "back to back" not in found["matmul_burst"].how


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("pause_s", [0.0, 1.0])
def test_a_machine_that_stood_still_between_two_reads_gives_no_rate_of_0(pause_s: float) -> None:
    chunks = [ChunkRead(10**6, 0.0, 0.001), ChunkRead(10**6, 0.001 + pause_s, 0.002 + pause_s)]
    rates = _window_rates(chunks)
    ceiling = ceiling_from(rates, "MBps", "read")
    assert ceiling.value >= ceiling.median > 0
    assert ceiling.spread_pct >= 100 * pause_s
    some = ceiling_from([0.0, 0.0, 0.0, 100.0, 50.0], "MBps", "read")
    assert (some.value, some.median) == (100.0, 75.0)
    assert some.spread_pct > 100


def test_a_slow_drive_makes_no_longer_probe() -> None:
    """Reads that take most of the time there is are not queued behind each other."""
    source, memory = FakeSource(delay_s=0.2), buffers()
    started = time.perf_counter()
    found = probe_ssd(Device(), source, GROUPS, memory, memory[0].clone())
    took_s = time.perf_counter() - started
    source.close()
    assert took_s < ON_CPU.ssd_s + 2 * 0.2 + 0.3
    assert found["ssd"].value == pytest.approx(SLOT["attn"] / 0.2 / 1e6, rel=0.3)


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does, no sample is taken again."""
    monkeypatch.setattr("wsm.engine.probe.STEADY_PCT", float("inf"))


@pytest.mark.usefixtures("undisturbed")
def test_the_link_is_measured_over_more_memory_than_a_cpu_caches() -> None:
    """Both ways alone go from piece to piece; both at once keep to a half each."""
    host, slot = torch.zeros(400 << 20, dtype=torch.uint8), torch.zeros(64 << 20, dtype=torch.uint8)
    down, up = set[tuple[int, int]](), set[tuple[int, int]]()
    first, last = host.data_ptr(), host.data_ptr() + host.nbytes

    class Watched(Device):
        def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
            places, of_host = (down, source) if first <= source.data_ptr() < last else (up, destination)
            places.add((of_host.nbytes >> 20, (of_host.data_ptr() - first) >> 20))

    probe_link(Watched(), host, slot)
    whole = {(64, 64 * n) for n in range(6)}
    assert whole <= up
    assert whole <= down
    assert {place for place in down if place[0] == 32} == {(32, 32 * n) for n in range(5)}  # a piece a sample
    assert {place for place in up if place[0] == 32} == {(32, 200 + 32 * n) for n in range(5)}


@pytest.mark.usefixtures("undisturbed")
def test_a_slow_link_makes_smaller_samples() -> None:
    class Slow(Device):
        copies = 0

        def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
            self.copies += 1
            time.sleep(0.02)

    device, memory = Slow(), torch.zeros(1 << 20, dtype=torch.uint8)
    found = probe_link(device, memory, memory.clone())
    assert device.copies <= 4 + 4 * 5 * int(ON_CPU.copy_s / 0.02)
    assert found["h2d"].value == pytest.approx((1 << 20) / 0.02 / 1e6, rel=0.3)


class Clocked(Device):
    """Whose copies take what is said, by a clock of its own."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.now, self.took, self.copies = 0.0, list(seconds), 0

    def copy(self, destination: Tensor, source: Tensor, stream: Any) -> None:
        self.copies += 1
        self.now += self.took.pop(0) if len(self.took) > 1 else self.took[0]

    def record(self, stream: Any) -> Any:
        return SimpleNamespace(at=self.now, synchronize=lambda: None)

    def seconds(self, event: Any) -> float:
        return float(event.at)


def test_a_link_that_other_work_disturbs_is_measured_again_in_longer_samples() -> None:
    """A copy of 1 MiB takes 50 ms, but one of the first five samples twice as long."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    warm_up = [0.05] * 4
    found = probe_link(Clocked(*warm_up, 0.05, 0.05, 0.1, 0.05), memory, memory.clone())["h2d"]
    assert found.steady
    assert found.spread_pct == pytest.approx(0, abs=1e-6)
    assert found.value == pytest.approx((1 << 20) / 0.05 / 1e6)
    assert found.how.startswith("4 MiB in pieces of 1 MiB, 5 samples")
    assert "measured twice, since the first samples varied by 50 %" in found.how


def test_of_two_disturbed_measurements_the_steadier_one_counts_and_says_how_much_it_varied() -> None:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    first, second = [0.05, 0.05, 0.4, 0.05, 0.05], [0.05] * 4 * 4 + [0.1] * 4
    found = probe_link(Clocked(*[0.05] * 4, *first, *second, 0.05), memory, memory.clone())["h2d"]
    assert not found.steady
    assert found.spread_pct == pytest.approx(50)
    assert found.lowest == pytest.approx(found.value / 2)


def test_several_ranks_measure_again_together() -> None:
    """A rank whose own samples were steady does, too, where another's were not: else one would wait for ever."""
    memory, steps, answers = torch.zeros(1 << 20, dtype=torch.uint8), list[int](), list[bool]()

    def anyone(mine: bool) -> bool:
        answers.append(mine)
        return len(answers) == 1

    probe_link(Clocked(0.05), memory, memory.clone(), lambda: steps.append(1), anyone)
    assert answers == [False] * 4
    assert len(steps) == 4 * 5


def test_a_ceiling_that_varied_by_more_than_a_quarter_is_not_kept(tmp_path: Path) -> None:
    options = BuildOptions(synthetic="Llama-3.2-1B:layers=1", cache_dir=tmp_path, device="cpu")
    inputs = open_inputs(options)
    steady = {name: Ceiling(10.0, 9.0, "MBps", 25.0, "read") for name in ("ssd", "h2d")}
    remember(options, inputs, steady)
    remember(options, inputs, {"ssd": Ceiling(99.0, 50.0, "MBps", 26.0, "disturbed"), "hbm": steady["ssd"]})
    for recall in (recall_for, recall_near):
        kept = recall(options, inputs)
        assert set(kept) == {"ssd", "h2d", "hbm"}
        assert kept["ssd"].value == 10.0  # the steady one of before


def test_the_ceilings_of_a_kv_device_are_those_of_no_other(tmp_path: Path) -> None:
    options = BuildOptions(synthetic="Llama-3.2-1B:layers=1", cache_dir=tmp_path, device="cpu")
    inputs, found = open_inputs(options), Ceiling(10.0, 9.0, "MBps", 5.0, "moved")
    with_kv = replace(options, kv_device=str(tmp_path / "kv"))
    of_kv = {"kv_read", "kv_write", "h2d_with_kv"}
    remember(with_kv, inputs, dict.fromkeys(("h2d", *of_kv), found))
    assert set(recall_for(with_kv, inputs)) == {"h2d", *of_kv}
    assert set(recall_near(replace(with_kv, mode="stream"), inputs)) == {"h2d", *of_kv}
    assert set(recall_for(options, inputs)) == {"h2d"}
    assert set(recall_for(replace(options, kv_device="/dev/shm/kv"), inputs)) == {"h2d"}


def test_a_kv_devices_ceilings_are_of_its_blocks_checks_and_ranks(tmp_path: Path) -> None:
    options = BuildOptions(synthetic="Llama-3.2-1B:layers=1", cache_dir=tmp_path, device="cpu", kv_device="/dev/shm/kv")
    smaller = replace(options, kv_dtype="int8")
    checked = replace(options, verify_weights="always")
    inputs, of_kv = open_inputs(options), {"kv_read": Ceiling(10.0, 9.0, "MBps", 5.0, "moved")}
    remember(options, inputs, of_kv)
    assert set(recall_for(options, inputs)) == {"kv_read"}
    assert recall_for(checked, inputs) == recall_for(smaller, open_inputs(smaller)) == {}
    inputs.world = SimpleNamespace(shard=Shard(0, 2))  # type: ignore[assignment]
    assert recall_for(options, inputs) == {}


def test_a_disturbed_ceiling_that_an_earlier_program_kept_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(synthetic="Llama-3.2-1B:layers=1", cache_dir=tmp_path, device="cpu")
    inputs = open_inputs(options)
    with monkeypatch.context() as earlier:
        earlier.setattr("wsm.plan.time.STEADY_PCT", 1e9)
        remember(options, inputs, {"ssd": Ceiling(99.0, 50.0, "MBps", 94.0, "disturbed")})
        assert recall_for(options, inputs)
    assert recall_for(options, inputs) == {}


def test_a_drive_that_fails_while_it_is_probed_ends_the_probe_with_its_error() -> None:
    source, memory = FakeSource(fail_at=3), buffers()
    with pytest.raises(StoreError, match="short read"):
        probe_ssd(Device(), source, GROUPS, memory, memory[0].clone())
    source.close()


def test_ceilings_are_remembered_for_this_hardware_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions(synthetic="Llama-3.2-1B:layers=1", cache_dir=tmp_path, device="cpu")
    inputs = open_inputs(options)
    probed = Ceiling(10.0, 9.0, "MBps", 12.0, "read")
    assert recall_for(options, inputs) == {}
    remember(options, inputs, {"ssd": probed})
    assert recall_for(options, inputs) == {"ssd": replace(probed, how="read (of an earlier run)")}
    for name, other in (("cpu_model", lambda: "another processor"), ("drive_of", lambda path: {"model": "another"})):
        with monkeypatch.context() as machine:
            machine.setattr(ceilings, name, other)
            assert recall_for(options, inputs) == {}
    assert recall_for(replace(options, staging_mb=32), inputs) == {}


def test_ceilings_of_an_older_program_are_measured_anew(tmp_path: Path) -> None:
    """Its drives were read otherwise."""
    file, found = tmp_path / "ceilings.json", {"matmul": Ceiling(768.0, 760.0, "TFLOPs", 2.0, "8192^3")}
    ceilings_file.remember(file, "here", "a model", {"key": found})
    assert ceilings_file.recall(file)["key"].ceilings == found
    file.write_text(file.read_text().replace("ceilings 4", "ceilings 3"))
    assert ceilings_file.recall(file) == {}
    ceilings_file.remember(file, "here", "a model", {"key": {"hbm": found["matmul"]}})
    assert set(ceilings_file.recall(file)["key"].ceilings) == {"hbm"}
