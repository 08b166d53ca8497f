"""What --draft may say, and what it is then."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.speculation.record import Counts
from llama.speculation.spec import parse_draft
from wsm.errors import UnusableInput


def test_each_form_of_a_draft_is_read(tmp_path: Path) -> None:
    store, weights = tmp_path / "draft.json", tmp_path / "draft.gguf"
    store.touch()
    weights.touch()
    assert not parse_draft("ngram").is_model
    assert parse_draft(str(tmp_path)).checkpoints == tmp_path
    assert parse_draft(str(weights)).checkpoints == weights
    assert parse_draft(str(store)).manifest == store
    assert parse_draft("synthetic:Llama-3.2-1B").synthetic == "Llama-3.2-1B"
    assert parse_draft("synthetic:Llama-3.2-1B:layers=2").synthetic == "Llama-3.2-1B:layers=2"
    pair = parse_draft("synthetic:Llama-3.2-1B:layers=2:agree=0.8,second=0.1")
    assert (pair.synthetic, pair.agree, pair.second) == ("Llama-3.2-1B:layers=2", 0.8, 0.1)
    assert parse_draft("synthetic:Llama-3.2-1B:agree=0").agree == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no/such/place", "there is no such file or directory"),
        ("synthetic:A:agree=2", "agree must be a number from 0 to 1, not '2'"),
        ("synthetic:A:agree=nan", "agree must be a number from 0 to 1, not 'nan'"),
        ("synthetic:A:agree=0.8,second=0.3", "together at most 1"),
        ("synthetic:A:second=0.3", "second needs agree=P"),
        ("synthetic:A:agree=0.8,agree=0.8", "'agree=0.8' is not understood"),
        ("synthetic:A:likes=0.8", "'likes=0.8' is not understood"),
    ],
)
def test_what_is_no_draft_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(UnusableInput, match=said) as refused:
        parse_draft(text)
    assert f"--draft {text}" in str(refused.value)


def test_tokens_a_pass_is_of_the_rows_that_were_going() -> None:
    counts = Counts()
    assert counts.tokens_a_pass is None
    counts.passed([3, 1])
    counts.passed([5])
    assert (counts.passes, counts.tokens_a_pass) == (2, 3.0)
