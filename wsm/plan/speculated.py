"""What a draft makes of a plan's decode: tokens a second at an acceptance that the user names, for none is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from wsm.plan.decoding import decoded_bytes, ways_to_decode
from wsm.plan.plan import Plan
from wsm.plan.time import Ceiling, Estimate, decode_work, floor_estimate, predicted_pass_ms

LAYER_MS = 0.09
"""A draft's layer takes so long at least, whatever its bytes: some 18 small kernels, one behind the other. 1.42 ms a
level of a chain and 1.52 of a tree were measured for the 16 layers of the 1B shape in int4 on an H100 (docs/LOG.md)."""


class Speculated(NamedTuple):
    """A draft that looks ``depth`` tokens ahead, ``width`` nodes a level.

    ``decode_pass`` has the drafting that is not hidden in it; None where not known, ``at_least``: a floor.

    ``drafting_ms`` is None where the rate of the device's memory is not known: then it counts nothing.
    """

    depth: int
    width: int
    tokens_a_pass: float
    drafting_ms: float | None
    hidden_ms: float
    decode_pass: Estimate | None
    at_least: bool
    rows: int

    def longer_by_at_most(self, share: float) -> bool | None:
        """Whether what is not hidden of drafting makes a pass longer by that share at most; None where not known."""
        if self.decode_pass is None or self.drafting_ms is None:
            return None
        beside = self.drafting_ms - self.hidden_ms
        return beside <= share * (self.decode_pass.ms - beside)

    @property
    def tokens_per_s(self) -> float | None:
        """Of all rows; None also where the rates behind it vary too much for a figure."""
        found = self.decode_pass
        return 1e3 * self.rows * self.tokens_a_pass / found.ms if found is not None and found.steady else None

    def rate_shown(self) -> str:
        """Tokens a second of all rows, in words; a dash where not known."""
        if self.decode_pass is None:
            return "-"
        return ("at most " if self.at_least else "") + self.decode_pass.rate_shown(self.rows * self.tokens_a_pass)

    def shown(self) -> str:
        """In words, after what was asked."""
        if self.decode_pass is None:
            return f"{self.tokens_a_pass:.2f} tokens a pass; how long one takes is not known"
        least = "at least " if self.at_least else ""
        drafting = "drafting not counted: --hbm-gbps is not known"
        if self.drafting_ms is not None:
            drafting = f"drafting {self.drafting_ms:.2f} ms, {self.hidden_ms:.2f} ms of it while the link copies"
        return (
            f"predicted {self.rate_shown()} tokens a second at depth {self.depth}: {self.tokens_a_pass:.2f} tokens a "
            f"pass of {least}{self.decode_pass.shown()} ({drafting})"
        )


def tokens_a_pass(acceptance: float, depth: int) -> float:
    """Where a level's token is right so often, whatever came before: 1 + p + p^2 + … + p^depth."""
    return sum(acceptance**level for level in range(depth + 1))


def speculated(plan: Plan, ceilings: Mapping[str, Ceiling], depth: int, width: int, tokens: float) -> Speculated:
    """The decode with a draft of that shape, of which a row's pass takes so many ``tokens``.

    While it drafts, the link goes on until the slots are full; the pass has so much less to wait for.
    """
    predicted = predicted_pass_ms(plan, ceilings)["decode"]
    known = predicted if predicted is not None else floor_estimate(plan, ceilings)["decode"]
    drafting_ms, hidden_ms = _drafting_ms(plan, ceilings, depth, width), 0.0
    if drafting_ms is not None and "h2d" in ceilings and plan.bytes_per_pass["weight_h2d"]:
        slots_bytes = plan.placement.gpu_slots * plan.inputs.slot_bytes()
        hidden_ms = min(drafting_ms, slots_bytes / ceilings["h2d"].median / 1e3)
    if known is not None and drafting_ms is not None:
        known = Estimate(*(ms + drafting_ms - hidden_ms for ms in known))
    return Speculated(depth, width, tokens, drafting_ms, hidden_ms, known, predicted is None, plan.shape.batch)


def _drafting_ms(plan: Plan, ceilings: Mapping[str, Ceiling], depth: int, width: int) -> float | None:
    """A level, and once more for the last, reads the draft's weights, but takes no less than its kernels do.

    A matrix that is decoded is written and read besides; products of few rows take it as it lies.
    """
    model = plan.inputs.draft_model
    if model is None:
        return 0.0
    if "hbm" not in ceilings:
        return None
    rows = {float(plan.shape.prompt_tokens): plan.shape.batch * width}
    work = decode_work(model.config, rows, 1, model.bytes_a_weight, model.kv_token_bytes)
    *_, decoding = ways_to_decode(model, 1)
    moved = work.hbm_bytes + 2 * decoded_bytes(model, decoding, plan.shape.batch * width)
    return (depth + 1) * max(moved / ceilings["hbm"].median / 1e3, LAYER_MS * model.config.n_layers)
