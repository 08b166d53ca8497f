"""What else went on while the timed rounds ran: throttled clocks, and others on the GPU, the drive and the CPU.

Counters are read before and after, and the GPU's clocks are looked at twice a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from bench.result.types_machine import Conditions
from bench.run.provenance import Gpu, disk_of
from wsm import threads
from wsm.words import counted

THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
SAMPLE_S = 0.5
MOST_THROTTLED_SHARE = 0.1
MOST_DRIVE_SHARE, LEAST_DRIVE_BYTES = 0.05, 8 << 20
MOST_CPU_PCT, LEAST_S = 20.0, 1.0


class Watch:
    """A context manager around the timed rounds; afterwards ``conditions`` and ``warnings`` say what was seen.

    ``targets`` are the files or devices that the run reads from the SSD tier; empty where it reads none.
    """

    def __init__(self, device: torch.device, targets: Sequence[str]) -> None:
        self.conditions, self.warnings = Conditions(), list[str]()
        self._disks = {disk_of(Path(target)) for target in targets}
        self._gpu = Gpu(device) if device.type == "cuda" else None
        self._throttle_masks: list[int] = []
        self._over = threading.Event()
        self._sampler = threads.Thread(target=self._look_at_clocks, name="clocks", daemon=True)

    def __enter__(self) -> Watch:
        if self._gpu is not None:
            self._others_before = self._gpu.other_processes()
            threads.start(self._sampler)
        self._moved_before = self._moved_bytes()
        self._busy_before_s, self._since_s = _busy_s(), time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._judge_cpu()
        if self._disks:
            self._judge_drive()
        if self._gpu is not None:
            self._over.set()
            threads.join([self._sampler])
            self._judge_processes(self._gpu)
            self._judge_clocks()

    def _look_at_clocks(self) -> None:
        while self._gpu is not None:
            mask = self._gpu.throttle_mask()
            if mask is not None:
                self._throttle_masks.append(mask)
            if self._over.wait(SAMPLE_S):
                return

    def _moved_bytes(self) -> tuple[int, int, int, int] | None:
        """Bytes read and written on the drives, then by this process; None where they are not counted."""
        try:
            drives, own = psutil.disk_io_counters(perdisk=True, nowrap=False), psutil.Process().io_counters()
            counted = [drives[str(disk)] for disk in self._disks]
        except (KeyError, OSError, RuntimeError, psutil.Error):
            return None
        read, written = sum(disk.read_bytes for disk in counted), sum(disk.write_bytes for disk in counted)
        return read, written, own.read_bytes, own.write_bytes

    def _judge_cpu(self) -> None:
        lasted_s = max(time.monotonic() - self._since_s, 1e-9)
        share = 100 * (_busy_s() - self._busy_before_s) / lasted_s / (psutil.cpu_count() or 1)
        self.conditions.cpu_other_pct = share = min(100.0, max(0.0, share))
        if share > MOST_CPU_PCT and lasted_s >= LEAST_S:
            self.warnings.append(
                f"other processes took {share:.0f} % of the CPU while the timed rounds ran: end them, or repeat later; "
                "on a CPU that stays shared OMP_WAIT_POLICY=PASSIVE lets torch's threads sleep while they wait"
            )

    def _judge_drive(self) -> None:
        before, after = self._moved_before, self._moved_bytes()
        if before is None or after is None:
            self.warnings.append("conditions.drive_other_bytes could not be had: no counters of the store's drive")
            return
        read, written, own_read, own_written = (now - earlier for earlier, now in zip(before, after, strict=True))
        self.conditions.drive_other_bytes = others = max(0, read - own_read) + max(0, written - own_written)
        if others > max(LEAST_DRIVE_BYTES, MOST_DRIVE_SHARE * own_read):
            self.warnings.append(
                f"other processes moved {others / 1e6:.0f} MB on the store's drive while the timed rounds ran (this "
                f"run read {own_read / 1e6:.0f} MB): the ssd figures are of a shared drive; iotop names them"
            )

    def _judge_processes(self, gpu: Gpu) -> None:
        known = [count for count in (self._others_before, gpu.other_processes()) if count is not None]
        self.conditions.gpu_other_processes = others = max(known, default=None)
        if others is None:
            self.warnings.append("conditions.gpu_other_processes could not be had from NVML")
        elif others:
            self.warnings.append(
                f"{counted(others, 'other process', 'other processes')} had the GPU open: its memory and time were "
                "shared"
            )

    def _judge_clocks(self) -> None:
        masks = self._throttle_masks
        if not masks:
            self.warnings.append("conditions.clock_samples could not be had from NVML: throttling is not known")
            return
        seen, throttled = self.conditions, sum(mask & sum(THROTTLES) != 0 for mask in masks)
        seen.clock_samples, seen.throttled_samples = len(masks), throttled
        seen.throttle_reasons = [name for bit, name in THROTTLES.items() if any(mask & bit for mask in masks)]
        if throttled > MOST_THROTTLED_SHARE * len(masks):
            self.warnings.append(
                f"the GPU's clocks were throttled in {throttled} of {counted(len(masks), 'look')} "
                f"({', '.join(seen.throttle_reasons)}): computing was slower than the card can; see its cooling and "
                "its power limit"
            )


def _busy_s() -> float:
    """CPU seconds of the machine less this process's own."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    waiting = times.idle + getattr(times, "iowait", 0.0)
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice as well
    return float(sum(times) - waiting - twice - own.user - own.system)
