"""pynvml of a machine whose GPUs, driver and refusals a test chooses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

FIRST, SECOND = "11111111-aaaa-bbbb-cccc-000000000001", "22222222-aaaa-bbbb-cccc-000000000002"
CLOCK_FUNCTIONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


class NVMLError(Exception):
    """What every function of pynvml raises where it cannot answer."""


@dataclass
class FakeGpu:
    """A None is refused by the driver, as a field that it does not support is."""

    uuid: str = SECOND
    gen: int | None = 4
    gen_max: int | None = 4
    width: int | None = 16
    width_max: int | None = 16
    masks: list[int | None] = field(default_factory=list)
    """Of the clocks, one for each look; then none."""
    processes: Sequence[int] = ()


def _known(value: Any) -> Any:
    if value is None:
        raise NVMLError("Not Supported")
    return value


class FakeNvml(ModuleType):
    """Its functions as a module's attributes; ``lacks`` are those that this package or driver does not have."""

    NVMLError = NVMLError

    def __init__(self, gpus: Sequence[FakeGpu], driver: str | bytes = "570.1", lacks: Sequence[str] = ()) -> None:
        super().__init__("pynvml")
        by_uuid = {f"GPU-{gpu.uuid}".encode(): gpu for gpu in gpus}
        self._initialised = False
        functions = {
            "nvmlSystemGetDriverVersion": lambda: driver,
            "nvmlDeviceGetCount": lambda: len(gpus),
            "nvmlDeviceGetHandleByIndex": lambda index: gpus[index],
            "nvmlDeviceGetHandleByUUID": lambda uuid: _known(by_uuid.get(uuid)),
            "nvmlDeviceGetCurrPcieLinkGeneration": lambda gpu: _known(gpu.gen),
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda gpu: _known(gpu.gen_max),
            "nvmlDeviceGetCurrPcieLinkWidth": lambda gpu: _known(gpu.width),
            "nvmlDeviceGetMaxPcieLinkWidth": lambda gpu: _known(gpu.width_max),
            "nvmlDeviceGetComputeRunningProcesses_v3": lambda gpu: [SimpleNamespace(pid=n) for n in gpu.processes],
            **{name: lambda gpu: _known(gpu.masks.pop(0) if gpu.masks else None) for name in CLOCK_FUNCTIONS},
        }
        for name, function in functions.items():
            if name not in lacks:
                setattr(self, name, self._once_initialised(function))

    def nvmlInit(self) -> None:
        self._initialised = True

    def _once_initialised(self, function: Any) -> Any:
        def called(*args: Any) -> Any:
            if not self._initialised:
                raise NVMLError("Uninitialized")
            return function(*args)

        return called


class NoDriver(FakeNvml):
    """pynvml where no driver is."""

    def __init__(self) -> None:
        super().__init__([])

    def nvmlInit(self) -> None:
        raise NVMLError("NVML Shared Library Not Found")


def gpu_machine(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, uuid: str = SECOND) -> None:
    """A machine with this pynvml (None: not installed), and on which torch calls the GPU of ``uuid`` cuda:0."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
