"""Whether a draft and its target mean the same by a token id."""

from __future__ import annotations

from llama.config import ModelConfig
from llama.tokenizer import Tokenizer
from wsm.errors import UnusableInput

_TEXT = (
    "The quick brown fox jumps over 13 lazy dogs; it's 2026.\n\n\tdef f(x: int) -> str:\n        return f'{x!r}'\n"
    'Grüße aus Köln, naïve café — 你好，世界 — Привет! {"a": [1, 2.5e-3]} <|end|> 🙂'
)
_SPREAD = 256
"""So many ids, spread over the vocabulary, are looked at one by one."""


def check_vocabulary(draft: str, config: ModelConfig, target: ModelConfig, width: int) -> None:
    """Raises UnusableInput unless both have as many token ids, and a level of ``width`` nodes has one for each."""
    if config.vocab_size != target.vocab_size:
        raise UnusableInput(
            f"--draft {draft}: {config.name} has a vocabulary of {config.vocab_size} tokens, {target.name} one of "
            f"{target.vocab_size}: take a draft of the same family"
        )
    if width > config.vocab_size:
        raise UnusableInput(
            f"--draft-width {width} is more than the {config.vocab_size} tokens of the vocabulary: give fewer"
        )


def check_tokenizers(draft: str, tokenizer: Tokenizer, target: Tokenizer) -> None:
    """Raises UnusableInput unless both give the same ids for a text, and the same texts for ids."""
    ids = range(0, target.vocab_size, max(1, target.vocab_size // _SPREAD))
    words = [[each.decode([token]) for token in ids] for each in (tokenizer, target)]
    if tokenizer.encode(_TEXT) != target.encode(_TEXT) or words[0] != words[1]:
        raise UnusableInput(
            f"--draft {draft}: its tokenizer gives other ids than the model's for the same text: take a draft of the "
            "same family"
        )
