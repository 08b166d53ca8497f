"""What else went on while the timed rounds ran: throttled clocks, and others on the GPU, the drive and the CPU.

Watched from outside: counters are read before and after, and one ``nvidia-smi`` looks at the clocks twice a second.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil
import torch

from bench.run.provenance import disk_of, output_of

CLOCK_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""What newer and older drivers call it."""
THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
SAMPLE_MS = 500
MOST_THROTTLED_SHARE = 0.1
MOST_DRIVE_SHARE, LEAST_DRIVE_BYTES = 0.05, 8 << 20
MOST_CPU_PCT, LEAST_S = 20.0, 1.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """What was seen; None where it does not apply or could not be had.

    Attributes:
        clock_samples, throttled_samples: how often the clocks were looked at, and were found throttled.
        drive_other_bytes: bytes that others read and wrote on the store's drives.
        cpu_other_pct: share of all cores' time that others, the hypervisor included, took.
    """

    clock_samples: int | None = None
    throttled_samples: int | None = None
    throttle_reasons: list[str] | None = None
    gpu_other_processes: int | None = None
    drive_other_bytes: int | None = None
    cpu_other_pct: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Watch:
    """A context manager around the timed rounds; afterwards ``conditions`` and ``warnings`` say what was seen.

    Args:
        targets: files or devices that the run reads from the SSD tier; empty where it reads none.
    """

    def __init__(self, device: torch.device, targets: Sequence[str]) -> None:
        self.conditions, self.warnings = Conditions(), list[str]()
        self._gpu = _Gpu(device) if device.type == "cuda" else None
        self._drive = _Drive(targets) if targets else None
        self._cpu = _Cpu()

    def __enter__(self) -> Watch:
        for part in (self._gpu, self._drive, self._cpu):
            if part is not None:
                part.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self._cpu, self._drive, self._gpu):
            if part is not None:
                self.conditions = part.stop(self.conditions)
                self.warnings += part.warnings


class _Cpu:
    """Time of all cores that other processes used."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def start(self) -> None:
        self._before, self._since = self._busy_s(), time.monotonic()

    def stop(self, seen: Conditions) -> Conditions:
        lasted_s = max(time.monotonic() - self._since, 1e-9)
        share = 100 * (self._busy_s() - self._before) / lasted_s / (psutil.cpu_count() or 1)
        share = min(100.0, max(0.0, share))
        if share > MOST_CPU_PCT and lasted_s >= LEAST_S:
            self.warnings.append(
                f"other processes took {share:.0f} % of the CPU while the timed rounds ran: end them, or repeat later"
            )
        return replace(seen, cpu_other_pct=share)

    @staticmethod
    def _busy_s() -> float:
        """CPU seconds of the machine less this process's own."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        waiting = times.idle + getattr(times, "iowait", 0.0)
        twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice as well
        return float(sum(times) - waiting - twice - own.user - own.system)


class _Drive:
    """Bytes on the store's drives that this process did not move."""

    def __init__(self, targets: Sequence[str]) -> None:
        self.warnings: list[str] = []
        self._disks = {disk_of(Path(target)) for target in targets}

    def start(self) -> None:
        self._before = self._counters()

    def stop(self, seen: Conditions) -> Conditions:
        after = self._counters()
        if self._before is None or after is None:
            self.warnings.append("conditions.drive_other_bytes could not be had: no counters of the store's drive")
            return seen
        (read, written), (own_read, own_written) = (
            [later - earlier for earlier, later in zip(before, now, strict=True)]
            for before, now in zip(self._before, after, strict=True)
        )
        others = max(0, read - own_read) + max(0, written - own_written)
        if others > max(LEAST_DRIVE_BYTES, MOST_DRIVE_SHARE * own_read):
            self.warnings.append(
                f"other processes moved {others / 1e6:.0f} MB on the store's drive while the timed rounds ran (this "
                f"run read {own_read / 1e6:.0f} MB): the ssd figures are of a shared drive; iotop names them"
            )
        return replace(seen, drive_other_bytes=others)

    def _counters(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Bytes read and written: on the drives, and by this process."""
        try:
            drives, own = psutil.disk_io_counters(perdisk=True, nowrap=False), psutil.Process().io_counters()
        except (OSError, RuntimeError, psutil.Error):
            return None
        if None in self._disks or not self._disks <= set(drives):
            return None
        counted = [drives[disk] for disk in self._disks if disk is not None]
        moved = sum(disk.read_bytes for disk in counted), sum(disk.write_bytes for disk in counted)
        return moved, (own.read_bytes, own.write_bytes)


class _Gpu:
    """Throttled clocks, and other processes' contexts, on the GPU in use."""

    def __init__(self, device: torch.device) -> None:
        self.warnings: list[str] = []
        self._uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._sampler: subprocess.Popen[str] | None = None
        self._samples: IO[str] | None = None
        self._others: int | None = None

    def start(self) -> None:
        self._others = self._other_processes()
        field = next((name for name in CLOCK_FIELDS if output_of(*self._query(name)) is not None), None)
        if field is None:
            return
        with contextlib.suppress(OSError):
            self._samples = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in stop)
            command = [*self._query(field), f"--loop-ms={SAMPLE_MS}"]
            self._sampler = subprocess.Popen(command, stdout=self._samples, stderr=subprocess.DEVNULL, text=True)

    @staticmethod
    def _query(field: str) -> tuple[str, str, str]:
        return "nvidia-smi", f"--query-gpu=uuid,{field}", "--format=csv,noheader"

    def stop(self, seen: Conditions) -> Conditions:
        masks = self._sampled()
        after = self._other_processes()
        known = [count for count in (self._others, after) if count is not None]
        others = max(known) if known else None
        if others is None:
            self.warnings.append("conditions.gpu_other_processes could not be had from nvidia-smi")
        elif others:
            self.warnings.append(f"{others} other process(es) had the GPU open: its memory and time were shared")
        if not masks:
            self.warnings.append("conditions.clock_samples could not be had from nvidia-smi: throttling is not known")
            return replace(seen, gpu_other_processes=others)
        throttled = [mask for mask in masks if mask & sum(THROTTLES)]
        reasons = [name for bit, name in THROTTLES.items() if any(mask & bit for mask in masks)]
        if len(throttled) > MOST_THROTTLED_SHARE * len(masks):
            self.warnings.append(
                f"the GPU's clocks were throttled in {len(throttled)} of {len(masks)} looks ({', '.join(reasons)}): "
                "computing was slower than the card can; see its cooling and its power limit"
            )
        return replace(
            seen,
            clock_samples=len(masks),
            throttled_samples=len(throttled),
            throttle_reasons=reasons,
            gpu_other_processes=others,
        )

    def _sampled(self) -> list[int]:
        """The bit masks of this GPU since the start."""
        if self._sampler is None or self._samples is None:
            return []
        self._sampler.terminate()
        self._sampler.wait()
        self._samples.seek(0)
        rows = [line.split(",") for line in self._samples.read().splitlines()]
        self._samples.close()
        masks = []
        for row in rows:
            if len(row) == 2 and row[0].strip().endswith(self._uuid):
                with contextlib.suppress(ValueError):  # a line cut short, or "[N/A]"
                    masks.append(int(row[1].strip(), 16))
        return masks

    def _other_processes(self) -> int | None:
        """How many; None where nvidia-smi tells of no process at all, not even this one (as in some containers)."""
        answer = output_of("nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader")
        rows = [line.split(",") for line in (answer or "").splitlines()]
        here = {row[1].strip() for row in rows if len(row) == 2 and row[0].strip().endswith(self._uuid)}
        if not here:
            return None
        # A container may number processes otherwise: then one of them is still this one.
        return len(here - {str(os.getpid())}) if str(os.getpid()) in here else len(here) - 1
