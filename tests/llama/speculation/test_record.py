"""What is counted of speculation."""

from __future__ import annotations

from llama.speculation.record import Counts


def test_tokens_a_pass_is_of_the_rows_that_were_going() -> None:
    counts = Counts()
    assert counts.tokens_a_pass is None
    counts.passed([3, 1])
    counts.passed([5])
    assert (counts.passes, counts.tokens_a_pass) == (2, 3.0)
