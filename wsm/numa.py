"""Threads and memory beside the GPU: on a host of several NUMA nodes the link is fastest from the GPU's own."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_PREFERRED = 1


def bind_to_gpu(device: torch.device) -> int | None:
    """Run this thread, and those it starts, on the CPUs of the GPU's node, and take memory there while it has some.

    Returns:
        The node; None where it is not known, there is only one, or the system refuses: then nothing has changed.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    domain, bus, slot = (int(getattr(properties, f"pci_{part}_id", -1)) for part in ("domain", "bus", "device"))
    return bind_to_node(_read_node(f"{domain:04x}:{bus:02x}:{slot:02x}.0")) if min(domain, bus, slot) >= 0 else None


def _read_node(address: str) -> int | None:
    try:
        node = int((_PCI / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def bind_to_node(node: int | None, nodes: Path = _NODES) -> int | None:
    """As :func:`bind_to_gpu`, for a node of this number."""
    if node is None or len(list(nodes.glob("node[0-9]*"))) < 2:
        return None
    try:
        cpus = parse_cpus((nodes / f"node{node}" / "cpulist").read_text()) & os.sched_getaffinity(0)
        if not cpus:
            return None
        os.sched_setaffinity(0, cpus)
    except (OSError, ValueError):
        return None
    _prefer_memory_of(node)
    return node


def parse_cpus(text: str) -> set[int]:
    """``0-3,8`` -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _prefer_memory_of(node: int) -> None:
    """Memory touched by this thread, and by those it starts, comes from ``node``; a refusal costs speed only."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return
    words = node // 64 + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // 64] = 1 << (node % 64)
    ctypes.CDLL(None).syscall(number, _MPOL_PREFERRED, mask, ctypes.c_ulong(64 * words + 1))
