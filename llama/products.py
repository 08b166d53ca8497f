"""What the model does with a group of weights: products with its matrices, and its norm.

The model never holds a matrix: whether one lies there as it is used, or has to be made just before its product, is
decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.parallel.world import Collective
from llama.weights import WeightSource
from wsm.layout.groups import GroupId


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, in float32 and rounded once: one kernel where torch has it fused."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of one input as one, ``[sum of their outputs, inputs]``; a copy only where memory separates them."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    address = first.data_ptr()
    for part in parts:
        if part.data_ptr() != address or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        address += part.nbytes
    return first.as_strided((rows, first.shape[1]), first.stride())


class Products:
    """A group on the compute device, by the short names of its tensors; valid until its block ends."""

    def __init__(self, tensors: Mapping[str, Tensor], eps: float, collective: Collective) -> None:
        self._tensors, self._eps, self._collective = tensors, eps, collective

    def linear(self, x: Tensor, *names: str) -> Tensor:
        """``x [n, inputs]`` times the transposed matrices, side by side in one product: ``[n, sum of outputs]``."""
        return F.linear(x, self._matrix(names))

    def add_linear_(self, h: Tensor, x: Tensor, name: str) -> None:
        """Add ``x`` times a transposed matrix to the residual ``h``; where ranks share the product, their sum once."""
        if self._collective.shard.size == 1:
            h.addmm_(x, self._matrix((name,)).t())
        else:
            h.add_(self._collective.reduce_(F.linear(x, self._matrix((name,)))))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """The root-mean-square norm of ``x [n, dim]``."""
        return rms_norm(x, self._tensors[name], self._eps)

    def _matrix(self, names: Sequence[str]) -> Tensor:
        return side_by_side([self._tensors[name] for name in names])


Acquire = Callable[[GroupId], AbstractContextManager[Products]]
"""A group's products, until the block ends."""


class ProductSource:
    """The groups of a :class:`WeightSource`, as products."""

    def __init__(self, weights: WeightSource, eps: float, collective: Collective) -> None:
        self._weights, self._eps, self._collective = weights, eps, collective
        self._together: dict[GroupId, Products] = {}

    @contextmanager
    def acquire(self, group: GroupId) -> Iterator[Products]:
        """See :meth:`WeightSource.acquire`."""
        with self._weights.acquire(group) as tensors:
            yield Products(tensors, self._eps, self._collective)

    @contextmanager
    def acquire_all(self) -> Iterator[Mapping[GroupId, Products]]:
        """See :meth:`WeightSource.acquire_all`."""
        with self._weights.acquire_all() as groups:
            if not self._together:  # residents stay where they are
                self._together = {g: Products(held, self._eps, self._collective) for g, held in groups.items()}
            yield self._together
