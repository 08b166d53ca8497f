"""Where the model gets its weights: it asks for a group and does not know where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.checkpoint.names import GroupId, TensorSpec, full_name, global_specs, group_specs, pass_order


class WeightSource(Protocol):
    """Anything that can hand out a group's tensors by short name (``w["wq"]``)."""

    @property
    def globals(self) -> Mapping[str, Tensor]:
        """``tok_embeddings``, ``norm`` and, unless tied, ``output``, on the compute device."""

    def acquire(self, group: GroupId) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The group's tensors on the compute device, valid until the block ends."""


class TensorWeights:
    """Mode ``full``: every tensor on the device, loaded one by one, nothing in between.

    Args:
        on_loaded: called with each group once it is there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        on_loaded: Callable[[GroupId], None] | None = None,
    ) -> None:
        config = checkpoint.config

        def load(group: GroupId | None, specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
            tensors = {}
            for spec in specs:
                on_cpu = torch.empty(spec.shape, dtype=dtype)
                checkpoint.read_into(full_name(group, spec.name), on_cpu)
                tensors[spec.name] = on_cpu.to(device)
            return tensors

        self._globals = load(None, global_specs(config))
        self._groups: dict[GroupId, dict[str, Tensor]] = {}
        for group in pass_order(config.n_layers):
            self._groups[group] = load(group, group_specs(config, group.kind))
            if on_loaded is not None:
                on_loaded(group)

    @property
    def globals(self) -> Mapping[str, Tensor]:
        return self._globals

    @contextmanager
    def acquire(self, group: GroupId) -> Iterator[Mapping[str, Tensor]]:
        yield self._groups[group]
