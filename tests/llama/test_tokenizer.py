"""Tokenizers: ids as the reference gives them, robust decoding, and refusals that name both sizes."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from llama.checkpoint import builtin_checkpoint
from llama.config import PRESETS, ModelConfig
from llama.splits import LONGEST_RUN, MOST_CHARS, digestible_pieces
from llama.tokenizer import (
    ByteTokenizer,
    HFTokenizer,
    Llama3Tokenizer,
    encode_prompt,
    load_tokenizer,
)
from tests.tiny import hf_tokenizer, llama3_tokenizer
from wsm.errors import UnusableInput

TEXTS = ["", "hello there", "  two  spaces\n\n and 12345 digits", "naïve 模型 🙂", "it's I'll WE'RE", "<|eot_id|>"]


def model(vocab_size: int) -> ModelConfig:
    return dataclasses.replace(PRESETS["Llama-3.1-8B"], name="tiny", vocab_size=vocab_size)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Llama3Tokenizer:
    directory = tmp_path_factory.mktemp("meta")
    size = llama3_tokenizer(directory / "tokenizer.model")
    tokenizer = load_tokenizer(directory, model(size))
    assert isinstance(tokenizer, Llama3Tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    tokenizer = load_tokenizer(hf_tokenizer(tmp_path_factory.mktemp("hf")), model(300))
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


def test_llama3_special_ids_follow_the_ranks(llama3: Llama3Tokenizer) -> None:
    ranks = llama3.vocab_size - 256
    assert (llama3.prefix, llama3.suffix) == ((ranks,), ())  # 128000 in the released models
    assert llama3.stop_ids == {ranks + 1, ranks + 8, ranks + 9}  # 128001, 128008, 128009


@pytest.mark.parametrize("text", TEXTS)
def test_llama3_round_trip(text: str, llama3: Llama3Tokenizer) -> None:
    ids = encode_prompt(llama3, text)
    assert ids == [*llama3.prefix, *llama3.encode(text)]
    assert llama3.decode(ids) == text


def test_llama3_merges_inside_words_and_cuts_digits_in_threes(llama3: Llama3Tokenizer) -> None:
    encoded = llama3.encode("aeb ")
    assert [llama3.decode([token]) for token in encoded] == ["ae", "b", " "]
    # No pair of digits is in the vocabulary, so what is left is one id a digit.
    assert len(llama3.encode("1234")) == 4


def test_special_tokens_in_a_text_are_text_to_llama3(llama3: Llama3Tokenizer) -> None:
    assert not set(llama3.encode("<|eot_id|><|begin_of_text|>")) & set(range(llama3.vocab_size - 256, 10**6))


@given(st.lists(st.integers(-3, 1000)))
def test_any_ids_decode(ids: list[int]) -> None:
    assert isinstance(ByteTokenizer(model(320)).decode(ids), str)


def test_any_ids_decode_with_a_vocabulary(llama3: Llama3Tokenizer, hf: HFTokenizer) -> None:
    for tokenizer in (llama3, hf):
        assert isinstance(tokenizer.decode(range(-5, 10_000)), str)
    assert llama3.decode([0xE6, 0xA8]) == "\ufffd"  # the first two bytes of three


@given(st.text(max_size=300))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer(model(320))
    assert tokenizer.decode([*encode_prompt(tokenizer, text), 257]) == text.encode(errors="replace").decode()


@pytest.mark.parametrize("text", [" " * 100_000, "x" * 100_000, "ab " * 300_000, "\n" * 60_000 + "end", "1" * 500_000])
def test_very_long_texts_are_encoded_whole(text: str, llama3: Llama3Tokenizer) -> None:
    assert llama3.decode(llama3.encode(text)) == text


def test_half_a_surrogate_pair_does_no_harm(llama3: Llama3Tokenizer, hf: HFTokenizer) -> None:
    for tokenizer in (llama3, hf, ByteTokenizer(model(320))):
        assert tokenizer.decode(tokenizer.encode("a\ud800b"))[::2] == "ab"


RUNS = st.lists(st.tuples(st.sampled_from([" ", "x", "\n"]), st.integers(1, 3 * LONGEST_RUN)), max_size=4)


@settings(max_examples=30, deadline=None)
@given(RUNS)
def test_pieces_make_the_text_again_and_no_run_is_too_long(runs: list[tuple[str, int]]) -> None:
    text = "".join(letter * count for letter, count in runs)
    pieces = list(digestible_pieces(text))
    assert "".join(pieces) == text
    for piece in pieces:
        assert len(piece) <= MOST_CHARS
        assert max(len(list(run)) for _, run in groupby(piece, str.isspace)) <= LONGEST_RUN


def test_short_texts_stay_whole() -> None:
    assert list(digestible_pieces("a b  c")) == ["a b  c"]


def test_llama3_ids_are_tiktokens_own(llama3: Llama3Tokenizer, tmp_path: Path) -> None:
    llama3_tokenizer(tmp_path / "tokenizer.model")
    ranks = load_tiktoken_bpe(str(tmp_path / "tokenizer.model"))
    oracle = tiktoken.Encoding("oracle", pat_str=r"\p{L}+|\s+", mergeable_ranks=ranks, special_tokens={})
    assert llama3.encode("sheath") == oracle.encode("sheath")


@pytest.mark.parametrize("off", [-1, 1, 1000])
def test_a_meta_tokenizer_of_another_size_is_refused_with_both_numbers(off: int, tmp_path: Path) -> None:
    size = llama3_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(UnusableInput, match=rf"has {size} tokens.* has {size + off}: "):
        load_tokenizer(tmp_path, model(size + off))


@pytest.mark.parametrize(("size", "vocab_size"), [(557, 300), (300, 316)])
def test_an_hf_tokenizer_that_is_much_larger_or_smaller_is_refused(size: int, vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=rf"has {size} tokens.* has {vocab_size}: "):
        load_tokenizer(hf_tokenizer(tmp_path, size), model(vocab_size))


def test_an_hf_tokenizer_with_tokens_beyond_the_embedding_warns_and_refuses_only_those(tmp_path: Path) -> None:
    directory = hf_tokenizer(tmp_path, 300)
    tokenizer = load_tokenizer(directory, model(290))
    [warning] = tokenizer.warnings
    assert warning.startswith(f"{directory}/tokenizer.json has 10 tokens beyond the 290 of the model's embedding")
    assert tokenizer.encode("abc") == [64, 65, 66]
    fewer = load_tokenizer(directory, model(257))  # no embedding for </s>, which a text may hold
    with pytest.raises(
        UnusableInput, match=r"gives '</s>' the id 257, for which the model has no embedding \(it has 257"
    ):
        fewer.encode("abc</s>")


def test_a_slightly_smaller_hf_tokenizer_is_padding(tmp_path: Path) -> None:
    assert load_tokenizer(hf_tokenizer(tmp_path, 300), model(315)).vocab_size == 300


@pytest.mark.parametrize("text", [text for text in TEXTS if "<" not in text])
def test_hf_round_trip(text: str, hf: HFTokenizer) -> None:
    assert hf.decode([*encode_prompt(hf, text), 257]) == text


def test_hf_recognises_special_tokens_as_transformers_does(hf: HFTokenizer) -> None:
    assert hf.encode("a</s>")[1:] == [257]


def test_hf_forgets_truncation_and_padding_left_in_the_file(tmp_path: Path) -> None:
    path = hf_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert len(load_tokenizer(tmp_path, model(300)).encode("a" * 50)) == 50


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({}, {257}),
        ({"config.json": {"bos_token_id": 1, "eos_token_id": 2}}, {2}),
        ({"config.json": {"eos_token_id": [2, 3]}}, {2, 3}),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [4, 5]}}, {4, 5}),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": "</s>"}}, {257}),
        ({"config.json": {"bos_token_id": None, "eos_token_id": -1}}, {257}),
        ({"config.json": {"eos_token_id": True}}, {257}),
        ({"config.json": {"eos_token_id": 10**30}}, {257}),
        ({"tokenizer_config.json": {}}, set()),
    ],
)
def test_stop_ids_come_from_the_files_beside(files: dict[str, Any], stops: set[int], tmp_path: Path) -> None:
    hf_tokenizer(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path, model(300)).stop_ids == stops


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UnusableInput, match=r"pip install tokenizers"):
        load_tokenizer(tmp_path, model(300))


SENTENCEPIECE = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02\x0a\x0c\x0a\x03<s>\x15"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.model", SENTENCEPIECE, r"SentencePiece model \(LLaMA 2\).*tokenizer\.json"),
        ("tokenizer.model", b"\x00\xffrubbish", "is damaged"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "cut short"),
        ("tokenizer.model", b"", "cut short"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("tokenizer.json", b"{", "is damaged"),
        ("tokenizer.json", b'{"model": {"type": "Unheard"}}', "is damaged"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(file: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UnusableInput, match=said) as caught:
        load_tokenizer(tmp_path, model(600))
    assert str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"]
)
def test_a_pipe_in_place_of_a_file_is_refused_and_never_waited_for(file: str, tmp_path: Path) -> None:
    if file != "tokenizer.model":
        hf_tokenizer(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    with pytest.raises(UnusableInput, match=f"{file} cannot be read: it is a pipe, not a file"):
        load_tokenizer(tmp_path, model(300))


def test_a_twice_named_token_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    size = llama3_tokenizer(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[5].split()[0] + f" {len(lines)}"]))
    with pytest.raises(UnusableInput, match="named twice"):
        load_tokenizer(tmp_path, model(size))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path, model(300))


def test_synthetic_and_built_in_models_speak_bytes(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(None, PRESETS["Llama-3.1-8B"]), ByteTokenizer)
    checkpoint = builtin_checkpoint(tmp_path)
    assert isinstance(load_tokenizer(checkpoint.directory, checkpoint.config), ByteTokenizer)
    with pytest.raises(UnusableInput, match="258 ids; tiny has 100"):
        ByteTokenizer(model(100))
