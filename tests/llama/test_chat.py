"""Chat templates: the ids of transformers' own apply_chat_template, and templates that harm nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from llama import chat_render
from llama.chat import Chat, ChatTemplate, chat_template_of, encode_chats
from llama.checkpoint import Checkpoint, open_checkpoint
from llama.config import ModelConfig
from llama.tokenizer import HFTokenizer, Llama3Tokenizer, load_tokenizer
from tests.tiny import hf_directory, hf_model, hf_tokenizer, llama3_tokenizer
from wsm.errors import UnusableInput

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" + tools | tojson(indent=4) }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
"""
ODD = """\
{%- set ns = namespace(count=0) -%}
    {% for message in messages %}
    {% if message.role == "note" %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
{{ message | tojson }} <{{ ns.count }}> {{ dict(a=1) | tojson(indent=2) }}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% endfor %}
{{ eos_token }}{{ unk_token | default("none") }}
"""
SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
CHATS: list[Chat] = [
    [{"role": "user", "content": "  What is <|im_end|> & <b>é</b>? "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3\n"}],
]
ONE: list[Chat] = [[{"role": "user", "content": "hello"}]]


def directory_of(path: Path, chat_template: Any = None, **config: Any) -> Path:
    """A checkpoint without weights, its tokenizer with the special tokens of the templates above."""
    hf_tokenizer(path, 290)
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] += [
        {"id": 290 + place, "content": text, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for place, text in enumerate(SPECIAL)
    ]
    # BOS in front of plain texts, as Llama 3's has it: a chat's comes from its template alone.
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(content))
    named = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "add_bos_token": True,
    } | config
    named |= {} if chat_template is None else {"chat_template": chat_template}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return path


class Weightless(Checkpoint):
    """Nothing but a directory, and what a GGUF says."""

    chat_template: str | None = None
    special_tokens: Mapping[str, str] = MappingProxyType({})

    def __init__(self, directory: Path, chat_template: str | None = None, **special: str) -> None:
        self.directory, self.chat_template, self.special_tokens = directory, chat_template, special

    def fill(self, *_: Any) -> None:
        raise AssertionError


def ids_here(directory: Path, chats: list[Chat]) -> list[list[int]]:
    tokenizer = HFTokenizer(directory, ModelConfig("m", 64, 1, 2, 2, 32, 64, 300))
    return encode_chats(tokenizer, chat_template_of(Weightless(directory)), chats)


@pytest.mark.parametrize("template", [LLAMA3, CHATML, LLAMA2, ODD])
@pytest.mark.parametrize("place", ["config", "file", "default of several"])
def test_ids_are_those_of_transformers(template: str, place: str, tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    directory_of(tmp_path, {"config": template, "file": None, "default of several": several}[place])
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rendered = theirs.apply_chat_template(CHATS, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids_here(tmp_path, CHATS) == rendered


def test_bos_is_there_once_and_special_tokens_are_such(tmp_path: Path) -> None:
    (ids,) = ids_here(directory_of(tmp_path, LLAMA3), ONE)
    assert ids[:2] == [256, 290]
    assert ids.count(256) == 1
    assert ids.count(291) == 3  # the ends of three headers


def test_template_file_wins_over_the_config_and_both_over_a_gguf(tmp_path: Path) -> None:
    directory_of(tmp_path, "config")
    assert chat_template_of(Weightless(tmp_path, "gguf")).text == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert chat_template_of(Weightless(tmp_path, "gguf")).text == "file"


def test_gguf_brings_template_and_tokens(tmp_path: Path) -> None:
    template = chat_template_of(Weightless(tmp_path, "{{ bos_token }}{{ messages[0].content }}", bos_token="<s>"))
    assert template.render(ONE) == ["<s>hello"]


def test_names_of_tokens_are_taken_from_the_older_map_too(tmp_path: Path) -> None:
    directory_of(tmp_path, "{{ eos_token }} {{ pad_token }}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "old", "pad_token": {"content": "<p>"}}))
    assert chat_template_of(Weightless(tmp_path)).render(ONE) == ["</s> <p>"]


def refusal(template: str, **options: Any) -> str:
    with pytest.raises(UnusableInput) as refused:
        ChatTemplate(template, "here", {}).render(ONE, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for %}", "line 1: Expected an expression"),
        ("{{ raise_exception('only system\nmessages') }}", "only system messages"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10000000000 }}", "more than 1 GiB of memory"),
        ("{% set n = namespace(x='a' * 1000) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "1 GiB"),
    ],
)
def test_a_bad_template_is_refused_with_its_own_words(template: str, said: str) -> None:
    told = refusal(template)
    assert told.startswith("here: the chat template cannot be used here (")
    assert said in told
    assert "\n" not in told


def test_a_shell_with_a_limit_of_its_own_renders_too() -> None:
    """Safe path: then Python puts no folder of the program's in front of the others, and none may be taken away."""
    job = json.dumps({"template": "{{ messages[0].content }}", "chats": ONE, "special": {}})
    command = ["bash", "-c", f"ulimit -v 900000; exec {sys.executable} {chat_render.__file__}"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.path.dirname(os.path.dirname(jinja2.__file__))}
    done = subprocess.run(command, input=job, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"texts": ["hello"]}


def test_a_template_that_does_not_end_is_given_up() -> None:
    begun = time.monotonic()
    endless = (
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
    )
    assert "does not end within 1 s" in refusal(endless, longest_s=1)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("template", [[{"name": "tool_use", "template": "x"}], 7, {"default": "x"}])
def test_a_config_without_a_default_template_is_refused(template: Any, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"tokenizer_config.json: chat_template is neither"):
        chat_template_of(Weightless(directory_of(tmp_path, template)))


def test_a_checkpoint_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="base models and the built-in one have none: leave --chat out"):
        chat_template_of(open_checkpoint(hf_directory(directory_of(tmp_path), hf_model())))


def test_tokenizer_model_alone_is_refused(tmp_path: Path) -> None:
    size = llama3_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path, ModelConfig("m", 64, 1, 2, 2, 32, 64, size))
    assert isinstance(tokenizer, Llama3Tokenizer)
    with pytest.raises(UnusableInput, match=r"needs tokenizer.json"):
        encode_chats(tokenizer, ChatTemplate("x", "here", {}), ONE)
