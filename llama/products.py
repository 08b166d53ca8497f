"""What the model does with a group of weights: products with its matrices, and its norm.

The model never holds a matrix: whether one lies there as it is used, or is decoded into shared scratch just before its
product, is decided here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from llama.fused import ops
from llama.parallel.world import Collective
from llama.weights import WeightSource
from wsm.engine.telemetry import Telemetry
from wsm.formats import registry
from wsm.formats.format import MOST_ROWS
from wsm.layout.groups import TENSOR_ALIGNMENT, Encoded, GroupId, Stored, round_up


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of one input as one, ``[sum of their outputs, inputs]``; a copy only where memory separates them."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    address = first.data_ptr()
    for part in parts:
        if part.data_ptr() != address or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(parts))
        address += part.nbytes
    return first.as_strided((rows, first.shape[1]), first.stride())


class Scratch:
    """Room on the device for decoded matrices, shared by all groups of the one compute stream.

    It holds ``nbytes``, those of the largest product's matrices or of a whole group: then each matrix is decoded once
    while its group is here, however many chunks there are. ``telemetry`` gets a record of each decoding.
    """

    def __init__(self, nbytes: int, device: torch.device, telemetry: Telemetry | None = None) -> None:
        self.telemetry = telemetry
        room = torch.empty(nbytes + TENSOR_ALIGNMENT * (nbytes > 0), dtype=torch.uint8, device=device)
        self.room = room[-room.data_ptr() % TENSOR_ALIGNMENT :][:nbytes]

    def unrecorded(self) -> Scratch:
        """The same room, for a model whose decoding is another part of the record."""
        other = copy.copy(self)
        other.telemetry = None
        return other

    def taken(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix in the room from ``offset`` on."""
        return self.room[offset : offset + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


class Residual:
    """The residual ``[n, dim]`` of tokens that are computed at once, in the memory of ``rows``.

    What ranks have summed for few tokens, or a packed product, waits for the norm that follows, whose kernel adds it on
    its way, to the same bits. Not with more ``chunks`` in the pass: what waits for all of them would be a second
    residual, which no plan counts.
    """

    def __init__(self, rows: Tensor, chunks: int = 1) -> None:
        self._rows = rows
        self._waiting: Tensor | None = None
        self._may_wait = chunks == 1 and rows.shape[0] <= MOST_ROWS

    def settled(self) -> Tensor:
        """``rows`` with all that was added."""
        if self._waiting is not None:
            self._rows.add_(self._waiting)
            self._waiting = None
        return self._rows

    def add_(self, part: Tensor) -> None:
        """Add ``part [n, dim]``, which nobody changes any more."""
        rows = self.settled()
        if self._may_wait:
            self._waiting = part
        else:
            rows.add_(part)

    def norm(self, weight: Tensor, eps: float) -> Tensor:
        """The root-mean-square norm of what there is."""
        part, self._waiting = self._waiting, None
        if part is None:
            return ops.rms_norm(self._rows, weight, eps)
        return ops.add_rms_norm(self._rows, part, weight, eps)


class Products:
    """A group on the compute device, by the short names of its tensors; valid until its block ends."""

    def __init__(self, group: GroupId, tensors: Mapping[str, Stored], source: ProductSource, *, timed: bool) -> None:
        self._group, self._tensors, self._source = group, tensors, source
        self._telemetry = source.scratch.telemetry if timed else None
        self._decoded: dict[Sequence[str], Tensor] = {}
        self._taken = 0
        # Plain matrices too: they are copied beside encoded ones of the same product.
        matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
        whole = sum(m.decoded_bytes if isinstance(m, Encoded) else m.nbytes for m in matrices)
        self._keeps = whole <= source.scratch.room.nbytes - TENSOR_ALIGNMENT * len(tensors)

    def linear(self, x: Tensor, *names: str) -> Tensor:
        """``x [n, inputs]`` times the transposed matrices, side by side in one product: ``[n, sum of outputs]``."""
        self._source.saw(self._group, names, x)
        packed = self._packed_product(x, names)
        return packed if packed is not None else ops.linear(x, self._matrix(names))

    def gated_linear(self, x: Tensor, gate: str, up: str) -> Tensor:
        """``silu(x gate^T) * (x up^T)``, ``[n, outputs]``."""
        matrices = [self._tensors[name] for name in (gate, up)]
        plain = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
        if len(plain) < len(matrices):
            return ops.gate_(self.linear(x, gate), self.linear(x, up))
        for name in (gate, up):
            self._source.saw(self._group, (name,), x)
        return ops.gated_linear(x, *plain)

    def add_linear_(self, h: Residual, x: Tensor, name: str) -> None:
        """Add ``x`` times a transposed matrix to the residual; where ranks share the product, their sum once."""
        collective = self._source.collective
        self._source.saw(self._group, (name,), x)
        packed = self._packed_product(x, (name,))
        if packed is None and collective.shard.size == 1:
            ops.add_linear_(h.settled(), x, self._matrix((name,)))
        else:
            h.add_(collective.reduce_(ops.linear(x, self._matrix((name,))) if packed is None else packed))

    def norm(self, h: Residual, name: str) -> Tensor:
        """The root-mean-square norm of a residual ``[n, dim]``."""
        weight = self._tensors[name]
        assert isinstance(weight, Tensor)
        return h.norm(weight, self._source.eps)

    def _packed_product(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """The product straight from the planes, where the format has one for so few rows: the same in every mode."""
        parts = [tensor for name in names if isinstance(tensor := self._tensors[name], Encoded)]
        if len(parts) < len(names):
            return None
        out, begin = None, 0
        for part in parts:
            rows, weight_format = part.shape[0], registry.get(part.format)
            if len(parts) == 1:
                return weight_format.linear(x, part.planes, (rows, part.shape[1]))
            if out is None:
                out = x.new_empty(x.shape[0], sum(tensor.shape[0] for tensor in parts))
            into = out[:, begin : begin + rows]
            if weight_format.linear(x, part.planes, (rows, part.shape[1]), into) is None:
                return None
            begin += rows
        return out

    def _matrix(self, names: Sequence[str]) -> Tensor:
        tensors = [self._tensors[name] for name in names]
        plain = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        return side_by_side(plain) if len(plain) == len(tensors) else self._in_scratch(names, tensors)

    def _in_scratch(self, names: Sequence[str], tensors: Sequence[Stored]) -> Tensor:
        """The matrices decoded side by side, or as they were decoded before while the group is here."""
        if names in self._decoded:
            return self._decoded[names]
        rows, columns, dtype = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1], tensors[0].dtype
        together = self._source.scratch.taken(self._taken, rows, columns, dtype)
        telemetry = self._telemetry
        start = telemetry.mark() if telemetry is not None else None
        for out, tensor in zip(together.split([tensor.shape[0] for tensor in tensors]), tensors, strict=True):
            if isinstance(tensor, Encoded):
                registry.get(tensor.format).decode_(tensor.planes, out)
            else:
                out.copy_(tensor)
        if telemetry is not None:
            telemetry.decoded(self._group, together.nbytes, start, telemetry.mark())
        if self._keeps:
            self._decoded[names] = together
            self._taken = round_up(self._taken + together.nbytes, TENSOR_ALIGNMENT)
        return together


Acquire = Callable[[GroupId], AbstractContextManager[Products]]
"""A group's products, until the block ends."""


class InputObserver(Protocol):
    """Who looks at what the matrices are multiplied with."""

    def saw(self, group: GroupId, names: Sequence[str], x: Tensor) -> None:
        """The inputs ``x [n, cols]`` of a product with the matrices ``names``, which lie side by side."""

    def left(self, group: GroupId) -> None:
        """The pass is through with the group."""


class ProductSource:
    """The groups of a :class:`WeightSource`, as products."""

    def __init__(
        self, weights: WeightSource, eps: float, collective: Collective, scratch: Scratch | None = None
    ) -> None:
        self.eps, self.collective = eps, collective
        self.scratch = scratch or Scratch(0, torch.device("cpu"))
        self.observer: InputObserver | None = None
        self._weights = weights

    @contextmanager
    def acquire(self, group: GroupId) -> Iterator[Products]:
        """See :meth:`WeightSource.acquire`."""
        with self._weights.acquire(group) as tensors:
            yield Products(group, tensors, self, timed=True)
        if self.observer is not None:
            self.observer.left(group)

    def saw(self, group: GroupId, names: Sequence[str], x: Tensor) -> None:
        """Tell the observer of a product's inputs."""
        if self.observer is not None:
            self.observer.saw(group, names, x)

    @contextmanager
    def acquire_all(self) -> Iterator[Acquire]:
        """See :meth:`WeightSource.acquire_all`; nothing in the block is timed, since it may be captured."""
        with self._weights.acquire_all() as groups:
            yield lambda group: nullcontext(Products(group, groups[group], self, timed=False))
