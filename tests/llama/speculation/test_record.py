"""What is counted of speculation."""

from __future__ import annotations

from collections import Counter

from llama.speculation.record import Counts


def test_tokens_a_pass_is_of_the_rows_that_were_going() -> None:
    assert Counts().tokens_a_pass is None
    assert Counts.of(2, [[3, 5], [1]]) == Counts(2, Counter({3: 1, 5: 1, 1: 1}))
    assert Counts.of(2, [[3, 5], [1]]).tokens_a_pass == 3.0
