"""Page-locked memory beside the GPU: on a machine of several NUMA nodes the far node's memory slows the link."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

_SYS = Path("/sys")
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_PREFERRED = 1
_MOST_NODES = 1024
_PCI_ADDRESS_CHARS = 32

_libc = ctypes.CDLL(None, use_errno=True)


def bind_to_gpu(device: torch.device) -> int | None:
    """Let the calling thread take new memory from the NUMA node of the GPU, as long as there is any.

    Only pages that the thread touches first are meant, so threads that populate memory call it. Where a container
    forbids memory policies the thread moves to the node's cores instead, beside which the kernel places its pages.

    Returns:
        The node; None where there is one node only, where the GPU's is not known, or where neither way is allowed.
    """
    node = _node_of(device)
    if node is None or not (_prefer_memory_of(node) or _run_on_cores_of(node)):
        return None
    return node


def _node_of(device: torch.device) -> int | None:
    """The GPU's node, if there are several to choose from."""
    if device.type != "cuda" or len(_numbers(_read("devices/system/node/online"))) < 2:
        return None
    address = _pci_address(device.index or 0)
    if address is None:
        return None
    text = _read(f"bus/pci/devices/{address.lower()}/numa_node")
    return int(text) if text.isdecimal() else None  # -1: the firmware does not tell


def _pci_address(index: int) -> str | None:
    """``domain:bus:device.function`` of a CUDA device, as CUDA numbers them in this process."""
    address = ctypes.create_string_buffer(_PCI_ADDRESS_CHARS)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        refused = driver.cuDeviceGetPCIBusId(address, _PCI_ADDRESS_CHARS, index)
    except (OSError, AttributeError):
        return None
    return None if refused else address.value.decode()


def _read(path: str) -> str:
    try:
        return (_SYS / path).read_text().strip()
    except OSError:
        return ""


def _numbers(text: str) -> list[int]:
    """The kernel's lists, such as ``0-3,8``."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _prefer_memory_of(node: int) -> bool:
    call = _SET_MEMPOLICY.get(platform.machine())
    if call is None or node >= _MOST_NODES:
        return False
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_MOST_NODES // bits))()
    mask[node // bits] = 1 << node % bits
    return int(_libc.syscall(ctypes.c_long(call), _MPOL_PREFERRED, mask, ctypes.c_ulong(_MOST_NODES))) == 0


def _run_on_cores_of(node: int) -> bool:
    cores = os.sched_getaffinity(0) & set(_numbers(_read(f"devices/system/node/node{node}/cpulist")))
    try:
        os.sched_setaffinity(0, cores)
    except OSError:  # none of them are ours
        return False
    return True
