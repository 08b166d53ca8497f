"""Chats as a model was trained on them: its checkpoint's own template, rendered, and the ids of that."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llama.files import AGAIN, read_json
from llama.tokenizer import Llama3Tokenizer, Tokenizer
from wsm import stop
from wsm.disk.files import read_file, text_of
from wsm.errors import UnusableInput

if TYPE_CHECKING:
    from llama.checkpoint import Checkpoint

Chat: TypeAlias = Sequence[Mapping[str, str]]
"""Messages of a ``role`` and a ``content``."""
LONGEST_S = 30.0
"""For all chats of a run; the templates of published models take milliseconds."""
_RENDERER = Path(__file__).with_name("chat_render.py")
_FILE, _CONFIG, _MAP = "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A jinja2 template, where it was found, and the special tokens that it may name, such as ``bos_token``."""

    text: str
    where: str
    special: Mapping[str, str]

    def render(self, chats: Sequence[Chat], *, longest_s: float = LONGEST_S) -> list[str]:
        """Each chat's text up to where the model is to answer; UnusableInput, with the template's own words, for a
        template that cannot be used, does not end, or refuses a chat.

        In a process of its own, which has neither this one's memory nor its time.
        """
        job = json.dumps({"template": self.text, "chats": list(map(list, chats)), "special": dict(self.special)})
        try:
            ended = subprocess.run(
                [sys.executable, str(_RENDERER)], input=job, capture_output=True, text=True, timeout=longest_s
            )
        except subprocess.TimeoutExpired as error:
            raise self._unusable(f"it does not end within {longest_s:g} s") from error
        stop.check()
        try:
            answer: dict[str, Any] = json.loads(ended.stdout)
        except ValueError as error:
            last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise self._unusable(f"its process failed: {last}") from error
        if "error" in answer:
            raise self._unusable(answer["error"])
        texts: list[str] = answer["texts"]
        return texts

    def _unusable(self, why: str) -> UnusableInput:
        return UnusableInput(
            f"{self.where}: the chat template cannot be used here ({why}); mend or replace it, or leave out --chat"
        )


def chat_template_of(checkpoint: Checkpoint) -> ChatTemplate:
    """The checkpoint's own; UnusableInput if it has none.

    ``chat_template.jinja``, else ``chat_template`` in tokenizer_config.json (a text, or named ones, of which
    ``default`` counts), else the GGUF's. As in transformers the first wins.
    """
    directory = checkpoint.directory
    if directory is None:
        raise UnusableInput("--chat needs a checkpoint with a chat template; random weights have none: leave it out")
    special, config = dict(checkpoint.special_tokens), {}
    for name in (_MAP, _CONFIG):
        if (directory / name).exists():
            config = read_json(directory / name)
            special |= _special_tokens(config)
    text, where = checkpoint.chat_template, f"the GGUF file in {directory}"
    if (path := directory / _FILE).exists():
        text, where = text_of(read_file(path), str(path)), str(path)
    elif (named := config.get("chat_template")) is not None:
        where = str(directory / _CONFIG)
        text = _default_of(named, where)
    if text is None:
        raise UnusableInput(
            f"--chat: {directory} has no chat template, in {_FILE}, {_CONFIG} or its weights; base models and "
            "the built-in one have none: leave --chat out, or take an Instruct model"
        )
    return ChatTemplate(text, where, special)


def encode_chats(tokenizer: Tokenizer, template: ChatTemplate, chats: Sequence[Chat]) -> list[list[int]]:
    """The ids of each chat. Special tokens in its text are such, and nothing is put around it: a template says all.

    UnusableInput for a tokenizer that reads them as plain text, and as :meth:`ChatTemplate.render`.
    """
    if isinstance(tokenizer, Llama3Tokenizer):
        raise UnusableInput(
            f"--chat needs tokenizer.json beside {template.where}: with tokenizer.model alone special tokens in a text "
            "are plain text"
        )
    return [tokenizer.encode(text) for text in template.render(chats)]


def _default_of(named: Any, where: str) -> str:
    """The template that counts: the only one, or the one that is called ``default``."""
    if isinstance(named, list):
        found = {t.get("name"): t.get("template") for t in named if isinstance(t, dict)}
        named = found.get("default")
    if not isinstance(named, str):
        raise UnusableInput(f"{where}: chat_template is neither a text nor a list with one called default; {AGAIN}")
    return named


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and its like, each a text, or an object that holds one."""
    contents = {name: t.get("content") if isinstance(t, dict) else t for name, t in config.items()}
    return {n: text for n, text in contents.items() if n.endswith("_token") and isinstance(text, str)}
