"""The verb ``quality``: what a weight format costs, on a text."""

from __future__ import annotations

from collections.abc import Sequence

from bench.options.verb_flags import QualityOptions
from bench.result.console import ConsoleReporter
from bench.result.quality import as_json, as_row, as_text, summed
from bench.run.outputs import check_writable, write_figures
from bench.run.quality import compare_windows, options_of_both, read_text, windows_of
from llama.opening import open_inputs


def run_quality(options: QualityOptions, argv: Sequence[str]) -> int:
    """Print, and write where ``--out-json`` says."""
    if options.out_json is not None:
        given = options.text, options.manifest
        check_writable({"--out-json": options.out_json}, given, options.checkpoints, options.reference)
    reporter = ConsoleReporter(quiet=options.output is not None, verbose=options.verbose, bars=not options.quiet)
    text = read_text(options.text, "--text")
    reference, model = options_of_both(options)
    inputs = open_inputs(model)
    windows = windows_of(inputs.tokenizer, text, options.window, options.windows, f"--text {options.text}")
    facts = {
        "model": inputs.checkpoint.config.name,
        "weight_format": inputs.format_name,
        "reference": str(reference.checkpoints or reference.synthetic or "the built-in model"),
        "text": options.text.name,
        "window_tokens": options.window,
        "argv": list(argv),
    }
    if inputs.checkpoint.formats is not None and reference.checkpoints == model.checkpoints:
        reporter.say("[WARNING] the reference is this quantised model itself: --reference names the unquantised one")
    inputs.close()
    with reporter.bar(sum(len(window) - 1 for window in windows), "tok", "quality") as advance:
        found = summed(compare_windows(options, windows, reporter, advance), **facts)
    print(as_row(found, options.output) if options.output else as_text(found))
    if options.out_json is not None:
        write_figures(options.out_json, as_json(found))
    return 0
