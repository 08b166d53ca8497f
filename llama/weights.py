"""Where the model gets its weights: it asks for a group and does not know where it came from."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.names import QKV
from wsm import stop
from wsm.engine.decoding import decode_image
from wsm.layout.groups import KINDS, GroupId, Stored, TensorSpec, decoded_layout, pass_order, stored_views, views
from wsm.store.source import GroupSource


class WeightSource(Protocol):
    """Anything that can hand out a group's tensors by short name; the model takes them as products."""

    @property
    def globals(self) -> Mapping[str, Tensor]:
        """``tok_embeddings``, ``norm`` and, unless tied, ``output``, on the compute device."""

    @property
    def resident(self) -> bool:
        """Whether every group stays on the compute device for good, always in the same place."""

    def acquire(self, group: GroupId) -> AbstractContextManager[Mapping[str, Stored]]:
        """The group's tensors on the compute device, valid until the block ends."""

    def acquire_all(self) -> AbstractContextManager[Mapping[GroupId, Mapping[str, Stored]]]:
        """A whole pass's groups at once; only where they are ``resident``."""


class TensorWeights:
    """Mode ``full``: every tensor on the device, loaded one by one; ``on_loaded`` is called with each group then."""

    resident = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        on_loaded: Callable[[GroupId], None] = lambda group: None,
    ) -> None:
        config = checkpoint.config

        def load(group: GroupId | None, specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
            tensors = _empty(specs, device, dtype)
            for spec in specs:
                stop.check()
                on_cpu = torch.empty(spec.shape, dtype=dtype)
                checkpoint.read_into(config.full_name(group, spec.name), on_cpu)
                tensors[spec.name].copy_(on_cpu)
            return tensors

        self.globals = load(None, config.specs(None))
        self._groups: dict[GroupId, Mapping[str, Stored]] = {}
        for group in pass_order(config.n_layers):
            self._groups[group] = load(group, config.specs(group.kind))
            on_loaded(group)

    def acquire(self, group: GroupId) -> AbstractContextManager[Mapping[str, Stored]]:
        return nullcontext(self._groups[group])

    def acquire_all(self) -> AbstractContextManager[Mapping[GroupId, Mapping[str, Stored]]]:
        return nullcontext(self._groups)


def _empty(specs: Sequence[TensorSpec], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Room for a group's tensors, query, key and value matrices side by side as in a packed image."""
    shapes = {spec.name: spec.shape for spec in specs}
    tensors = {}
    if "wq" in shapes:
        rows = [shapes[name][0] for name in QKV]
        together = torch.empty(sum(rows), *shapes["wq"][1:], dtype=dtype, device=device)
        tensors = dict(zip(QKV, together.split(rows), strict=True))
    alone = {name: torch.empty(shapes[name], dtype=dtype, device=device) for name in shapes if name not in tensors}
    return tensors | alone


class ImageWeights:
    """Mode ``full`` in a weight format: every group's image on the device, read one after the other.

    ``decoded``: each leaves its format as it is loaded. ``source`` is closed when all is there.
    """

    resident = True

    def __init__(
        self,
        source: GroupSource,
        n_layers: int,
        device: torch.device,
        *,
        decoded: bool,
        on_loaded: Callable[[GroupId], None] = lambda group: None,
    ) -> None:
        self._groups: dict[GroupId, Mapping[str, Stored]] = {}
        with closing(source):
            largest = max(source.slot_bytes(kind) for kind in KINDS)
            room = max(largest, source.layout(None).nbytes)
            buffer = torch.frombuffer(mmap.mmap(-1, room), dtype=torch.uint8)
            self.globals = views(self._read(source, None, buffer).to(device, copy=True), source.layout(None))
            staged = torch.empty(largest if decoded else 0, dtype=torch.uint8, device=device)
            for group in pass_order(n_layers):
                read, layout = self._read(source, group, buffer), source.layout(group)
                if decoded:
                    plain = decoded_layout(layout)
                    image = torch.empty(plain.nbytes, dtype=torch.uint8, device=device)
                    decode_image(staged[: layout.nbytes].copy_(read), layout, image)
                    layout = plain
                else:
                    image = read.to(device, copy=True)
                self._groups[group] = stored_views(image, layout)
                on_loaded(group)

    def _read(self, source: GroupSource, group: GroupId | None, buffer: Tensor) -> Tensor:
        stop.result(source.read(group, buffer).checked)
        return buffer[: source.layout(group).nbytes]

    def acquire(self, group: GroupId) -> AbstractContextManager[Mapping[str, Stored]]:
        return nullcontext(self._groups[group])

    def acquire_all(self) -> AbstractContextManager[Mapping[GroupId, Mapping[str, Stored]]]:
        return nullcontext(self._groups)
