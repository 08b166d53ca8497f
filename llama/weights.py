"""Where the model gets its weights: it asks for a group and does not know where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.names import QKV
from wsm import stop
from wsm.layout.groups import GroupId, TensorSpec, pass_order

Acquire = Callable[[GroupId], AbstractContextManager[Mapping[str, Tensor]]]
"""A group's tensors by short name, on the compute device until the block ends."""


class WeightSource(Protocol):
    """Anything that can hand out a group's tensors by short name (``w["wq"]``)."""

    @property
    def globals(self) -> Mapping[str, Tensor]:
        """``tok_embeddings``, ``norm`` and, unless tied, ``output``, on the compute device."""

    @property
    def resident(self) -> bool:
        """Whether every group stays on the compute device for good, always in the same place."""

    def acquire(self, group: GroupId) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The group's tensors on the compute device, valid until the block ends."""

    def acquire_all(self) -> AbstractContextManager[Mapping[GroupId, Mapping[str, Tensor]]]:
        """A whole pass's groups at once; only where they are ``resident``."""


def side_by_side(w: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Matrices of one input as one, ``[sum of their outputs, inputs]``; a copy only where memory separates them."""
    parts = [w[name] for name in names]
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    address = first.data_ptr()
    for part in parts:
        if part.data_ptr() != address or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(parts)
        address += part.nbytes
    return first.as_strided((rows, first.shape[1]), first.stride())


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
        self._groups: dict[GroupId, dict[str, Tensor]] = {}
        for group in pass_order(config.n_layers):
            self._groups[group] = load(group, config.specs(group.kind))
            on_loaded(group)

    def acquire(self, group: GroupId) -> AbstractContextManager[Mapping[str, Tensor]]:
        return nullcontext(self._groups[group])

    def acquire_all(self) -> AbstractContextManager[Mapping[GroupId, Mapping[str, Tensor]]]:
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
