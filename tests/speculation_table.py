"""Tokens a pass of a real model on prose, code and copying, a row a draft, as Markdown.

    python -m tests.speculation_table CHECKPOINT [--chat] [--new-tokens 64] [--depth 8] [flags of bench_infer.py]

Drafts are `ngram`, the model's own `int4` copy, and the model itself, all of whose chain is accepted.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench_infer import command_line

PROMPTS = {
    "prose": [
        "The lighthouse keeper had not spoken to another person for eleven days when the storm",
        "Explain to a child why the sky is blue and why the evening sky is red.",
        "The history of bread begins long before the first cities, when people",
        "Write a letter to a friend about a walk along the river in autumn.",
    ],
    "code": [
        "def quicksort(values: list[int]) -> list[int]:\n    if len(values) <= 1:\n        return values\n",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
        "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
        "SELECT customer.name, SUM(orders.total) FROM customer JOIN orders ON",
    ],
    "copying": [
        "Copy this list.\nred, green, blue, red, green, blue, red, green, blue\nred, green, blue, red,",
        "1. apple pie\n2. apple pie\n3. apple pie\n4. apple pie\n5.",
        "Name: Anna, Town: Oslo\nName: Ben, Town: Oslo\nName: Carl, Town: Oslo\nName: Dora, Town: Oslo\nName:",
        "Repeat after me: the quick brown fox jumps over the dog. The quick brown fox jumps over the dog. The quick",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=24, help="of the tree that stands beside the chain")
    known, others = parser.parse_known_args()
    here = str(known.checkpoint)
    drafts = {"ngram": ["ngram"], "int4 copy": [here, "--draft-weight-format", "int4"], "itself": [here]}
    chain = ["--draft-depth", str(known.depth), "--draft-width", "1", "--verify-rows", str(known.depth + 1)]
    tree = ["--draft-depth", str(known.depth), "--verify-rows", str(known.nodes)]
    rows = []
    for name, draft in drafts.items():
        for form, shape in (("chain", chain), ("tree", tree)):
            if (name, form) != ("ngram", "tree"):
                run = partial(_measured, known.checkpoint, known.new_tokens, others, shape, draft)
                rows.append([name, f"{form}, {shape[-1]} nodes", *map(run, PROMPTS)])
    print(tabulate(rows, ["draft", "form", *PROMPTS], "github", disable_numparse=True))


def _measured(
    checkpoint: Path, new_tokens: int, others: list[str], shape: list[str], draft: list[str], kind: str
) -> str:
    """Tokens a pass, and whether the tokens are those without a draft at the same number of rows."""
    run = partial(_result, checkpoint, new_tokens, others, kind)
    drafted, alone = run([*shape, "--draft", *draft]), run(shape[-2:])
    equal = "" if drafted["output"]["sha256"] == alone["output"]["sha256"] else ", other tokens"
    return f"{drafted['speculation']['tokens_a_pass']:.2f}{equal}"


def _result(checkpoint: Path, new_tokens: int, others: list[str], kind: str, flags: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        prompts, made = Path(folder) / "prompts.jsonl", Path(folder) / "made.json"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[kind]), encoding="utf-8")
        work = ["--checkpoints", checkpoint, "--prompts", prompts, "--batch-size", len(PROMPTS[kind])]
        work += ["--max-new-tokens", new_tokens, "--temperature", 0, "--warmup-rounds", 0, "--out-json", made]
        with redirect_stdout(io.StringIO()):
            code = command_line(
                [*map(str, work), "--mode=full", "--ignore-eos", "--no-probe", "--quiet", *flags, *others]
            )
        if code:
            raise SystemExit(code)
        return dict(json.loads(made.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
