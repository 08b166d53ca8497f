"""The pages and files of docs/ that are made from types and options: ``python -m bench.cli.docs`` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from bench.options.docs import flags_page
from bench.options.run_flags import RunOptions
from bench.result.schema import document, schema_of_result
from wsm.option import SWITCH, Option, options_of
from wsm.settings import ECHOED_ONLY, THREADS, WSM_PRESETS, Settings

_DOCS = Path(__file__).resolve().parents[2] / "docs"


def result_schema() -> dict[str, Any]:
    """The schema of a result, its options and variables included."""
    kinds = get_type_hints(RunOptions)
    resolved = {
        name: {
            **msgspec.json.schema(kinds[name], schema_hook=lambda _: {"type": "string"}),  # a Path
            "description": _meaning(declared),
        }
        for name, declared in options_of(RunOptions).items()
    }
    text, maybe = {"type": "string"}, {"anyOf": [{"type": "string"}, {"type": "null"}]}
    variables = {declared.spelled: declared for declared in options_of(Settings).values()}
    environment = {
        **{name: {**text, "description": purpose} for name, (_, _, purpose) in THREADS.items()},
        **{name: {**text, "description": _meaning(variables[name])} for name in WSM_PRESETS},
        **{name: {**maybe, "description": "which GPUs CUDA shows, in which order; null: all"} for name in ECHOED_ONLY},
    }
    return schema_of_result({**resolved, "model": {**text, "description": "the model's name"}}, environment)


def _meaning(declared: Option) -> str:
    allowed = [declared.kind.says] if declared.kind is not SWITCH else []
    if declared.default is None:
        allowed.append(f"null: {declared.shown or 'none'}")
    values = f" ({'; '.join(allowed)})" if allowed else ""
    return f"{declared.spelled}{values}: {declared.help}"


GENERATED: Mapping[Path, Callable[[], str]] = {
    _DOCS / "schema.json": lambda: json.dumps(result_schema(), indent=1, ensure_ascii=False) + "\n",
    _DOCS / "JSON.md": lambda: document(result_schema()),
    _DOCS / "FLAGS.md": flags_page,
}

if __name__ == "__main__":
    for path, made in GENERATED.items():
        path.write_text(made(), encoding="utf-8")
