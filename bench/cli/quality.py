"""The verb ``quality``: what a weight format costs, on a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.options.verb_flags import QualityOptions
from bench.result.quality import as_json, as_row, as_text, summed
from bench.result.summary import ConsoleReporter
from bench.run.quality import compare_windows, options_of_both, windows_of
from llama.inputs import open_inputs
from wsm.disk.atomic import write_atomically
from wsm.disk.files import read_file
from wsm.errors import UnusableInput


def run_quality(options: QualityOptions, argv: Sequence[str]) -> int:
    """Print, and write where ``--out-json`` says."""
    reporter = ConsoleReporter(quiet=options.output is not None, verbose=options.verbose)
    text = _read_text(options.text)
    reference, model = options_of_both(options)
    inputs = open_inputs(model)
    with_special = inputs.tokenizer
    windows = windows_of(options, with_special.encode(text, bos=False), [with_special.bos_id])
    facts = {
        "model": inputs.checkpoint.config.name,
        "weight_format": options.weight_format,
        "reference": str(reference.checkpoints or reference.synthetic or "the built-in model"),
        "text": options.text.name,
        "window_tokens": options.window,
        "argv": list(argv),
    }
    inputs.close()
    with reporter.bar(sum(len(window) - 1 for window in windows), "tok", "quality") as advance:
        found = summed(compare_windows(options, windows, reporter, advance), **facts)
    if options.out_json is not None:
        write_atomically(options.out_json, as_json(found) + "\n")
    print(as_row(found, options.output) if options.output else as_text(found))
    return 0


def _read_text(path: Path) -> str:
    label = f"--text {path}"
    try:
        return read_file(path, label, pipes=True).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableInput(f"{label} is not UTF-8 text: {error}") from error
