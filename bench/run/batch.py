"""The rows of a run's batch: token ids of prompts, cut to length, made at random, repeated."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence

from bench.options.run_flags import RunOptions
from bench.run.prompts import DEFAULT_FILE, read_prompts
from llama.config import ModelConfig
from llama.inputs import Inputs
from llama.tokenizer import Tokenizer
from wsm.plan.plan import RunShape

MOST_RANDOM_PROMPTS = 512
"""As many as the guide's prompt file has; a larger batch repeats them."""


def batch_prompts(options: RunOptions, inputs: Inputs, say: Callable[[str], None]) -> list[list[int]]:
    """The token ids of the prompts that fill the batch: at most ``max_seq_len - max_new_tokens``, the last ones, BOS
    counted in.

    They are repeated to fill it only when it is known to fit: a batch may be asked for that no memory holds.
    ``say`` is told what was cut.
    """
    most = options.max_seq_len - options.max_new_tokens
    if options.prompt_len is not None:
        count = min(options.batch_size, MOST_RANDOM_PROMPTS)
        whole = random_prompts(inputs.checkpoint.config, options.prompt_len, count, options.seed)
    else:
        texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts or DEFAULT_FILE)
        whole = tokenize(texts[: options.batch_size], inputs.tokenizer)
    if long := [len(prompt) for prompt in whole if len(prompt) > most]:
        say(f"[INFO] {len(long)} of {len(whole)} prompts cut to their last {most} tokens (the longest had {max(long)})")
    return [keep_last(prompt, most) for prompt in whole]


def shape_of(prompts: Sequence[Sequence[int]], options: RunOptions) -> RunShape:
    """The shape of a run whose batch ``prompts`` fill, repeated."""
    lengths = [len(prompt) for prompt in prompts]
    times, rest = divmod(options.batch_size, len(lengths))
    return RunShape(
        options.batch_size, max(lengths), options.max_new_tokens, times * sum(lengths) + sum(lengths[:rest])
    )


def facts_of(options: RunOptions, prompts: Sequence[Sequence[int]]) -> dict[str, str]:
    """What has to be the same on every rank, besides what is built."""
    shared = "batch_size max_new_tokens max_seq_len temperature top_p seed ignore_eos topk_blk warmup_rounds repeats"
    names = (*shared.split(), "no_probe")
    flags = {f"--{name.replace('_', '-')}": str(getattr(options, name)) for name in names}
    digest = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16]
    return {**flags, "prompts of digest": digest}


def fill_batch(prompts: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """The first ``batch`` prompts, repeated to fill it."""
    return [list(prompts[row % len(prompts)]) for row in range(batch)]


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each text, BOS in front."""
    return [[tokenizer.bos_id, *tokenizer.encode(text, bos=False)] for text in texts]


def keep_last(prompt: Sequence[int], most: int) -> list[int]:
    """A prompt cut to ``most`` tokens: its first, the BOS, and the last ones behind it."""
    return [prompt[0], *prompt[max(1, len(prompt) - (most - 1)) :]]


def random_prompts(config: ModelConfig, length: int, count: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` random ids; the first and last 256 of a real vocabulary are left out.

    Special tokens lie there: Llama 2 and many Hugging Face models number them from 0, Llama 3 at the end.
    """
    real = config.vocab_size > 1024
    first, end = (256, config.vocab_size - 256) if real else (0, min(config.vocab_size, 256))
    numbers = random.Random(seed)
    return [[numbers.randrange(first, end) for _ in range(length)] for _ in range(count)]
