"""What a measurement is: its row, the GPU memory that it took, and the sentence of one that could not be made."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

MARK = "ROW "
"""Before a row on a part's standard output, since libraries write there, too."""


@dataclass(frozen=True)
class Work:
    """The shapes. 24 GiB hold 11 layers of 70B in bf16, of however many, and about half of all 80 in 4 bits. Fewer than
    80 layers are a pass of the same kind, in less time and memory."""

    name: str = "Llama-3.1-70B"
    few: int = 8
    """Layers of which none is resident."""
    many: int = 24
    held_bf16: int = 11
    """Of ``many``, 18.8 GB: with the head, the embedding (of the others; ours has it on the CPU) and a layer 24 GiB."""
    held_4bit: int = 12
    """Of ``many``: half."""
    most_4bit: int = 14
    """Of ``many``: the share of 80 layers that 24 GiB hold. Of int4 46, by `bench_infer.py plan`, with a head in bf16;
    of q4_0 in llama.cpp 48 by its bytes: 23.1 GB, a head of 0.9 GB, and 1.7 GB for context and scratch."""
    device: str = "cuda"
    gpu_GiB: float = 24.0
    prompt: int = 128
    """Tokens of each row before the passes that are measured."""

    @property
    def bare(self) -> str:
        return f"bf16, {self.few} layers, none on the GPU"

    @property
    def drive(self) -> str:
        return f"bf16, {self.few} layers from the drive, none on the GPU"

    @property
    def partly(self) -> str:
        return f"bf16, {self.held_bf16} of {self.many} layers on the GPU"

    @property
    def half(self) -> str:
        return f"4 bits, {self.held_4bit} of {self.many} layers on the GPU"

    @property
    def most(self) -> str:
        return f"4 bits, {self.most_4bit} of {self.many} layers on the GPU"

    @property
    def whole(self) -> str:
        return f"4 bits, {self.many} of {self.many} layers on the GPU"


@dataclass
class Row:
    """One measurement. ``scene``: what is the same for all that stand beside each other; ``batch``: rows of a pass."""

    peer: str
    scene: str
    form: str
    batch: int
    settings: str
    version: str = ""
    s_a_pass: float | None = None
    passes: int = 0
    moved_bytes: int | None = None
    """Weights that cross the link in a pass, or come from the drive, where known."""
    gpu_GiB: float | None = None
    """Most that the whole card had in use, contexts included."""
    could_not: str = ""
    part: str = ""
    """Whose run it came from: measuring that again replaces it."""

    @property
    def tok_s(self) -> float | None:
        return self.batch / self.s_a_pass if self.s_a_pass else None


class GpuPeak:
    """The card's memory in use, looked at every 50 ms in a thread of its own; None without a card."""

    def __init__(self) -> None:
        self.GiB: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            card = pynvml.nvmlDeviceGetHandleByIndex(0)
            while True:
                self.GiB = max(self.GiB or 0.0, pynvml.nvmlDeviceGetMemoryInfo(card).used / 2**30)
                if self._over.wait(0.05):
                    return
        except Exception:  # no card, no driver, no package: the figure is missing, the row is not
            return

    def __enter__(self) -> GpuPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def emit(row: Row) -> None:
    print(MARK + json.dumps(asdict(row)), flush=True)


def one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}"


@contextlib.contextmanager
def attempt(*identity: Any, **more: Any) -> Iterator[Row]:
    """A row to fill in; written at the end, with the error if there was one, which ends there."""
    row = Row(*identity, **more)
    with GpuPeak() as peak:
        try:
            yield row
        except Exception as error:
            row.could_not = one_line(error)
    row.gpu_GiB = peak.GiB
    emit(row)
