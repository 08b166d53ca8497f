"""The GPU as NVML, the driver's management library, sees it; None for what it does not answer."""

from __future__ import annotations

import contextlib
import os
from types import ModuleType
from typing import Any

import torch

LINK = {
    "pcie_gen": "nvmlDeviceGetCurrPcieLinkGeneration",
    "pcie_gen_max": "nvmlDeviceGetMaxPcieLinkGeneration",
    "pcie_width": "nvmlDeviceGetCurrPcieLinkWidth",
    "pcie_width_max": "nvmlDeviceGetMaxPcieLinkWidth",
}


class Gpu:
    """One GPU, found by its UUID: torch and NVML number GPUs differently (CUDA_VISIBLE_DEVICES, fastest first)."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: ModuleType | None = None
        self._refusals: tuple[type[Exception], ...] = (AttributeError,)  # of a function that the package lacks
        with contextlib.suppress(ImportError):
            import pynvml

            self._nvml, self._refusals = pynvml, (AttributeError, pynvml.NVMLError)
        self._ask("nvmlInit")
        uuid = torch.cuda.get_device_properties(device).uuid
        self._handle = self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}".encode())
        if self._handle is None and self._ask("nvmlDeviceGetCount") == 1:
            self._handle = self._ask("nvmlDeviceGetHandleByIndex", 0)

    def _ask(self, function: str, *args: Any) -> Any:
        with contextlib.suppress(*self._refusals):
            return getattr(self._nvml, function)(*args)
        return None

    def _of_this_gpu(self, *functions: str) -> Any:
        """What the first function answers that there is: its name depends on the driver's age."""
        answers = (self._ask(function, self._handle) for function in functions if self._handle is not None)
        return next((answer for answer in answers if answer is not None), None)

    def driver(self) -> str | None:
        """The driver's version."""
        version = self._ask("nvmlSystemGetDriverVersion") if self._handle is not None else None
        return version.decode() if isinstance(version, bytes) else version

    def link(self) -> dict[str, int | None]:
        """Generation and lanes of the PCIe link: those in use, and the most that card and slot can do."""
        return {name: self._of_this_gpu(function) for name, function in LINK.items()}

    def throttle_mask(self) -> int | None:
        """Why the clocks are now lower than the card could run, one bit for each reason."""
        mask: int | None = self._of_this_gpu(
            "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
        )
        return mask

    def other_processes(self) -> int | None:
        """How many others compute on it; None where none is listed, not even this one (as in some containers)."""
        found = self._of_this_gpu("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")
        here = {process.pid for process in found or ()}
        if not here:
            return None
        # A container may number processes otherwise: then one of them is still this one.
        return len(here - {os.getpid()}) if os.getpid() in here else len(here) - 1
