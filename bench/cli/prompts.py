"""The verb ``prompts``."""

from __future__ import annotations

from pathlib import Path

from bench.options.verb_flags import PromptsOptions
from bench.result.summary import ConsoleReporter
from bench.run.prompts import make_prompts, prompt_file
from llama.config import PRESETS, ModelConfig
from llama.files import read_json
from llama.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from wsm.disk.atomic import write_atomically
from wsm.errors import UnusableInput


def run_prompts(options: PromptsOptions) -> int:
    """Make a prompt file."""
    tokenizer = _tokenizer_of(options.checkpoints)
    if not options.out.absolute().parent.is_dir():
        raise UnusableInput(f"--out {options.out}: its directory does not exist")
    texts = []
    with ConsoleReporter(quiet=False, verbose=options.verbose).bar(options.count, "prompt", "prompts") as advance:
        for text in make_prompts(tokenizer, options.count, options.tokens, options.seed):
            texts.append(text)
            advance(1)
    write_atomically(options.out, prompt_file(texts, options.tokens))
    print(f"[INFO] {options.count} prompts of {options.tokens} tokens in {options.out}")
    return 0


def _tokenizer_of(directory: Path | None) -> Tokenizer:
    """The tokenizer in a checkpoint's directory, for which its small files do; bytes, as of the built-in model."""
    if directory is None:
        return ByteTokenizer(PRESETS["Llama-3.2-1B"])
    name = directory.resolve().name
    if (directory / "config.json").exists():
        return load_tokenizer(directory, ModelConfig.from_hf(read_json(directory / "config.json"), name))
    if (directory / "params.json").exists():
        params = read_json(directory / "params.json")
        if params.get("vocab_size", -1) != -1:
            return load_tokenizer(directory, ModelConfig.from_meta(params, name))
    from llama.checkpoint import open_checkpoint  # needs torch: the size is that of the embedding

    return load_tokenizer(directory, open_checkpoint(directory).config)
