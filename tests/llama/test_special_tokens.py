"""What is put around a prompt: what transformers puts around it, once, and also around what is left of a long one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Metaspace, Split
from tokenizers.processors import ByteLevel, RobertaProcessing, Sequence, TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig

from llama.config import PRESETS
from llama.tokenizer import ByteTokenizer, HFTokenizer, Llama3Tokenizer, encode_prompt, keep_last, load_tokenizer
from tests.tiny import hf_tokenizer, llama3_tokenizer
from wsm.errors import UnusableInput

MODEL = dataclasses.replace(PRESETS["Llama-3.1-8B"], name="tiny", vocab_size=300)
BOS, EOS = ("<s>", 256), ("</s>", 257)
BEGIN = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[BOS])
AROUND = TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[BOS, EOS])
PROCESSORS: dict[str, Any] = {
    "none": None,
    "bytes alone": ByteLevel(trim_offsets=False),
    "begin": BEGIN,
    "bytes, then begin": Sequence([ByteLevel(trim_offsets=False), BEGIN]),
    "begin and end": AROUND,
    "end": TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[EOS]),
    "another's": RobertaProcessing(EOS, BOS),
}
EXPECTED = {
    "none": [],
    "bytes alone": [],
    "begin": [256],
    "bytes, then begin": [256],
    "begin and end": [256, 257],
    "end": [257],
    "another's": [256, 257],
}


def written(directory: Path, **parts: Any) -> Path:
    """A directory with a tokenizer.json whose ``parts`` are set, and a config.json of transformers."""
    hf_tokenizer(directory)
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    for part, value in parts.items():
        if value is not None:
            setattr(tokenizer, part, value)
    tokenizer.save(path)
    LlamaConfig(vocab_size=300).save_pretrained(directory)
    set_config(directory)
    return directory


def set_config(directory: Path, **fields: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **fields}))


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("kind", [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_prompt_has_the_ids_of_transformers(
    processor: str, kind: str | None, add_bos: bool | None, tmp_path: Path
) -> None:
    """A tokenizer.json decides alone: ``add_bos_token`` counts only where transformers converts another file."""
    fields = {"tokenizer_class": kind, "add_bos_token": add_bos, "add_eos_token": add_bos}
    directory = written(tmp_path, post_processor=PROCESSORS[processor])
    set_config(directory, **{name: value for name, value in fields.items() if value is not None})
    mine, oracle = load_tokenizer(directory, MODEL), AutoTokenizer.from_pretrained(directory)
    assert [*mine.prefix, *mine.suffix] == EXPECTED[processor]
    for text in ("Hello world", "a", "  naïve 模型\n", "half </s> way"):
        assert encode_prompt(mine, text) == oracle(text).input_ids


@pytest.mark.parametrize("most", [3, 7, 8, 100])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_long_prompt_is_cut_as_transformers_cuts_it_on_the_left(processor: str, most: int, tmp_path: Path) -> None:
    directory = written(tmp_path, post_processor=PROCESSORS[processor])
    mine, oracle = load_tokenizer(directory, MODEL), AutoTokenizer.from_pretrained(directory, truncation_side="left")
    theirs = oracle("abcdefgh", truncation=True, max_length=most).input_ids
    assert keep_last(mine, encode_prompt(mine, "abcdefgh"), most) == theirs


@given(st.text("ab", max_size=20), st.integers(2, 30), st.booleans())
def test_what_is_kept_is_the_tail_between_prefix_and_suffix(text: str, most: int, ends: bool) -> None:
    tokenizer = ByteTokenizer(MODEL)
    tokenizer.suffix = (257,) if ends else ()
    row = keep_last(tokenizer, encode_prompt(tokenizer, text), most)
    assert len(row) == min(most, len(text) + 1 + ends)
    assert row[0] == 256
    assert row[1:] == [*text.encode()[len(text) - (len(row) - 1 - ends) :], *tokenizer.suffix]


def test_no_room_for_the_special_tokens_is_an_error_that_names_both_flags(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, post_processor=AROUND), MODEL)
    assert keep_last(tokenizer, encode_prompt(tokenizer, "abc"), 2) == [256, 257]
    with pytest.raises(UnusableInput, match=r"room for 1 token, .* 2 special ones.*--max-seq-len.*--max-new-tokens"):
        keep_last(tokenizer, encode_prompt(tokenizer, "abc"), 1)


@pytest.mark.parametrize("text", ["ab", "<s>ab", "ab</s>", "<s>ab</s>"])
def test_special_tokens_that_a_text_begins_or_ends_with_are_not_put_there_twice(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, post_processor=AROUND), MODEL)
    assert encode_prompt(tokenizer, text) == [256, 64, 65, 257]


def test_begin_of_text_is_not_put_twice_before_metas_prompts_and_is_plain_text_elsewhere(tmp_path: Path) -> None:
    size = llama3_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path, dataclasses.replace(MODEL, vocab_size=size))
    assert isinstance(tokenizer, Llama3Tokenizer)
    begin = size - 256
    assert encode_prompt(tokenizer, "<|begin_of_text|>ab") == encode_prompt(tokenizer, "ab") == [begin, *b"ab"]
    inside = encode_prompt(tokenizer, "ab<|begin_of_text|>")
    assert inside.count(begin) == 1
    assert tokenizer.decode(inside) == "ab<|begin_of_text|>"


def test_a_special_token_without_an_embedding_around_every_text_is_refused_at_once(tmp_path: Path) -> None:
    directory = written(tmp_path, post_processor=AROUND)
    with pytest.raises(UnusableInput, match="gives '</s>' the id 257"):
        load_tokenizer(directory, dataclasses.replace(MODEL, vocab_size=257))


def test_a_post_processor_that_repeats_the_text_is_refused(tmp_path: Path) -> None:
    twice = TemplateProcessing(single="$A <s> $A", pair="$A $B", special_tokens=[BOS])
    with pytest.raises(UnusableInput, match=r"tokenizer\.json: its post-processor does more than put tokens around"):
        load_tokenizer(written(tmp_path, post_processor=twice), MODEL)


CATASTROPHE = Regex(r"(a+)+\1$")


@pytest.mark.parametrize(
    "parts", [{"pre_tokenizer": Split(CATASTROPHE, "isolated")}, {"normalizer": Replace(CATASTROPHE, "b")}]
)
def test_a_tokenizer_whose_regex_panics_is_one_sentence(parts: dict[str, Any], tmp_path: Path) -> None:
    """A panic of the compiled code is no Exception: only the sentence keeps the program's end in order."""
    tokenizer = load_tokenizer(written(tmp_path, **parts), MODEL)
    with pytest.raises(
        UnusableInput, match=r"tokenizer\.json: its rules cannot cut this text \(.*retry-limit"
    ) as caught:
        tokenizer.encode("a" * 3000 + "b")
    assert "\n" not in str(caught.value)


def test_a_broken_regex_is_a_damaged_file(tmp_path: Path) -> None:
    path = written(tmp_path, normalizer=Replace(Regex("a+"), "b")) / "tokenizer.json"
    path.write_text(path.read_text().replace('"a+"', '"(a+"'))
    with pytest.raises(UnusableInput, match=r"tokenizer\.json is damaged.*unmatched parenthesis"):
        load_tokenizer(tmp_path, MODEL)


def test_llama_2s_tokenizer_begins_a_text_as_transformers_does(tmp_path: Path) -> None:
    """Not bytes but words with a mark before them: here transformers builds its own LlamaTokenizer anew."""
    directory = written(tmp_path, post_processor=BEGIN, pre_tokenizer=Metaspace(prepend_scheme="first", split=False))
    set_config(directory, tokenizer_class="LlamaTokenizer", add_bos_token=False)
    mine, oracle = load_tokenizer(directory, MODEL), AutoTokenizer.from_pretrained(directory)
    assert isinstance(mine, HFTokenizer)
    assert mine.prefix == (256,)
    assert oracle("a").input_ids[0] == 256
