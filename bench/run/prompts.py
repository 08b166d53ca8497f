"""Prompts: made, and the rows of a run's batch, cut to length. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.options.run_flags import RunOptions
from bench.run.prompt_files import read_chats, read_prompts, user_says
from llama.chat import chat_template_of, encode_chats
from llama.config import ModelConfig
from llama.tokenizer import Tokenizer, encode_prompt, keep_last
from wsm.errors import UnusableInput
from wsm.plan.inputs import RunShape
from wsm.words import counted

if TYPE_CHECKING:
    from llama.inputs import Inputs

DEFAULT_FILE = Path(__file__).resolve().parents[2] / "prompts" / "prompts_default.txt"
_WORDS = Path(__file__).with_name("words.txt")
MOST_RANDOM_PROMPTS = 512
"""As many as the guide's prompt file has; a larger batch repeats them."""
_SHARED = """
batch_size max_new_tokens max_seq_len temperature top_p seed ignore_eos topk_blk warmup_rounds repeats no_probe
"""


def batch_prompts(options: RunOptions, inputs: Inputs) -> tuple[list[list[int]], list[str]]:
    """The token ids of the prompts that fill the batch, special ones among them, and a sentence where some were cut.

    Of each at most ``max_seq_len - max_new_tokens``, the last ones, and of a text also the special ids that the model's
    tokenizer puts around it; random ids have none, and need no tokenizer. They fill the batch, repeated, only once it
    is known to fit: a batch may be asked for that no memory holds.
    """
    most = options.max_seq_len - options.max_new_tokens
    if options.prompt_len is not None:
        if options.print_text:
            inputs.tokenizer  # noqa: B018 - what cannot be shown in the end is said at the beginning
        count = min(options.batch_size, MOST_RANDOM_PROMPTS)
        whole = random_prompts(inputs.checkpoint.config, options.prompt_len, count, options.seed)
    else:
        path = options.prompts or DEFAULT_FILE
        if options.chat:
            whole = _chats(options, inputs, path)
        else:
            texts = [options.prompt] if options.prompt is not None else read_prompts(path)
            whole = [encode_prompt(inputs.tokenizer, text) for text in texts[: options.batch_size]]
        if [] in whole:
            raise UnusableInput(f"prompt {whole.index([])} gives no token with the model's tokenizer: leave it out")
    cut = list[str]()
    if long := [len(prompt) for prompt in whole if len(prompt) > most]:
        cut.append(
            f"{len(long)} of {counted(len(whole), 'prompt')} cut to the last {counted(most, 'token')} (the longest had "
            f"{max(long)}; --max-seq-len {max(long) + options.max_new_tokens} keeps it whole)"
        )
    if options.prompt_len is not None:
        return [prompt[-most:] for prompt in whole], cut
    return [keep_last(inputs.tokenizer, prompt, most) for prompt in whole], cut


def _chats(options: RunOptions, inputs: Inputs, path: Path) -> list[list[int]]:
    template = chat_template_of(inputs.checkpoint)
    chats = read_chats(path) if options.prompt is None else [user_says(options.prompt)]
    return encode_chats(inputs.tokenizer, template, chats[: options.batch_size])


def shape_of(prompts: Sequence[Sequence[int]], options: RunOptions) -> RunShape:
    """The shape of a run whose batch ``prompts`` fill, repeated."""
    lengths = [len(prompt) for prompt in prompts]
    times, rest = divmod(options.batch_size, len(lengths))
    tokens = times * sum(lengths) + sum(lengths[:rest])
    return RunShape(options.batch_size, max(lengths), options.max_new_tokens, tokens)


def facts_of(options: RunOptions, prompts: Sequence[Sequence[int]]) -> dict[str, str]:
    """What has to be the same on every rank, besides what is built."""
    flags = {f"--{name.replace('_', '-')}": str(getattr(options, name)) for name in _SHARED.split()}
    return {**flags, "prompts of digest": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]}


def fill_batch(prompts: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """The first ``batch`` prompts, repeated to fill it."""
    return [list(prompts[row % len(prompts)]) for row in range(batch)]


def random_prompts(config: ModelConfig, length: int, count: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` random ids; the first and last 256 of a real vocabulary are left out.

    Special tokens are there: Llama 2 and many Hugging Face models number them from 0, Llama 3 at the end.
    """
    real = config.vocab_size > 1024
    first, end = (256, config.vocab_size - 256) if real else (0, min(config.vocab_size, 256))
    numbers = random.Random(seed)
    return [[numbers.randrange(first, end) for _ in range(length)] for _ in range(count)]


def make_prompts(tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> Iterator[str]:
    """``count`` texts of random words that the tokenizer cuts into exactly ``tokens`` tokens, special ones aside."""
    numbers, words = random.Random(seed), _WORDS.read_text(encoding="utf-8").split()

    def length(text: str) -> int:
        return len(tokenizer.encode(text))

    tokens_a_word = length(" ".join(words)) / len(words)
    for _ in range(count):
        yield _exact_text(length, tokens, numbers, words, tokens_a_word)


def _exact_text(
    length: Callable[[str], int], tokens: int, numbers: random.Random, words: Sequence[str], tokens_a_word: float
) -> str:
    text = numbers.choice(words)
    # Encoding is what takes the time: nearly all that is missing at once, then nearly all of the rest.
    while (short := tokens - length(text)) > 2 * tokens_a_word:
        text += " " + " ".join(numbers.choice(words) for _ in range(max(1, int(0.9 * short / tokens_a_word))))
        while length(text) > tokens:
            text = text.rpartition(" ")[0]
    for _ in range(2000):
        missing = tokens - length(text)
        if missing == 0:
            return text
        if missing < 0:
            text = text.rpartition(" ")[0] or numbers.choice("abcdefgh")
            continue
        ending = " " + numbers.choice(words) if missing > 1 and numbers.random() < 0.5 else numbers.choice("abcdefgh.")
        if length(text + ending) <= tokens:
            text += ending
    raise UnusableInput(f"no text of exactly {tokens} tokens was found with this tokenizer; try another --tokens")


def prompt_file(texts: Sequence[str], tokens: int, kind: str = "") -> str:
    """The text of a prompt file whose name ends in ``kind``: JSON for ``.jsonl`` and ``.json``, else headed blocks."""
    if kind == ".jsonl":
        return "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts)
    if kind == ".json":
        return json.dumps([{"prompt": text} for text in texts], ensure_ascii=False, indent=1) + "\n"
    return "".join(f"===== PROMPT {n:04d} | tokens={tokens} =====\n{text}\n\n" for n, text in enumerate(texts))
