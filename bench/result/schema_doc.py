"""docs/JSON.md from schema.json: ``python -m bench.result.schema_doc`` rewrites it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.result.types import FIXED_KEYS

SCHEMA_FILE = Path(__file__).with_name("schema.json")

DOC_FILE = Path(__file__).resolve().parents[2] / "docs" / "JSON.md"
_HEAD = """# The JSON of a run

<!-- Made from bench/result/schema.json by `python -m bench.result.schema_doc`; edit the schema instead. -->

{description}
A key `a.b` stands in the object `a`, `a.{{b,c}}.d` in both `a.b` and `a.c`, `a.*.d` in every object of `a`; `a[]` is an
item of the list `a`; a key with *(may be missing)* is left out where it does not apply. Times are in milliseconds
(`_ms`) or seconds (`_s`), sizes in bytes (`_bytes`), rates in 10^6 bytes a second (`_MBps`) or tokens a second
(`_tok_s`), shares in percent (`_pct`). The file is of schema version {version}; `bench/result/schema.json` says the
same to programs (JSON Schema, draft 2020-12).
"""


def read_schema() -> dict[str, Any]:
    """The schema of a result."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def document(schema: Mapping[str, Any]) -> str:
    """The schema as a page of Markdown: the guide's keys, then a table for each other part."""
    sections = [
        _HEAD.format(description=schema["description"], version=schema["properties"]["schema_version"]["const"])
    ]
    parts = schema["properties"]
    alone = [key for key in parts if key not in FIXED_KEYS and not _inside(parts[key], schema)]
    sections.append(_table("The quick-start guide's keys", {key: parts[key] for key in FIXED_KEYS}, schema))
    sections.append(_table("Beside them", {key: parts[key] for key in alone}, schema))
    sections += [
        _table(f"`{key}`", {key: part}, schema) for key, part in parts.items() if key not in (*FIXED_KEYS, *alone)
    ]
    return "\n".join(sections)


def _table(title: str, parts: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    rows = [row for key, part in parts.items() for row in _rows(key, part, schema, optional=False)]
    lines = [f"| {key} | {kind} | {meaning} |" for key, kind, meaning in rows]
    return "\n".join([f"## {title}", "", "| key | type | meaning and unit |", "| --- | --- | --- |", *lines, ""])


Row = tuple[str, str, str]


def _rows(path: str, part: Mapping[str, Any], schema: Mapping[str, Any], *, optional: bool) -> Iterator[Row]:
    """A row for a key, then one for each key inside it; keys of the same make share the rows of what is inside them."""
    yield _row(path, part, schema, optional=optional)
    yield from _rows_inside(path, part, schema)


def _rows_inside(path: str, part: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Row]:
    required = _followed(part, schema).get("required", ())
    makes: dict[str, list[str]] = {}
    inside = _inside(part, schema)
    for key, content in inside.items():
        makes.setdefault(content.get("$ref", key), []).append(key)
    for keys in makes.values():
        for key in keys:
            yield _row(path + key, inside[key], schema, optional=key != "[]" and key[1:] not in required)
        yield from _rows_inside(path + _together(keys), inside[keys[0]], schema)


def _together(keys: Sequence[str]) -> str:
    """How several keys are written as one: ``.{a,b}``, or ``.*`` where they are many."""
    if len(keys) == 1:
        return keys[0]
    return ".*" if len(keys) > 3 else f".{{{','.join(key[1:] for key in keys)}}}"


def _row(path: str, part: Mapping[str, Any], schema: Mapping[str, Any], *, optional: bool) -> Row:
    part = _followed(part, schema)
    key = f"`{path}`" + (" *(may be missing)*" if optional else "")
    return key, _type_of(part, schema), str(part["description"]).replace("|", "\\|")


def _followed(part: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A part with what it refers to; its own description stands before the shared one."""
    if "$ref" not in part:
        return dict(part)
    return {**schema["$defs"][part["$ref"].rpartition("/")[2]], **part}


def _inside(part: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parts of an object, or of a list's items that are objects, by how their keys are written."""
    part = _followed(part, schema)
    if "items" in part:
        items = _followed(part["items"], schema)
        return {"[]": part["items"]} if "properties" in items else {}
    return {f".{key}": content for key, content in part.get("properties", {}).items()}


def _type_of(part: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "enum" in part:
        return ", ".join("null" if value is None else f"`{value}`" for value in part["enum"])
    if "const" in part:
        return f"`{part['const']}`"
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    if "array" not in kinds:
        return " or ".join(kinds)
    items = _followed(part["items"], schema)
    types = "string" if "enum" in items else items["type"]
    item = types if isinstance(types, str) else " or ".join(types)
    return " or ".join(f"array of {item}" if kind == "array" else kind for kind in kinds)


if __name__ == "__main__":
    DOC_FILE.write_text(document(read_schema()), encoding="utf-8")
