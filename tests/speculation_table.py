"""Tokens a pass of a real model on prose, code and copying, a row a draft, as Markdown.

    python -m tests.speculation_table CHECKPOINT [--chat] [--new-tokens 64] [--depth 8] [flags of bench_infer.py]

Drafts are `ngram`, the model's own `int4` copy, and the model itself, whose chain is all accepted but where a tree ends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

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
        "Repeat after me: the quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog. The",
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
                flags = [*shape, "--draft", *draft]
                cells = [_measured(known.checkpoint, flags, known.new_tokens, others, kind) for kind in PROMPTS]
                rows.append([name, f"{form}, {shape[-1]} nodes", *cells])
    print(tabulate(rows, ["draft", "form", *PROMPTS], "github", disable_numparse=True))


def _measured(checkpoint: Path, flags: list[str], new_tokens: int, others: list[str], kind: str) -> str:
    """Tokens a pass, and whether the tokens are those without a draft at the same shape."""
    rows, with_draft = flags[flags.index("--verify-rows") + 1], _result(checkpoint, flags, new_tokens, others, kind)
    without = _result(checkpoint, ["--verify-rows", rows], new_tokens, others, kind)
    equal = "" if with_draft["output"] == without["output"] else ", other tokens"
    return f"{with_draft['speculation']['tokens_a_pass']:.2f}{equal}"


def _result(checkpoint: Path, flags: list[str], new_tokens: int, others: list[str], kind: str) -> dict[str, dict]:  # type: ignore[type-arg]
    with tempfile.TemporaryDirectory() as folder:
        prompts, made = Path(folder) / "prompts.jsonl", Path(folder) / "made.json"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[kind]), encoding="utf-8")
        work = [
            "--checkpoints",
            checkpoint,
            "--prompts",
            prompts,
            "--batch-size",
            len(PROMPTS[kind]),
            "--out-json",
            made,
        ]
        given = [
            *work,
            "--max-new-tokens",
            new_tokens,
            "--mode",
            "full",
            "--temperature",
            0,
            "--no-probe",
            "-o",
            "json",
        ]
        code = command_line([*map(str, given), "--ignore-eos", "--warmup-rounds", "0", "--quiet", *flags, *others])
        if code:
            raise SystemExit(code)
        return dict(json.loads(made.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
