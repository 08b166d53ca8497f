"""Page-locked memory of exact size.

``torch.pin_memory`` rounds every block up to a power of two and locks it page by page; here one anonymous mapping
is populated by several threads with huge pages and registered with CUDA in one call.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsm import stop
from wsm.disk.io_threads import IOThreads
from wsm.engine.device import Device
from wsm.errors import DoesNotFit
from wsm.layout.groups import BLOCK, round_up

_HUGE_PAGE = 2 << 20
_POPULATE_PIECE = 64 << 20
_HUGE_PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_DONTNEED, _MADV_DONTFORK, _MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 4, 10, 14, 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _huge_pages_off() -> bool:
    """Whether the kernel takes the advice to use huge pages and ignores it."""
    try:
        return "[never]" in _HUGE_PAGES_FILE.read_text()
    except OSError:
        return False


class PageLockedArena:
    """One mapping of ``nbytes``, rounded up to a page, handed out front to back; page-locked where the device needs it.

    ``whole`` is all of it, ``uint8 [nbytes]``, whatever was taken. Raises DoesNotFit if the mapping is refused; where
    page-locking is refused, ``warnings`` says so.
    """

    def __init__(self, nbytes: int, device: Device) -> None:
        self.nbytes = round_up(nbytes, BLOCK)
        self.warnings: list[str] = []
        self._taken = 0
        self._registered = False
        self._device = device
        started = time.perf_counter()
        self._map: mmap.mmap | None = None
        self.whole = torch.empty(0, dtype=torch.uint8)
        if self.nbytes:
            self._reserve()
        self.populate_s = time.perf_counter() - started
        started = time.perf_counter()
        if self.nbytes and device.pinned:
            self._register()
        self.register_s = time.perf_counter() - started

    def _reserve(self) -> None:
        try:
            # Room for one huge page more in the address space (not in memory), so that the start can be aligned.
            self._map = mmap.mmap(-1, self.nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise DoesNotFit(f"the system refused {self.nbytes / 2**30:.2f} GiB of CPU memory: {error}") from error
        mapped = np.frombuffer(self._map, dtype=np.uint8)
        self._address = round_up(mapped.ctypes.data, _HUGE_PAGE)
        skip = self._address - mapped.ctypes.data
        self.whole = torch.from_numpy(mapped[skip : skip + self.nbytes])
        if _libc.madvise(self._address, self.nbytes, _MADV_HUGEPAGE) != 0 or _huge_pages_off():
            self.warnings.append(
                "no transparent huge pages: load_s.populate_s and load_s.page_lock_s are longer for it; "
                f"`echo madvise | sudo tee {_HUGE_PAGES_FILE}` allows them"
            )
        _libc.madvise(self._address, self.nbytes, _MADV_DONTFORK)
        pieces = range(0, self.nbytes, _POPULATE_PIECE)
        with IOThreads(min(16, os.cpu_count() or 1, len(pieces)), "wsm-populate") as threads:
            stop.result(threads.submit(partial(self._populate, offset) for offset in pieces))

    def _populate(self, offset: int) -> None:
        nbytes = min(_POPULATE_PIECE, self.nbytes - offset)
        if _libc.madvise(self._address + offset, nbytes, _MADV_POPULATE_WRITE) != 0:
            if ctypes.get_errno() == 12:
                raise DoesNotFit(
                    f"the system has no {self.nbytes / 2**30:.2f} GiB of CPU memory left for the page-locked tier"
                )
            self.whole[offset : offset + nbytes : mmap.PAGESIZE] = 0

    def _register(self) -> None:
        """Page-lock it; where CUDA refuses, go on without: slower, but the same bytes."""
        code = int(torch.cuda.cudart().cudaHostRegister(self._address, self.nbytes, 0))
        self._registered = code == 0
        if not self._registered or not self.whole[:1].is_pinned():
            with contextlib.suppress(RuntimeError):  # the refusal would be reported by the next kernel's launch
                torch.zeros(1, device=self._device.torch_device).add_(1)
            self.warnings.append(
                f"CUDA refused to page-lock {self.nbytes / 2**30:.2f} GiB (error {code}): weights are copied from "
                "pageable memory, so h2d figures are those of a bounce buffer, not of the link; raise the container's "
                "memory limit or `ulimit -l` (on WSL 2 the memory in .wslconfig), or lower --cpu-cache-layers"
            )

    def take(self, nbytes: int) -> Tensor:
        """The next ``uint8 [nbytes]``, its start aligned to 4096 bytes."""
        start = round_up(self._taken, BLOCK)
        if start + nbytes > self.nbytes:
            raise DoesNotFit(f"the arena of {self.nbytes} bytes has no {nbytes} bytes left")
        self._taken = start + nbytes
        return self.whole[start : start + nbytes]

    def close(self) -> None:
        """Unregister, then give every page back, even where somebody still holds a view (it then reads zeros)."""
        if self._map is None:
            return
        if self._registered:
            with contextlib.suppress(RuntimeError):  # a device that has failed has no copy under way either
                self._device.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self._registered = False
        _libc.madvise(self._address, self.nbytes, _MADV_DONTNEED)
        self.whole = torch.empty(0, dtype=torch.uint8)
        self._map = None
