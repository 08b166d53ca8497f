"""KV below the device as its user meets it: figures, lanes and lines of what works, sentences for what cannot."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bench.cli.docs import result_schema
from bench_infer import command_line as main
from tests.stores import flip, loop_device
from tests.tiny import hf_directory, hf_model, hf_tokenizer
from tests.whole.test_cli import interrupted, sentence
from wsm.engine.tiers import Tiers
from wsm.errors import KVDeviceError
from wsm.kv import disk as kv_disk
from wsm.kv import target as kv_target
from wsm.kv.device import KVDevice
from wsm.kv.tiers import KVTiers
from wsm.layout.groups import BLOCK
from wsm.layout.kv import WINDOWS
from wsm.plan.hardware import GIB
from wsm.plan.kv import DISK_SLOTS

Run = Callable[..., tuple[int, str, str]]
ROWS, LAYERS = 4, 8
SHAPE = ["--batch-size", ROWS, "--prompt-len", 300, "--max-new-tokens", 4, "--micro-batch", 1, "--topk-blk", 0]
HOW = ["--device", "cpu", "--no-probe", "--temperature", 0, "--ignore-eos", "--gpu-cached-layers", 1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two packed stores of it, and the result of a run with all KV on the device."""
    home = tmp_path_factory.mktemp("home")
    shape = {"num_hidden_layers": LAYERS, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    hf_tokenizer(hf_directory(home / "hf", hf_model(**shape)))
    for name in ("own", "other"):
        where = ["--to", f"{home}/{name}.wsm", "--manifest", f"{home}/{name}.json"]
        assert main(["pack", "--checkpoints", f"{home}/hf", *where]) == 0
    assert main(words(home, home / "whole.json")) == 0
    return home


def words(home: Path, out: Path, *more: object) -> list[str]:
    flags = ["--checkpoints", home / "hf", "--mode", "stream", *SHAPE, *HOW, "--cache-dir", home / "cache"]
    return [str(word) for word in (*flags, "--out-json", out, *more)]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def budgets(home: Path, *, full_cpu: bool) -> list[object]:
    """Flags that leave a part of KV on the device, and of what is below too little CPU memory for all, if told so."""
    whole = read(home / "whole.json")
    kv, plan = whole["kv"]["gpu"], whole["plan"]
    part = kv["bytes"] // kv["parts"]
    gpu = plan["gpu_bytes"] - kv["bytes"] + (WINDOWS + 1) * part
    flags: list[object] = ["--gpu-mem-gb", gpu / GIB]
    if full_cpu:  # of two blocks a row one is the newest, which stays in memory
        cpu = plan["cpu_page_locked_bytes"] + kv["parts"] * part // 2 + (DISK_SLOTS + 2) * part
        flags += ["--cpu-mem-gb", (gpu + cpu) / GIB]
    return flags


@pytest.fixture
def run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*more: object, verb: Sequence[str] = ()) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*verb, *words(home, tmp_path / "r.json", *more)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("wsm")] == []


# -- what a run says


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_run_with_kv_below_the_device_says_where_it_lay_and_what_moved(
    tier: str, home: Path, tmp_path: Path, run: Run
) -> None:
    where = ["--kv-device", tmp_path / "kv"] if tier == "disk" else []
    trace = tmp_path / "trace.json"
    code, _, err = run(*budgets(home, full_cpu=tier == "disk"), *where, "--trace", trace)
    assert (code, err) == (0, "")
    result, whole = read(tmp_path / "r.json"), read(home / "whole.json")
    jsonschema.validate(result, result_schema())
    assert result["output"]["sha256"] == whole["output"]["sha256"]
    assert result["kv"]["exact"]
    assert result["kv"][tier]["parts"] > 0
    assert sum(result["kv"][where]["bytes"] for where in ("gpu", "cpu", "disk")) == whole["kv"]["gpu"]["bytes"]
    assert result["memory"]["cpu_page_locked_peak_bytes"] == result["plan"]["cpu_page_locked_bytes"]
    decode = result["phases"]["decode"]
    moving = ["kv_h2d", "kv_d2h", *(["kv_read"] if tier == "disk" else [])]
    assert all(decode["bytes"][way] > 0 and decode["busy_ms"][way] > 0 for way in moving)
    assert decode["stall_ms"]["kv"] >= 0
    assert result["io_bw_MBps"]["kv_h2d_MBps"] > 0
    assert result["io_bw_MBps"]["kv_d2h_MBps"] > 0
    bars = json.loads(trace.read_text())["traceEvents"]
    assert {bar["name"].partition(".")[2] for bar in bars if bar["ph"] == "X" and ".kv_" in bar["name"]} >= {*moving}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "trace.json"]


def test_the_kv_devices_rates_are_probed_and_in_the_floor(home: Path, tmp_path: Path, run: Run) -> None:
    where = [*budgets(home, full_cpu=True), "--kv-device", tmp_path / "kv"]
    code, _, err = run(*where)
    assert (code, err) == (0, "")
    before = read(tmp_path / "r.json")
    assert before["phases"]["decode"]["floor_ms"] is None
    assert any("no ceiling" in warning for warning in before["warnings"])
    assert main([word for word in words(home, tmp_path / "r.json", *where) if word != "--no-probe"]) == 0
    result = read(tmp_path / "r.json")
    jsonschema.validate(result, result_schema())
    assert result["output"]["sha256"] == before["output"]["sha256"]
    for way in ("kv_read", "kv_write"):
        assert result["ceilings"][way]["value"] > 0
        assert "at a time" in result["ceilings"][way]["how"]
    decode = result["phases"]["decode"]
    least_ms = (
        min(decode[which]["kv_read"] for which in ("bytes", "bytes_moved"))
        / result["ceilings"]["kv_read"]["value"]
        / 1e3
    )
    assert decode["floor_ms"] >= 0.999 * least_ms  # figures are rounded
    assert result["plan"]["bytes_per_pass"]["kv_read"] * decode["passes"] == decode["bytes"]["kv_read"]


def test_a_run_with_all_kv_on_the_device_has_no_kv_rates(home: Path) -> None:
    result = read(home / "whole.json")
    assert result["io_bw_MBps"]["kv_h2d_MBps"] is None
    assert result["io_bw_MBps"]["kv_d2h_MBps"] is None
    assert result["phases"]["decode"]["stall_ms"]["kv"] is None
    assert result["phases"]["decode"]["busy_ms"]["kv_h2d"] is None
    assert result["kv"]["cpu"]["parts"] == result["kv"]["disk"]["parts"] == 0


def test_the_plan_prints_kv_in_each_tier_and_what_a_pass_brings(home: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run(*budgets(home, full_cpu=True), "--kv-device", tmp_path / "kv", verb=["plan"])
    assert code == 0
    for line in ("parts (a layer, 1 rows)", "KV windows, 3 parts", "KV on --kv-device", "MB of KV to the GPU"):
        assert line in out
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"], "what --out-json names, and no KV"


@pytest.mark.parametrize(("threshold", "pauses"), [("5", True), ("6", False)])
def test_the_throttle_variable_is_counted_in_the_json(
    threshold: str, pauses: bool, home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With five groups wanted whenever KV is written: how many there are at a moment, the machine decides."""
    monkeypatch.setattr(Tiers, "wanted_groups", lambda self: 5)
    monkeypatch.setenv("WSM_KV_THROTTLE_THRESHOLD", threshold)
    monkeypatch.setenv("WSM_KV_THROTTLE_MS", "1")
    assert run(*budgets(home, full_cpu=False))[0] == 0
    assert (read(tmp_path / "r.json")["kv"]["throttle_pauses"] > 0) == pauses


def test_a_kv_device_that_nothing_needs_is_said_not_to_be_used(tmp_path: Path, run: Run) -> None:
    code, out, _ = run("--kv-device", tmp_path / "kv")
    assert code == 0
    assert "--kv-device is not used" in out
    assert not (tmp_path / "kv").exists()


# -- what cannot be


def test_kv_that_fits_nowhere_is_told_with_the_batch_that_does(home: Path, tmp_path: Path, run: Run) -> None:
    code, _, err = run(*budgets(home, full_cpu=True))
    assert code == 3
    assert "the run does not fit" in err.splitlines()[0]
    batch = int(err.split("it fits with --batch-size ")[1].split()[0].rstrip(";"))
    assert 0 < batch < ROWS
    assert run(*budgets(home, full_cpu=True), "--batch-size", batch)[0] == 0


@pytest.mark.root
def test_a_kv_device_that_is_too_small_is_told_in_bytes(home: Path, tmp_path: Path, run: Run) -> None:
    with loop_device(tmp_path / "small.img", 1 << 20) as device:
        code, _, err = run(*budgets(home, full_cpu=True), "--kv-device", device)
    assert code == 3
    assert f"{device} is too small: the KV takes" in sentence(err)
    assert not (tmp_path / "r.json").exists()


def test_a_filesystem_without_room_for_kv_is_told_in_bytes(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs
    monkeypatch.setattr(kv_target.os, "statvfs", lambda file: os.statvfs_result((*real(file)[:4], 16, *real(file)[5:])))
    code, _, err = run(*budgets(home, full_cpu=True), "--kv-device", tmp_path / "kv")
    assert code == 3
    assert "is too small: the KV takes" in sentence(err)
    nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("own.wsm", "is where the weights of this run lie"),
        ("other.wsm", "bears a packed store of weights"),
        ("hf/model.safetensors", "holds something that is no offloaded KV"),
        ("hf", "is neither a file nor a block device"),
        ("nowhere/kv", "its directory does not exist"),
    ],
)
def test_what_is_no_place_for_kv_is_refused_and_stays_as_it_is(
    where: str, why: str, home: Path, tmp_path: Path, run: Run
) -> None:
    place = home / where
    before = place.read_bytes() if place.is_file() else b""
    code, _, err = run(*budgets(home, full_cpu=True), "--manifest", home / "own.json", "--kv-device", place)
    assert code == 2
    assert why in sentence(err)
    assert before == (place.read_bytes() if place.is_file() else b"")
    nothing_left(tmp_path)


@pytest.mark.parametrize(("what", "call"), [("read", "pread"), ("write", "pwrite")])
def test_an_error_of_the_kv_drive_ends_the_run_without_a_token_and_leaves_nothing(
    what: str, call: str, home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    faulty: dict[str, Any] = {call: broken}
    monkeypatch.setattr(kv_disk, "KVDevice", partial(KVDevice, **faulty))
    code, out, err = run(*budgets(home, full_cpu=True), "--kv-device", tmp_path / "kv", "--print-text")
    assert code == 4
    assert f"in offloaded KV: {what} error: Input/output error" in sentence(err)
    assert "[TEXT" not in out
    nothing_left(tmp_path)


def test_a_filesystem_that_goes_read_only_behind_the_error_changes_nothing_of_it(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ext4 does: then the file cannot be removed."""
    device, unlink = tmp_path / "kv", os.unlink

    def broken(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def refused(path: Any, **more: Any) -> None:
        if Path(path) == device:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        unlink(path, **more)

    monkeypatch.setattr(kv_disk, "KVDevice", partial(KVDevice, pread=broken))
    monkeypatch.setattr(os, "unlink", refused)
    where = [*budgets(home, full_cpu=True), "--kv-device", device]
    code, _, err = run(*where)
    assert code == 4
    assert "in offloaded KV: read error: Input/output error" in sentence(err)
    assert device.exists()
    monkeypatch.setattr(kv_disk, "KVDevice", KVDevice)
    code, _, err = run(*where)
    assert code == 4
    assert f"{device} cannot be removed (Read-only file system): remove it" in sentence(err)
    assert (tmp_path / "r.json").exists(), "the run itself was sound"


def test_a_write_that_fails_behind_the_last_token_is_exit_4_and_the_result_is_written(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it fails late, when the run is about to close."""
    settle = KVTiers._settle

    def fails_late(self: KVTiers, write: Any, *more: Any) -> None:
        if write.unit == (LAYERS - 1, ROWS - 1):
            time.sleep(0.3)
            raise KVDeviceError("the drive is gone")
        settle(self, write, *more)

    monkeypatch.setattr(KVTiers, "_settle", fails_late)
    flags = [*budgets(home, full_cpu=True), "--kv-device", tmp_path / "kv", "--warmup-rounds", 0, "-n", 1]
    code, _, err = run(*flags)
    assert code == 4
    assert "the drive is gone" in sentence(err)
    assert "the end of the run failed: the drive is gone" in read(tmp_path / "r.json")["warnings"]


def test_ctrl_c_takes_the_kv_file_away(home: Path, tmp_path: Path) -> None:
    kv, out = tmp_path / "kv", tmp_path / "r.json"
    more = [*budgets(home, full_cpu=True), "--kv-device", kv, "--repeats", 100000]
    ended = interrupted(words(home, out, *more), 1.0, kv.exists)
    assert ended.returncode == 130
    sentence(ended.stderr)
    assert not kv.exists()


def test_kv_that_changes_on_its_device_is_exit_4(
    home: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, real = tmp_path / "kv", kv_disk.KVDisk.write_window

    def then_change(self: kv_disk.KVDisk, *args: Any) -> None:
        real(self, *args)
        flip(device, BLOCK + 100)

    monkeypatch.setattr(kv_disk.KVDisk, "write_window", then_change)
    code, _, err = run(*budgets(home, full_cpu=True), "--kv-device", device)
    assert code == 4
    assert f"{device} at byte {BLOCK}, in offloaded KV: what was read is not what was written" in sentence(err)
    assert not (tmp_path / "r.json").exists()
    assert not device.exists()
