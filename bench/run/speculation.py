"""What a result tells of speculation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from bench.result.types_phases import Phase
from bench.result.types_speculation import Speculation, SyntheticAgreement
from bench.run.measure import Round
from llama.checkpoint.agreement import CycleDraft
from llama.generation import Generation
from llama.llm import LLaMA

FEWEST_TOKENS, MOST_OFF = 256, 0.03
"""So many new tokens show a pair's agreement, within so much."""


def speculation_of(llm: LLaMA, timed: Round, prompts: Sequence[Sequence[int]], decode: Phase) -> Speculation | None:
    """Of a round, whose phase ``decode`` is; None where nobody drafts."""
    if llm.speculation is None:
        return None
    generation, drafting = timed.generation, timed.stretches[1].stats()
    counts = Counter(tokens for row in generation.accepted for tokens in row)
    given, later = counts.total(), generation.decode_tokens - len(generation.tokens)
    ms, hidden_ms = drafting.drafting_ms, drafting.drafting_link_ms
    return Speculation(
        draft=llm.speculation.draft,
        nodes=llm.speculation.nodes,
        depth=llm.speculation.depth,
        width=llm.speculation.width,
        auto_depth=llm.speculation.auto,
        passes=generation.decode_passes,
        tokens_a_pass=sum(tokens * times for tokens, times in counts.items()) / given if given else None,
        row_passes=[counts[tokens] for tokens in range(1, max(counts, default=0) + 1)],
        weight_bytes_a_token=decode.bytes.weight_h2d / later if later else None,
        drafting_ms=ms / generation.decode_passes if ms is not None and generation.decode_passes else None,
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
        realised_agree=told and told.agree,
        realised_second=told and told.second,
    )


def agreement_warnings(found: Speculation | None, new_tokens: int) -> Iterator[str]:
    """A line on a pair whose agreement is not the one that was asked for; ``new_tokens`` are all rows'."""
    pair = found.synthetic_agreement if found is not None else None
    if pair is None:
        return
    yield "the draft is one of a pair of known agreement (synthetic_agreement): no figure here is a model's acceptance"
    if new_tokens < FEWEST_TOKENS:
        yield f"{new_tokens} new tokens are too few to show an agreement: take {FEWEST_TOKENS} or more"
        return
    for name, asked, got in (
        ("agree", pair.agree, pair.realised_agree),
        ("second", pair.second, pair.realised_second),
    ):
        if got is not None and abs(asked - got) > MOST_OFF:
            yield f"{name}={asked:g} was asked for, and the run's tokens had {got:.3f}: its figures are of the latter"
