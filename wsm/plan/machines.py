"""Planning for another machine: named cards with their figures and sources, and budgets and rates as they are given."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from wsm.errors import UnusableInput
from wsm.option import meant
from wsm.plan.hardware import GIB, MIB, MODULES_BYTES, Hardware
from wsm.plan.time import BESIDE, Ceiling
from wsm.settings import Settings

_CONTEXT_BYTES = 512 * MIB + MODULES_BYTES
"""A CUDA context as it was measured on an H100; plans for a card that is not here take it."""
_USABLE = 0.98
"""Of a card's memory: the rest is the driver's, and on some cards error correction's."""
_ALIKE = 0.8
"""How like a card's name what was typed has to be, to be taken for it: a slip does, another card does not."""
_PARTS = (r"[0-9]", r"[^0-9]")


class Machine(NamedTuple):
    """A card by its data sheet: memory in GiB, its rate in GB/s (10^9 B/s), dense bf16 matrix products in TFLOPs.

    ``pcie`` is the generation of its 16 lanes, whose practical rate is in :data:`PCIE_GBPS`.
    """

    name: str
    memory_gib: float
    pcie: int
    hbm_gbps: float
    matmul_tflops: float
    source: str


PCIE_GBPS = {4: 25.0, 5: 54.0}
"""What copies from page-locked memory reach over 16 lanes: practical rates, the second one measured (docs/LOG.md)."""
MACHINES = (
    Machine("RTX 3090", 24, 4, 936, 71.0, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    Machine("RTX 3090 Ti", 24, 4, 1008, 80.0, "NVIDIA Ada GPU Architecture whitepaper"),
    Machine("RTX 4090", 24, 4, 1008, 165.2, "NVIDIA Ada GPU Architecture whitepaper"),
    Machine("RTX 5090", 32, 5, 1792, 209.5, "NVIDIA RTX Blackwell GPU Architecture whitepaper"),
    Machine("RTX A5000", 24, 4, 768, 111.1, "NVIDIA RTX A5000 data sheet, without sparsity"),
    Machine("RTX A6000", 48, 4, 768, 154.8, "NVIDIA RTX A6000 data sheet, without sparsity"),
    Machine("A10", 22.5, 4, 600, 125.0, "NVIDIA A10 data sheet, without sparsity; 24 GB less error correction"),
    Machine("L4", 22.5, 4, 300, 121.0, "NVIDIA L4 data sheet, without sparsity; 24 GB less error correction"),
    Machine("A100-40", 40, 4, 1555, 312.0, "NVIDIA A100 data sheet, 40 GB"),
    Machine("A100-80", 80, 4, 1935, 312.0, "NVIDIA A100 data sheet, 80 GB PCIe"),
    Machine("H100-PCIe", 80, 5, 2000, 756.0, "NVIDIA H100 data sheet, PCIe, without sparsity"),
    Machine("H100", 80, 5, 3350, 989.0, "NVIDIA H100 data sheet, SXM, without sparsity"),
)


def machine_named(name: str) -> Machine:
    """In any case, with or without blanks and hyphens; raises UnusableInput for one that is not in the table."""
    spelled = {_plain(machine.name): machine for machine in MACHINES}
    found = spelled.get(_plain(name)) or spelled.get(f"rtx{_plain(name)}")
    if found is None:
        names = [machine.name for machine in MACHINES]
        # Of one family, or of one number: RTX A4000 and RTX 5090 have only most of their letters in common.
        near = [
            each for each in names if any(re.sub(p, "", _plain(each)) == re.sub(p, "", _plain(name)) for p in _PARTS)
        ]
        hint = meant(name, near, _ALIKE) or "."
        raise UnusableInput(
            f"--machine {name} is not known{hint} Known are {', '.join(names)}; for another card give "
            "--gpu-mem-gb, --link-gbps, --hbm-gbps and --matmul-tflops"
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


def hardware_elsewhere(here: Hardware, machine: Machine | None, settings: Settings, ranks_here: int = 1) -> Hardware:
    """Memory as the flags and the machine give it, whatever there is here; what neither says is this machine's.

    A GPU is planned for where one is here, or a machine or ``--gpu-mem-gb`` is given.
    """
    if settings.cpu_mem_gb is not None:
        here = replace(here, cpu_available_bytes=math.ceil(settings.cpu_mem_gb / ranks_here * GIB))
    gpu_gib = settings.gpu_mem_gb or (machine and _USABLE * machine.memory_gib)
    if gpu_gib is None:
        return here
    here = replace(here, elsewhere=machine is not None or not here.has_gpu)
    gpu_bytes = math.ceil(gpu_gib * GIB)
    context = here.gpu_context_bytes or _CONTEXT_BYTES
    device = here.device if here.has_gpu else "cuda"
    return replace(
        here,
        device=device,
        gpu_total_bytes=gpu_bytes,
        gpu_available_bytes=gpu_bytes,
        gpu_context_bytes=context,
    )


def rates_elsewhere(
    here: Mapping[str, Ceiling], machine: Machine | None, given_gbps: Mapping[str, float | None], matmul: float | None
) -> dict[str, Ceiling]:
    """Rates as they are given, else the machine's, else what is known ``here`` (nothing of it beside a machine).

    Args:
        given_gbps: ``h2d``, ``ssd``, ``hbm``, ``kv_read`` and ``kv_write`` in GB/s.
        matmul: matrix products in TFLOPs.
    """
    found = dict(here) if machine is None else {}
    if machine is not None:
        sheet = f"{machine.name}: {machine.source}"
        link = f"{machine.name}: PCIe {machine.pcie} x16, a practical rate"
        found["h2d"] = _exact(1e3 * PCIE_GBPS[machine.pcie], "MBps", link)
        found["hbm"] = _exact(1e3 * machine.hbm_gbps, "MBps", sheet)
        found["matmul"] = _exact(machine.matmul_tflops, "TFLOPs", f"{sheet}, dense bf16")
    given = {name: gbps for name, gbps in given_gbps.items() if gbps is not None}
    for beside, drive in BESIDE.items():
        if given.keys() & {"h2d", drive}:  # how the link does beside the drive was measured with both
            found.pop(beside, None)
    found |= {name: _exact(1e3 * gbps, "MBps", "as given") for name, gbps in given.items()}
    if matmul is not None:
        found.pop("matmul_burst", None)
        found["matmul"] = _exact(matmul, "TFLOPs", "as given")
    return found


def _exact(value: float, unit: str, how: str) -> Ceiling:
    return Ceiling(value, value, unit, 0.0, how)
