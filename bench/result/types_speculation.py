"""The part of a result about speculation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from bench.result.fields import Amount, Count, FromOne, Part, says
from bench.result.types_machine import Percent, Share


class SyntheticAgreement(Part, frozen=True, kw_only=True):
    """a pair of synthetic models of known agreement: it measures the system, and is no model's acceptance; else null"""

    agree: Annotated[Share, says("share of tokens for which the draft's first choice was to be right")]
    second: Annotated[Share, says("share of tokens for which its second choice was to be right")]
    realised_agree: Annotated[Share | None, says("the first of them in this run's tokens; null without any")]
    realised_second: Annotated[Share | None, says("the second of them in this run's tokens; null without any")]


class Speculation(Part, frozen=True, kw_only=True):
    """what a draft proposed in the decode, and what became of it; null without --draft"""

    draft: Annotated[str, says("--draft")]
    nodes: Annotated[
        FromOne, says("nodes of a row's tree; its root is the row's last token, and the draft proposed the others")
    ]
    depth: Annotated[FromOne, says("tokens that it proposed one behind the other")]
    width: Annotated[FromOne, says("nodes that a tree grew a level; 1 is a chain")]
    auto_depth: Annotated[bool, says("whether the depth was chosen after the warm-up")]
    passes: Annotated[Count, says("passes of the decode")]
    tokens_a_pass: Annotated[
        Amount | None, says("new tokens of a row's pass, on average, the model's own one included; null without passes")
    ]
    row_passes: Annotated[
        list[Annotated[Count, says("rows' passes")]],
        says("how many gave 1, 2, 3 … tokens; what ended a row in the middle of a pass shortens it"),
    ]
    weight_bytes_a_token: Annotated[
        Amount | None, says("bytes of weights to the GPU for each token after a row's first; null without such tokens")
    ]
    drafting_ms: Annotated[Amount | None, says("ms of drafting a pass; null where it was not measured")]
    drafting_hidden_pct: Annotated[
        Percent | None, says("percent of drafting_ms in which weights or KV were copied to the GPU; null without any")
    ]
    synthetic_agreement: SyntheticAgreement | None


def acceptance_by_depth(found: Speculation) -> Iterator[float]:
    """Of the passes that came so deep the share that went one token deeper, for each depth that any came to."""
    for depth in range(len(found.row_passes) - 1):
        reached = sum(found.row_passes[depth:])
        yield (reached - found.row_passes[depth]) / reached
