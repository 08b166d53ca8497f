"""What a plan follows from: the model, the run's shape, the settings and the machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wsm.layout.groups import KINDS, GroupId, GroupLayout, Kind, round_up, without
from wsm.layout.kv import KV_BLOCK_TOKENS, KVLayout
from wsm.layout.model import ModelShape
from wsm.plan.hardware import Hardware
from wsm.settings import Settings

if TYPE_CHECKING:
    import torch


ALIKE_ROWS = 8
"""A product of a multiple of so many rows gives each row the same bits wherever it stands: measured for float32 on CPUs
with 1 to 32 threads, where 5 to 7 rows do not; a multiple of 4 would do. On GPUs any number did. So passes over several
nodes a row are filled up to it."""


@dataclass(frozen=True, slots=True)
class RunShape:
    """How many tokens a run has: rows, the longest prompt, new tokens per row, and prompt tokens of all rows."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int

    def with_batch(self, batch: int) -> RunShape:
        """The same with other rows; which ones is not known: of fewer the longest are assumed, more repeat these."""
        tokens = min(self.prefill_tokens * -(-batch // self.batch), batch * self.prompt_tokens)
        return RunShape(batch, self.prompt_tokens, self.new_tokens, tokens)


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """Everything that a plan follows from; to plan again with other flags, replace ``settings`` or ``shape``.

    ``layouts`` are the images of all groups, and of the globals under None. ``chunk_tokens`` and ``micro_batch`` (rows
    whose KV is moved and attended together) are chosen where they are None. ``kv_record_bytes`` are those of one head's
    keys or values of a token; None: as the model computes them. With several ``ranks``, ``config``, ``layouts`` and
    ``hardware`` are one's share, and so is the plan; ``ranks_here`` of them share this host. A decode pass computes
    ``verify_rows`` nodes a row. Where ``--auto`` chose the settings, ``asked`` are those that it was given.

    What a mend needs to be named: the shape that ``--synthetic`` names, without its number of layers, and the directory
    where the model is packed before a pass can read the SSD; None where it is no shape, or is packed in any case.
    """

    config: ModelShape
    dtype: torch.dtype
    layouts: Mapping[GroupId | None, GroupLayout]
    settings: Settings
    shape: RunShape
    hardware: Hardware
    chunk_tokens: int | None = None
    micro_batch: int | None = None
    kv_record_bytes: int | None = None
    topk_blk: int = 0
    kv_device: str | None = None
    ranks: int = 1
    ranks_here: int = 1
    draft: DraftInputs | None = None
    verify_rows: int = 1
    asked: Settings | None = None
    synthetic: str | None = None
    packed_into: str | None = None

    @property
    def nodes(self) -> int:
        """Of all rows, in a decode pass, with those that only fill up a multiple."""
        real = self.shape.batch * self.verify_rows
        return real if self.verify_rows == 1 else round_up(real, ALIKE_ROWS)

    @property
    def draft_model(self) -> PlanInputs | None:
        """What is beside this model as if it ran alone, for as many rows, each longer by the nodes of its tree."""
        if self.draft is None or self.draft.model is None:
            return None
        shape = replace(self.shape, new_tokens=self.shape.new_tokens + self.draft.columns)
        return replace(self.draft.model, shape=shape, hardware=self.hardware)

    @property
    def store_bytes(self) -> int:
        """Of the packed file of the whole model, for all ranks; its headers aside."""
        return self.ranks * sum(layout.nbytes for layout in self.layouts.values())

    def with_layers(self, count: int) -> PlanInputs:
        """The same model of only so many layers."""
        layouts = {g: layout for g, layout in self.layouts.items() if g is None or g.layer < count}
        return replace(self, config=self.config.with_layers(count), layouts=layouts)

    def layers_bytes(self, layers: Iterable[int]) -> int:
        """Bytes of the images of so many layers."""
        return sum(self.layouts[GroupId(layer, kind)].nbytes for layer in layers for kind in KINDS)

    @property
    def bytes_a_weight(self) -> float:
        """Bytes at rest of a layer's and the head's weights, over their number."""
        matrices = [t for layout in self.layouts.values() for t in layout.tensors if len(t.shape) == 2]
        embedding = self.config.embedding if not self.config.tied_embeddings else None
        read = [tensor for tensor in matrices if tensor.name != embedding]
        return sum(tensor.nbytes for tensor in read) / sum(math.prod(tensor.shape) for tensor in read)

    @property
    def in_format(self) -> bool:
        """Whether matrices are in a weight format."""
        return any(self.layouts[group].encoded for group in self.layouts if group is not None)

    def slot_bytes(self) -> int:
        """Bytes of a slot of each kind together: a layer."""
        return sum(map(self.kind_bytes, KINDS))

    def kind_bytes(self, kind: Kind) -> int:
        """Bytes of a slot of ``kind``: its largest image."""
        return max(layout.nbytes for group, layout in self.layouts.items() if group and group.kind == kind)

    @property
    def embedding_on_cpu(self) -> bool:
        """Whether the token embedding stays in page-locked CPU memory, from where the GPU reads its tokens' rows."""
        possible = self.settings.mode != "full" and not self.config.tied_embeddings
        return possible and self.settings.embedding == "cpu"

    @property
    def embedding_bytes(self) -> int:
        return next(tensor.nbytes for tensor in self.layouts[None].tensors if tensor.name == self.config.embedding)

    @property
    def gpu_globals_bytes(self) -> int:
        """Bytes of the globals' image on the GPU."""
        layout = self.layouts[None]
        return without(layout, self.config.embedding).nbytes if self.embedding_on_cpu else layout.nbytes

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV per row, the nodes of a pass among them, in whole blocks."""
        return round_up(self.shape.prompt_tokens + self.shape.new_tokens + self.verify_rows - 1, KV_BLOCK_TOKENS)

    @property
    def plain_record_bytes(self) -> int:
        """Bytes of one head's keys or values of one token in the model's dtype."""
        return self.config.head_dim * self.dtype.itemsize

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return self.kv_layout(1).token_bytes * self.config.n_layers * self.config.n_kv_heads

    def kv_layout(self, stretch_rows: int) -> KVLayout:
        """The KV of all rows, moved so many rows at a time."""
        record_bytes = self.kv_record_bytes or self.plain_record_bytes
        return KVLayout(
            self.config.n_layers, self.shape.batch, stretch_rows, self.config.n_kv_heads, self.kv_tokens, record_bytes
        )


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """What proposes tokens beside a model, wholly on the device: a ``model``, or without one a table of tokens.

    ``columns`` of KV a row are for its tree's nodes, ``nodes`` of a row are computed at once, and ``token_bytes`` are
    taken for each token that a row may have. The model's own shape and hardware do not count.
    """

    model: PlanInputs | None = None
    columns: int = 0
    nodes: int = 1
    token_bytes: int = 0
