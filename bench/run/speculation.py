"""What a result tells of speculation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.result.types_phases import Phase
from bench.result.types_speculation import Speculation, SyntheticAgreement
from bench.run.measure import Round
from llama.checkpoint.agreement import CycleDraft
from llama.generation import Generation
from llama.llm import LLaMA
from llama.speculation.record import Counts
from wsm.words import counted

FEWEST_TOKENS, MOST_OFF = 256, 0.03
"""So many new tokens show a pair's agreement, within so much."""


def speculation_of(llm: LLaMA, timed: Round, prompts: Sequence[Sequence[int]], decode: Phase) -> Speculation | None:
    """Of a round, whose phase ``decode`` is; None where nobody drafts."""
    if llm.drafting is None:
        return None
    asked, generation, drafting = llm.drafting.speculation, timed.generation, timed.stretches[1].stats()
    counts = Counts.of(generation.decode_passes, generation.accepted)
    later = generation.decode_tokens - len(generation.tokens)
    ms, hidden_ms = drafting.drafting_ms, drafting.drafting_link_ms
    return Speculation(
        draft=asked.draft,
        nodes=asked.nodes,
        depth=asked.depth,
        width=asked.width,
        auto_depth=asked.auto,
        passes=counts.passes,
        tokens_a_pass=counts.tokens_a_pass,
        row_passes=[counts.tokens[tokens] for tokens in range(1, max(counts.tokens, default=0) + 1)],
        weight_bytes_a_token=decode.bytes.weight_h2d / later if later else None,
        drafting_ms=ms / counts.passes if ms is not None and counts.passes else None,
        drafting_hidden_pct=min(100.0, max(0.0, 100 * hidden_ms / ms)) if ms and hidden_ms is not None else None,
        synthetic_agreement=_agreement_of(llm, generation, prompts),
    )


def _agreement_of(llm: LLaMA, generation: Generation, prompts: Sequence[Sequence[int]]) -> SyntheticAgreement | None:
    opened = llm.inputs.draft.inputs if llm.inputs.draft is not None else None
    if opened is None or not isinstance(draft := opened.checkpoint, CycleDraft):
        return None
    rows = [[prompt[-1], *tokens] for prompt, tokens in zip(prompts, generation.tokens, strict=True)]
    told = draft.realised(rows)
    return SyntheticAgreement(
        agree=draft.agreement.agree,
        second=draft.agreement.second,
        realised_agree=told.agree if told is not None else None,
        realised_second=told.second if told is not None else None,
    )


def agreement_warnings(found: Speculation | None, new_tokens: int) -> Iterator[str]:
    """A line on a pair whose agreement is not the one that was asked for; ``new_tokens`` are all rows'."""
    pair = found.synthetic_agreement if found is not None else None
    if pair is None:
        return
    yield "the draft is one of a pair of known agreement (synthetic_agreement): no figure here is a model's acceptance"
    if new_tokens < FEWEST_TOKENS:
        yield f"{counted(new_tokens, 'new token')} cannot show an agreement: take {FEWEST_TOKENS} or more"
        return
    for name, asked, got in (
        ("agree", pair.agree, pair.realised_agree),
        ("second", pair.second, pair.realised_second),
    ):
        if got is not None and abs(asked - got) > MOST_OFF:
            yield f"{name}={asked:g} was asked for, and the run's tokens had {got:.3f}: its figures are of the latter"
