"""Prompts: every form of file is read, what cannot be is named, lengths are exact."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Trainable
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from bench.options.flags import parse
from bench.options.run_flags import RunOptions
from bench.run import prompt_files
from bench.run.prompt_files import read_chats, read_prompts, user_says
from bench.run.prompts import (
    DEFAULT_FILE,
    fill_batch,
    make_prompts,
    prompt_file,
    random_prompts,
    shape_of,
)
from bench_infer import command_line as main
from llama.config import ModelConfig
from llama.tokenizer import ByteTokenizer, HFTokenizer, Llama3Tokenizer, Tokenizer, encode_prompt, keep_last
from tests.tiny import hf_tokenizer, llama3_tokenizer
from wsm.errors import UnusableInput

WORDS = Path(__file__).parents[3] / "bench" / "run" / "words.txt"


def config_of(vocab_size: int) -> ModelConfig:
    return ModelConfig("tiny", 64, 2, 4, 2, 16, 128, vocab_size)


def byte_tokenizer(directory: Path) -> Tokenizer:
    return ByteTokenizer(config_of(300))


def llama3(directory: Path) -> Tokenizer:
    size = llama3_tokenizer(directory / "tokenizer.model")
    return Llama3Tokenizer(directory / "tokenizer.model", config_of(size))


def hf(directory: Path) -> Tokenizer:
    return HFTokenizer(hf_tokenizer(directory), config_of(300))


def trained(directory: Path) -> Tokenizer:
    """A BPE trained on the very words, so that most of them are one token, joined to their space."""
    model = Trainable(BPE())
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    letters = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=900, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False)
    model.train_from_iterator([WORDS.read_text(encoding="utf-8").replace("\n", " ")], trainer)
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return HFTokenizer(directory, config_of(model.get_vocab_size()))


MAKERS: tuple[Callable[[Path], Tokenizer], ...] = (byte_tokenizer, llama3, hf, trained)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UnusableInput) as caught:
        read_prompts(path)
    sentence = str(caught.value)
    assert "--prompts" in sentence
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


# -- files


def test_a_plain_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path / "p.txt", "one\n\n  two words \r\nthree")) == ["one", "two words", "three"]


def test_headed_blocks_keep_their_lines(tmp_path: Path) -> None:
    text = "\n===== PROMPT 0000 | tokens=3 =====\nfirst\n\n  line two\n\n=====PROMPT 1=====\nsecond\n"
    assert read_prompts(written(tmp_path / "p.txt", text)) == ["first\n\n  line two", "second"]


def test_text_before_the_first_header_is_not_lost_in_silence(tmp_path: Path) -> None:
    assert "line 2" in refusal(written(tmp_path / "p.txt", "\nstray\n===== PROMPT 0 =====\nx\n"))


def test_jsonl_takes_objects_and_strings(tmp_path: Path) -> None:
    lines = ['{"prompt": "a\\nb"}', "", '"c"', '{"text": "d", "id": 3}']
    assert read_prompts(written(tmp_path / "p.jsonl", "\n".join(lines))) == ["a\nb", "c", "d"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_separator_inside_a_json_string_ends_no_line(tmp_path: Path, separator: str) -> None:
    """json.dumps(…, ensure_ascii=False) writes them as they are, and JSON allows it."""
    line = json.dumps({"prompt": f"a{separator}b"}, ensure_ascii=False)
    assert read_prompts(written(tmp_path / "p.jsonl", line + "\n")) == [f"a{separator}b"]


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\u0085", "\u2028"])
def test_only_line_ends_end_a_prompt(tmp_path: Path, character: str) -> None:
    assert read_prompts(written(tmp_path / "p.txt", f"a{character}b\nc\n")) == [f"a{character}b", "c"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf===== PROMPT 0 =====\nhello\n")
    assert read_prompts(tmp_path / "p.txt") == ["hello"]


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "3", "null", "[]", "{}", '{"prompt": 3}', '{"prompt": null}'])
def test_a_jsonl_line_without_a_prompt_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    assert "line 2" in refusal(written(tmp_path / "p.jsonl", f'"fine"\n{line}\n'))


@pytest.mark.parametrize("name", ["p.json", "P.JSON", "p.txt", "p"])
def test_a_json_array_is_read_under_any_name(tmp_path: Path, name: str) -> None:
    entries = ["a", {"prompt": "b\nc"}, {"text": "d"}]
    for indent in (None, 1):
        path = written(tmp_path / name, json.dumps(entries, indent=indent) + "\n")
        assert read_prompts(path) == ["a", "b\nc", "d"]


@pytest.mark.parametrize("name", ["p.jsonl", "P.JSONL", "p.ndjson", "p.NDJson", "p.txt", "p"])
def test_json_lines_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    lines = ['{"prompt": "a"}', "", '{"text": "b"}']
    assert read_prompts(written(tmp_path / name, "\n".join(lines))) == ["a", "b"]
    assert "line 2" in refusal(written(tmp_path / name, '{"prompt": "a"}\nplain\n'))


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_that_is_cut_short_or_holds_no_prompts_is_never_taken_as_lines(
    tmp_path: Path, indent: int | None
) -> None:
    entry = {"id": "a", "conversations": [{"from": "human", "value": "hello"}]}
    whole = json.dumps([entry, entry], indent=indent)
    assert "is damaged" in refusal(written(tmp_path / "share.txt", whole[:-20]))
    other = json.dumps([{"instruction": "a", "output": "b"}], indent=indent)
    assert "entry 1 holds no prompt" in refusal(written(tmp_path / "alpaca", other))


def test_of_a_sharegpt_conversation_the_user_s_first_turn_is_taken(tmp_path: Path) -> None:
    talks = [
        [{"from": "human", "value": "one"}, {"from": "gpt", "value": "1"}, {"from": "human", "value": "two"}],
        [{"from": "gpt", "value": "hello"}, {"from": "user", "value": "three"}],
        [{"from": "gpt", "value": "nobody asked"}],
        [],
    ]
    text = json.dumps([{"id": str(number), "conversations": talk} for number, talk in enumerate(talks)])
    for name in ("ShareGPT_V3.json", "share.txt"):
        assert read_prompts(written(tmp_path / name, text)) == ["one", "three"]


def test_of_a_chat_all_up_to_the_user_s_last_message_is_taken(tmp_path: Path) -> None:
    said = [("system", "brief"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    messages = [{"role": role, "content": content} for role, content in said]
    lines = [{"messages": messages}, {"messages": messages[:1]}, {"prompt": "three"}]
    path = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_chats(path) == [messages[:4], user_says("three")]
    assert read_prompts(path) == ["one", "three"]  # without --chat, as of ShareGPT


@pytest.mark.parametrize("name", ["p.txt", "blocks.txt", "p.jsonl", "p.json", "share.json"])
def test_each_prompt_of_every_kind_of_file_is_a_message_of_the_user(tmp_path: Path, name: str) -> None:
    texts = {
        "p.txt": "one\ntwo\n",
        "blocks.txt": "===== PROMPT 1 =====\none\n\n===== PROMPT 2 =====\ntwo\n",
        "p.jsonl": '{"prompt": "one"}\n{"text": "two"}\n',
        "p.json": '["one", "two"]',
        "share.json": json.dumps([{"conversations": [{"from": "human", "value": text}]} for text in ("one", "two")]),
    }
    assert read_chats(written(tmp_path / name, texts[name])) == [user_says("one"), user_says("two")]


@pytest.mark.parametrize("message", ["hello", {"role": "user"}, {"role": "user", "content": [{"type": "image"}]}])
def test_a_message_that_is_no_text_is_refused(tmp_path: Path, message: object) -> None:
    assert "entry 1: a message is not" in refusal(written(tmp_path / "p.json", json.dumps([{"messages": [message]}])))


@pytest.mark.parametrize("text", ["[1, 2, 3]", "[x] a box", "{curly", '{"a": 1}', "[]", "{}"])
def test_a_plain_line_that_only_looks_like_json_is_a_prompt(tmp_path: Path, text: str) -> None:
    assert read_prompts(written(tmp_path / "p.txt", f"{text}\nplain\n")) == [text, "plain"]


@pytest.mark.parametrize("text", ["one\ntwo\n", "{}", "3", '{"messages": []}', '[{"prompt": 3}]', '{"a": 1}\n{"a": 2}'])
def test_a_json_file_without_prompts_is_refused(tmp_path: Path, text: str) -> None:
    refusal(written(tmp_path / "p.json", text))


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("p.jsonl", '"a"\n{"prompt": ""}\n', "line 2"),
        ("p.json", '["a", "b", " "]', "entry 3"),
        ("p.txt", "===== PROMPT 0 =====\na\n===== PROMPT 1 =====\n\n", "line 3"),
    ],
)
def test_an_empty_prompt_among_others_is_an_error_that_says_where(
    tmp_path: Path, name: str, text: str, where: str
) -> None:
    found = refusal(written(tmp_path / name, text))
    assert f"{where} holds no prompt: it is empty" in found


def test_an_empty_prompt_on_the_command_line_is_an_error() -> None:
    for text in ("", " \n"):
        with pytest.raises(UnusableInput, match=r"--prompt(: must be a text, not| is) empty"):
            parse(["--prompt", text])


def test_a_shell_s_pipe_is_read_and_a_file_beyond_the_limit_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive, send = os.pipe()
    os.write(send, b"one\ntwo\n")
    os.close(send)
    assert read_prompts(Path(f"/dev/fd/{receive}")) == ["one", "two"]
    os.close(receive)
    monkeypatch.setattr(prompt_files, "MOST_BYTES", 10)
    assert "larger than" in refusal(written(tmp_path / "p.txt", "x" * 11))


def test_a_pipe_without_a_writer_and_a_device_end_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "no prompt" in refusal(tmp_path / "fifo")
    assert "device" in refusal(Path("/dev/zero"))


def test_a_missing_file_is_an_error_that_names_the_mend(tmp_path: Path) -> None:
    assert "bench_infer.py prompts --out" in refusal(tmp_path / "none.txt")


def test_a_directory_is_no_prompt_file(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    assert "UTF-8" in refusal(tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", ""),
        ("p.txt", " \n\t\n"),
        ("p.txt", "===== PROMPT 0 =====\n\n===== PROMPT 1 =====\n"),
        ("p.jsonl", "\n"),
        ("p.jsonl", '""\n'),
    ],
)
def test_a_file_without_a_prompt_is_refused(tmp_path: Path, name: str, text: str) -> None:
    assert "no prompt" in refusal(written(tmp_path / name, text))


def test_the_default_file_has_prompts() -> None:
    assert len(read_prompts(DEFAULT_FILE)) >= 1


LINES = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), min_size=1)


@given(st.lists(LINES.filter(str.strip), min_size=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_as_blocks_is_read_back(tmp_path: Path, texts: list[str]) -> None:
    headed = any(text.strip().startswith("=====") for text in texts)
    path = written(tmp_path / "p.txt", prompt_file(texts, 1))
    assert headed or read_prompts(path) == [text.strip() for text in texts]


# -- tokens


@pytest.mark.parametrize("maker", MAKERS)
def test_a_long_prompt_keeps_its_tail_and_the_special_tokens_in_front_counted_in(
    tmp_path: Path, maker: Callable[[Path], Tokenizer]
) -> None:
    tokenizer = maker(tmp_path)
    text = "the ocean of stars is wider than the page, " * 5
    ids = tokenizer.encode(text)
    row = keep_last(tokenizer, encode_prompt(tokenizer, text), 10)
    assert len(row) == 10
    assert row == [*tokenizer.prefix, *ids[len(tokenizer.prefix) - 10 :]]


def test_the_guides_prompt_of_2048_tokens_becomes_one_of_2016() -> None:
    """max_seq_len 2048 - max_new_tokens 32."""
    tokenizer = ByteTokenizer(config_of(300))
    row = keep_last(tokenizer, encode_prompt(tokenizer, "x" * 2048), 2048 - 32)
    assert len(row) == 2016


@settings(deadline=None)
@given(st.text(string.ascii_letters, max_size=40), st.integers(1, 50))
def test_a_row_is_never_longer_than_allowed_and_always_begins_with_bos(text: str, most: int) -> None:
    tokenizer = ByteTokenizer(config_of(300))
    row = keep_last(tokenizer, encode_prompt(tokenizer, text), most)
    assert len(row) == min(most, 1 + len(text))
    assert row[:1] == [256]
    assert bytes(row[1:]).decode() == text[len(text) - len(row) + 1 :]


def test_prompts_are_repeated_to_fill_the_batch() -> None:
    assert fill_batch([[1], [2], [3]], 7) == [[1], [2], [3], [1], [2], [3], [1]]
    assert fill_batch([[1], [2], [3]], 2) == [[1], [2]]


def test_a_batch_is_planned_before_its_rows_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(prompts: object, batch: int) -> list[list[int]]:
        raise AssertionError("rows were made for a batch that does not fit")

    monkeypatch.setattr("bench.run.prompts.fill_batch", never)
    flags = ["--device", "cpu", "--prompt-len", "4", "--batch-size", "400", "--cpu-mem-gb", "0.2"]
    assert main([*flags, "--cache-dir", str(tmp_path), "--out-json", str(tmp_path / "r.json")]) == 3
    assert "--batch-size" in capsys.readouterr().err


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 40))
def test_the_planned_shape_is_that_of_the_filled_batch(lengths: list[int], batch: int) -> None:
    _, options = parse(["--batch-size", str(batch)])
    assert isinstance(options, RunOptions)
    distinct = [[0] * length for length in lengths[:batch]]
    rows = fill_batch(distinct, batch)
    shape = shape_of(distinct, options)
    assert (shape.batch, shape.prompt_tokens) == (len(rows), max(map(len, rows)))
    assert shape.prefill_tokens == sum(map(len, rows))


def test_repeated_rows_are_copies() -> None:
    first, second = fill_batch([[1, 2]], 2)
    first.append(3)
    assert second == [1, 2]


# -- random ids


@pytest.mark.parametrize(
    ("vocab_size", "first", "below"), [(128_256, 256, 128_000), (300, 0, 256), (100, 0, 100), (1024, 0, 256)]
)
def test_random_ids_are_ordinary_tokens(vocab_size: int, first: int, below: int) -> None:
    rows = random_prompts(config_of(vocab_size), length=500, count=4, seed=0)
    assert [len(row) for row in rows] == [500] * 4
    assert first <= min(map(min, rows)) < first + 0.1 * below
    assert 0.9 * below < max(map(max, rows)) < below


@pytest.mark.parametrize("special", [range(3), range(17)], ids=["Llama 2", "SmolLM2"])
def test_random_ids_pass_over_special_tokens_numbered_from_0(special: range) -> None:
    [row] = random_prompts(config_of(1280), length=20_000, count=1, seed=0)
    assert not set(special) & set(row)


def test_random_ids_follow_the_seed() -> None:
    first, again, other = (random_prompts(config_of(300), 50, 2, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] != first[1]


# -- the generator


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 333])
def test_a_made_prompt_has_exactly_its_tokens_when_read_back_from_the_file(
    tmp_path: Path, maker: Callable[[Path], Tokenizer], tokens: int
) -> None:
    tokenizer = maker(tmp_path)
    texts = list(make_prompts(tokenizer, 5, tokens, seed=3))
    read = read_prompts(written(tmp_path / "p.txt", prompt_file(texts, tokens)))
    assert [len(tokenizer.encode(text)) for text in read] == [tokens] * 5
    whole = tokens + len(tokenizer.prefix)
    assert [len(encode_prompt(tokenizer, text)) for text in read] == [whole] * 5


@given(tokens=st.integers(1, 80), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_any_number_of_bytes_can_be_met_with_any_seed(tokens: int, seed: int) -> None:
    tokenizer = ByteTokenizer(config_of(300))
    [text] = make_prompts(tokenizer, 1, tokens, seed)
    assert len(tokenizer.encode(text)) == tokens
    assert text == text.strip()


def test_made_prompts_follow_the_seed_and_differ_from_each_other() -> None:
    tokenizer = ByteTokenizer(config_of(300))
    first, again, other = (list(make_prompts(tokenizer, 3, 100, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(set(first)) == 3


def test_a_long_prompt_is_made_with_few_encodings(tmp_path: Path) -> None:
    class Counting(HFTokenizer):
        encodings = 0

        def encode(self, text: str) -> list[int]:
            Counting.encodings += 1
            return super().encode(text)

    trained(tmp_path)
    list(make_prompts(Counting(tmp_path, config_of(900)), 8, 2048, seed=0))
    assert Counting.encodings < 8 * 30


def test_more_prompts_of_a_seed_begin_with_the_same_ones() -> None:
    tokenizer = ByteTokenizer(config_of(300))
    assert list(make_prompts(tokenizer, 4, 50, 0))[:2] == list(make_prompts(tokenizer, 2, 50, 0))


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_made_prompts_are_json_in_a_file_of_that_name(tmp_path: Path, name: str) -> None:
    assert main(["prompts", "--out", str(tmp_path / name), "--count", "3", "--tokens", "40"]) == 0
    assert [len(prompt.encode()) for prompt in read_prompts(tmp_path / name)] == [40] * 3


def test_the_verb_prompts_writes_a_file_that_a_run_can_read(tmp_path: Path) -> None:
    out = tmp_path / "p.txt"
    assert main(["prompts", "--out", str(out), "--count", "3", "--tokens", "40"]) == 0
    prompts = read_prompts(out)
    assert [len(prompt.encode()) for prompt in prompts] == [40] * 3
    assert out.read_text(encoding="utf-8").startswith("===== PROMPT 0000 | tokens=40 =====\n")
