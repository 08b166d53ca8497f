"""What weight formats add to a plan: scratch for decoded matrices, how often they are decoded, where none is left."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from wsm.formats import registry
from wsm.formats.format import GPU_PIECE
from wsm.layout.groups import TENSOR_ALIGNMENT, GroupId, GroupLayout, counted, decoded_layout
from wsm.plan.inputs import PlanInputs

MANY_CHUNKS = 4
"""With more chunks in a pass a whole group is decoded once, where there is room, not once a chunk."""


TORCH_BYTES = 16
"""A weight, while torch decodes it."""


class Decoding(NamedTuple):
    """``scratch_bytes`` on the device; ``at_load``: GPU residents leave their format as they are loaded."""

    scratch_bytes: int = 0
    at_load: bool = False


NOTHING_DECODED = Decoding()


def ways_to_decode(inputs: PlanInputs, chunks: int) -> Iterator[Decoding]:
    """What there is to choose from, the fastest first; the last is what takes least."""
    encoded = [layout for layout, _ in counted(inputs.layouts) if layout.encoded]
    if not encoded:
        yield NOTHING_DECODED
        return
    used = {str(tensor.format) for layout in encoded for tensor in layout.encoded}
    if inputs.settings.mode in ("full", "preload") and all(_same_once_decoded(name, inputs) for name in used):
        yield Decoding(at_load=True)
    if chunks > MANY_CHUNKS:
        yield Decoding(max(map(_whole_bytes, encoded)))
    yield Decoding(max(_product_bytes(layout, inputs.config.fused) for layout in encoded) + TENSOR_ALIGNMENT)


def _same_once_decoded(name: str, inputs: PlanInputs) -> bool:
    """Whether a matrix that is decoded as it is loaded gives the products of other modes, bit for bit: those decode it
    before each product, and have none straight from its planes."""
    found = registry.get(name)
    own_product = found.packed_rows(inputs.dtype, inputs.hardware.has_gpu)
    return found.exact or (name in registry.BLOCK_TYPES and not own_product)


def _whole_bytes(layout: GroupLayout) -> int:
    """Of all matrices of a group, each aligned; plain ones too, which may be beside encoded ones in a product."""
    matrices = sum(tensor.decoded_bytes for tensor in layout.tensors if len(tensor.shape) == 2)
    return matrices + TENSOR_ALIGNMENT * (len(layout.tensors) + 1)


def _product_bytes(layout: GroupLayout, fused: tuple[str, ...]) -> int:
    """Of the matrices of the largest product, as they are decoded; those of one product stand together."""
    decoded = {tensor.name: tensor.decoded_bytes for tensor in layout.tensors if len(tensor.shape) == 2}
    together = sum(nbytes for name, nbytes in decoded.items() if name in fused)
    return max(together, *(nbytes for name, nbytes in decoded.items() if name not in fused))


def decoding_extra_bytes(inputs: PlanInputs) -> int:
    """What decoding takes on a GPU besides its result: nothing with Triton's kernels, some float32 values without."""
    if not (inputs.in_format and inputs.hardware.has_gpu):
        return 0
    from wsm.formats.backend import has_kernels  # it needs torch

    return 0 if has_kernels() else TORCH_BYTES * GPU_PIECE


def decoded_bytes(inputs: PlanInputs, decoding: Decoding, rows: int, chunks: int = 1) -> int:
    """Bytes that decoding makes in a pass of so many chunks, of so many rows (tokens) each."""
    if decoding.at_load:
        return 0
    most = cache(lambda name: registry.get(name).packed_rows(inputs.dtype, inputs.hardware.has_gpu))
    total = 0
    for layout, groups in counted(inputs.layouts):
        # Else products take the weights as they lie.
        made = groups * sum(tensor.decoded_bytes for tensor in layout.encoded if rows > most(str(tensor.format)))
        if made:
            total += made * (1 if _whole_bytes(layout) <= decoding.scratch_bytes else chunks)
    return total


def decoded_layouts(inputs: PlanInputs) -> dict[GroupId | None, GroupLayout]:
    """The images of all groups once nothing is in a weight format; those of a kind are alike then."""
    first = {group.kind: layout for group, layout in inputs.layouts.items() if group is not None and not group.layer}
    by_kind = {kind: decoded_layout(layout) for kind, layout in first.items()}
    return {group: layout if group is None else by_kind[group.kind] for group, layout in inputs.layouts.items()}
