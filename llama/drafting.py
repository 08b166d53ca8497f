"""A run's draft: loaded wholly onto the device, and how deep it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llama.inputs import OpenedDraft
from llama.kv.cache import KVCache
from llama.loading import Reporter
from llama.model import Transformer
from llama.products import Scratch
from llama.sources import source_of
from llama.speculation.draft import Draft
from llama.speculation.model_draft import ModelDraft
from llama.speculation.ngram import NgramDraft
from llama.speculation.record import Speculation
from llama.speculation.shape import Speculating, TreeShape
from llama.speculation.timed import TimedDraft
from llama.weights import ImageWeights
from wsm.engine.stretch import PhaseStats
from wsm.engine.telemetry import Telemetry
from wsm.plan.plan import Plan
from wsm.plan.speculated import speculated
from wsm.plan.time import Ceiling

LONGER = 0.05
"""A pass may take so much longer by drafting that the link does not hide, if nothing at all is accepted."""


class Drafting:
    """A model's draft, ready, and how it speculates: ``speculation``; ``draft`` is asked for trees.

    ``warnings`` tell what is doubtful in what it was loaded from.
    """

    def __init__(
        self, draft: NgramDraft | ModelDraft, asked: Speculating, telemetry: Telemetry, warnings: Sequence[str] = ()
    ) -> None:
        self.warnings = list(warnings)
        self._inner, self._asked, self._telemetry = draft, asked, telemetry
        self._shape = asked.first
        self.speculation = Speculation(asked.draft, *self._shape, auto=asked.may_change)
        self.draft: Draft = TimedDraft(draft, telemetry)

    def settle(self, plan: Plan, decode: PhaseStats) -> None:
        """Where the depth is auto, choose it by the times of a warm-up's ``decode``; once, before what is measured."""
        if self.speculation.auto and isinstance(self._inner, ModelDraft):
            depth = min(depth_that_is_hidden(plan, decode, self._shape), self._asked.nodes - 1)
            self._shape = self._asked.at(depth)
            self._inner = self._inner.reshaped(self._shape)
            self.speculation = Speculation(self._asked.draft, *self._shape, auto=True)
            self.draft = TimedDraft(self._inner, self._telemetry)


def load_draft(
    opened: OpenedDraft, plan: Plan, kv: KVCache, scratch: Scratch, telemetry: Telemetry, reporter: Reporter
) -> Drafting:
    """The draft of a run; ``kv`` is the model's, ``scratch`` of both models. StoreError for a store that is damaged.

    What it decodes is drafting, and not recorded besides: a graph would not record it either.
    """
    asked, inputs, device = opened.speculating, opened.inputs, scratch.room.device
    if inputs is None:
        return Drafting(NgramDraft(asked.first.depth, asked.nodes, kv.tokens, device), asked, telemetry)
    assert plan.draft is not None
    config, room = inputs.share.config, plan.draft.kv_tokens
    source = source_of(inputs, opened.options)
    with reporter.bar(config.n_layers, "layer", "loading the draft") as advance:
        loaded = lambda group: advance(group.kind == "ffn")  # noqa: E731 - the second group of a layer
        weights = ImageWeights(source, config.n_layers, device, decoded=False, on_loaded=loaded)
    model = Transformer(config, weights, device, room, scratch=scratch.unrecorded())
    own_kv = KVCache(config, kv.batch, room, device, inputs.dtype, record=inputs.kv_format)
    portions = {"chunk_tokens": plan.draft.chunk_tokens, "wave_rows": plan.draft.wave_rows}
    draft = ModelDraft(model, own_kv, asked.first, asked.nodes, **portions)
    return Drafting(draft, asked, telemetry, source.warnings)


def planned_shape(speculating: Speculating, plan: Plan, ceilings: Mapping[str, Ceiling]) -> TreeShape:
    """The shape at the depth that is to be expected: where it is auto the deepest whose drafting lengthens a pass by
    :data:`LONGER` at most, at these rates; that of the start where they are not known."""
    if not speculating.may_change:
        return speculating.first
    fits = {
        shape: speculated(plan, ceilings, shape.depth, shape.width, 1).longer_by_at_most(LONGER)
        for shape in speculating.possible
    }
    if None in fits.values():
        return speculating.first
    return max((shape for shape in fits if fits[shape]), default=speculating.at(1))


def depth_that_is_hidden(plan: Plan, decode: PhaseStats, shape: TreeShape) -> int:
    """The depth whose drafting lengthens a pass by :data:`LONGER` at most; ``decode`` drafted as ``shape`` says.

    Drafting is hidden while the link fills the slots, as long as the computation waits for it anyway. At least 1.
    """
    passes, moved_ms = decode.passes, decode.busy_ms["h2d"]
    if not passes or not decode.drafting_ms:
        return shape.depth
    hidden_ms, pass_ms = 0.0, decode.wall_ms / passes
    if moved_ms and decode.bytes_moved["weight_h2d"]:
        rate = decode.bytes_moved["weight_h2d"] / moved_ms
        slots_ms = plan.placement.gpu_slots * plan.inputs.slot_bytes() / rate
        waits_ms = ((decode.stall_ms["h2d"] or 0.0) + (decode.drafting_link_ms or 0.0)) / passes
        hidden_ms = min(slots_ms, waits_ms)
        # A warm-up's pass also takes what is done once, such as compiling kernels; the link's share of it does not.
        pass_ms = min(pass_ms, (moved_ms + (decode.stall_ms["ssd"] or 0.0)) / passes)
    level_ms = decode.drafting_ms / passes / (shape.depth + 1)
    levels = (hidden_ms + LONGER * pass_ms) / level_ms
    return max(1, int(levels) - 1)
