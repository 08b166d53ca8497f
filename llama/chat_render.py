"""Renders chat templates in a process of its own: one that never ends or takes all memory harms nobody else.

A job comes as JSON on stdin and its texts go out as JSON on stdout; :mod:`llama.chat` starts it. Templates come from
the internet: they run in jinja2's sandbox, with what transformers gives them and nothing more.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import sys
from typing import Any

MEMORY_BYTES, MEMORY_PER_BYTE = 1 << 30, 32
"""Address space, and how much more of it for each byte of the job."""


def main() -> None:
    job = sys.stdin.read()
    most, hard = MEMORY_BYTES + MEMORY_PER_BYTE * len(job), resource.getrlimit(resource.RLIMIT_AS)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)  # a shell's own limit may be lower
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        answer: dict[str, Any] = {"texts": _render(**json.loads(job))}
    except MemoryError:
        answer = {"error": "it takes more than 1 GiB of memory"}
    except Exception as error:  # whatever a foreign program raises is its author's mistake, and a sentence here
        line = getattr(error, "lineno", None)
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        answer = {"error": f"line {line}: {said}" if line is not None else said}
    json.dump(answer, sys.stdout)


def _render(template: str, chats: list[list[dict[str, str]]], special: dict[str, str]) -> list[str]:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model is trained on; when rendering it is as if it were not there."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own name

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Without jinja2's escapes for HTML."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    made = environment.from_string(template)
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **special}
    return [made.render(messages=chat, **given) for chat in chats]


if __name__ == "__main__":
    own = os.path.dirname(os.path.realpath(__file__))  # its names are not for others to import
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != own]
    main()
