"""Tokenizers from GGUF metadata: the ids of the tokenizers that they were made from, and what is refused."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama.chat import chat_template_of, encode_chats
from llama.checkpoint.gguf_vocabulary import Vocabulary
from llama.config import ModelConfig
from llama.opening import open_inputs
from llama.options import BuildOptions
from llama.splits import LLAMA3_SPLIT
from llama.tokenizer import Llama3Tokenizer, Tokenizer, _read_ranks, encode_prompt, load_tokenizer
from tests.gguf_files import CONFIG, bpe_fields, byte_signs, random_tensors, write_gguf
from tests.tiny import hf_tokenizer
from wsm.errors import UnusableInput

SOURCE = "\n".join(path.read_text() for path in sorted(Path(__file__).parents[2].glob("docs/*.md")))
SIGNS = (
    "abc de'll don't 0123 x²٣½ \t\n\r\n .,;:!?()[]{}<>@#$%-_=+/\\|éüß漢字かな한국Ωжשלםمرحبا😀👩‍👧\u00a0\u2003\u200b "
)
Encode = Callable[[str], list[int]]


def texts(count: int) -> list[str]:
    """Pieces of the docs, of odd signs, and of both."""
    generator, found = random.Random(0), []
    for number in range(count):
        at = generator.randrange(len(SOURCE) - 300)
        prose = SOURCE[at : at + generator.randrange(1, 300)]
        odd = "".join(generator.choice(SIGNS) for _ in range(generator.randrange(1, 80)))
        wild = "".join(chr(generator.choice([generator.randrange(32, 0x3000), 32, 10])) for _ in range(20))
        found.append((prose, odd, prose + odd, wild + odd)[number % 4])
    return found


def config_of(size: int) -> ModelConfig:
    return ModelConfig("m", 64, 1, 4, 2, 16, 128, size)


def of_fields(fields: dict[str, Any]) -> Tokenizer:
    vocabulary = Vocabulary.from_metadata(fields, Path("m.gguf"))
    assert vocabulary is not None
    return load_tokenizer(Path("nowhere"), config_of(len(fields["tokenizer.ggml.tokens"])), vocabulary)


# -- BPE


def test_smollm_ids_are_those_of_the_tokenizer_it_was_made_from() -> None:
    model = tokenizers.Tokenizer(models.BPE())
    # As tokenizer.json of SmolLM2 has it.
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|im_start|>"], show_progress=False
    )
    model.train_from_iterator(SOURCE.splitlines(keepends=True), trainer)
    by_id = {number: token for token, number in model.get_vocab().items()}
    merges = [" ".join(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [by_id[number] for number in range(len(by_id))],
        "token_type": [3, *[1] * (len(by_id) - 1)],
        "merges": merges,
    }
    ours = of_fields({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    assert (ours.prefix, ours.suffix) == ((), ())
    for text in [*texts(1000), "a<|im_start|>b", ""]:
        assert ours.encode(text) == model.encode(text).ids
        assert ours.decode(ours.encode(text)) == text.replace("<|im_start|>", "")


def merges_of(ranks: dict[bytes, int]) -> list[str]:
    """The pair behind each token, as llama.cpp's converter finds it."""
    signs = byte_signs()

    def spelled(token: bytes) -> str:
        return "".join(signs[byte] for byte in token)

    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            found.append(f"{spelled(parts[0])} {spelled(parts[1])}")
    return found


def test_llama_bpe_ids_are_those_of_llama_3s_own_tokenizer(tmp_path: Path) -> None:
    path, signs = tmp_path / "tokenizer.model", byte_signs()
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=signs, show_progress=False)
    model.train_from_iterator(SOURCE.splitlines(keepends=True), trainer)
    trained = sorted(model.get_vocab().items(), key=lambda item: item[1])
    spelled = [bytes(signs.index(sign) for sign in token) for token, _ in trained]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(spelled)))
    theirs, ranks = Llama3Tokenizer(path, config_of(len(spelled) + 256)), _read_ranks(path)
    tokens = ["".join(signs[byte] for byte in token) for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    names = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 8: "<|eom_id|>", 9: "<|eot_id|>"}
    special = [names.get(number, f"<|reserved_{number}|>") for number in range(256)]
    fields = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": [*tokens, *special],
        "token_type": [1] * len(tokens) + [3] * 256,
        "merges": merges_of(ranks),
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }
    ours = of_fields({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    assert (ours.prefix, ours.suffix, ours.stop_ids) == (theirs.prefix, theirs.suffix, theirs.stop_ids)
    for text in texts(1000):
        assert ours.encode(text) == theirs.encode(text)
        assert encode_prompt(ours, text) == encode_prompt(theirs, text)
        assert ours.decode(ours.encode(text)) == text


# -- SentencePiece


def spm_fields(**more: Any) -> dict[str, Any]:
    """Characters and pieces of the docs, and byte tokens, as a LLaMA 2 vocabulary is laid out."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=900, limit_alphabet=90, show_progress=False)
    model.train_from_iterator(SOURCE.splitlines(), trainer)
    pieces = sorted(model.get_vocab().items(), key=lambda item: (len(item[0]) == 1, item[1]))
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(piece for piece, _ in pieces),
        "<own>",
    ]
    named = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(number) for number in range(len(pieces))] + [0.0],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in named.items()}


def joined_by_score(text: str, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[int]:
    """SentencePiece's rule, a step a time: of all neighbours that make a token join those of the best score."""
    ids = {token: number for number, token in enumerate(tokens) if types[number] in (1, 4, 5)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        best = max(
            ((scores[ids[a + b]], -at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids),
            default=None,
        )
        if best is None:
            break
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [n for part in parts for n in ([ids[part]] if part in ids else [byte + 3 for byte in part.encode()])]


def test_sentencepiece_joins_by_scores_and_falls_back_to_bytes() -> None:
    fields = spm_fields()
    ours = of_fields(fields)
    assert (ours.prefix, ours.suffix, ours.stop_ids) == ((1,), (), frozenset({2}))
    named = [fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")]
    for text in texts(300):
        assert ours.encode(text) == joined_by_score(text, *named), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("") == []


def test_special_and_own_tokens_are_recognised_in_a_text() -> None:
    ours, fields = of_fields(spm_fields()), spm_fields()
    own = fields["tokenizer.ggml.tokens"].index("<own>")
    assert 2 in ours.encode("a</s>b")
    assert own in ours.encode("a<own>b")
    assert "</s>" not in ours.decode(ours.encode("a</s>b"))
    assert "<own>" in ours.decode(ours.encode("a<own>b"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_flags_say_what_belongs_around_a_text(kind: str) -> None:
    make = (lambda **more: bpe_fields(300, **more)) if kind == "gpt2" else spm_fields
    for begin in (True, False):
        for end in (True, False):
            ours = of_fields(make(add_bos_token=begin, add_eos_token=end))
            assert (len(ours.prefix), len(ours.suffix)) == (begin, end)
            assert encode_prompt(ours, "ab") == [*ours.prefix, *ours.encode("ab"), *ours.suffix]


def test_without_a_space_in_front_the_first_word_is_not_given_one() -> None:
    ours = of_fields(spm_fields(add_space_prefix=False))
    assert ours.decode(ours.encode(" a")) == " a"
    assert ours.encode("a") != of_fields(spm_fields()).encode("a")


# -- beside a model


def test_a_tokenizer_json_beside_the_file_wins_and_the_template_is_the_files(tmp_path: Path) -> None:
    fields = {**bpe_fields(CONFIG.vocab_size), "tokenizer.chat_template": "{{ messages }}"}
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields=fields)

    def opened() -> Any:
        return open_inputs(BuildOptions(checkpoints=path, device="cpu", cache_dir=tmp_path))

    own = opened()
    assert own.checkpoint.chat_template == "{{ messages }}"
    assert own.checkpoint.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert own.stop_ids == own.tokenizer.stop_ids == {258}
    assert own.tokenizer.prefix == (257,)
    hf_tokenizer(tmp_path, CONFIG.vocab_size)
    assert opened().tokenizer.prefix == ()
    (tmp_path / "tokenizer_config.json").unlink()  # tokenizer.json alone names no end of a text: the weights' file does
    assert opened().tokenizer.stop_ids == frozenset()
    assert opened().stop_ids == {258}


def test_a_chat_is_rendered_with_the_file_s_own_template_and_tokens(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    fields = {**bpe_fields(CONFIG.vocab_size), "tokenizer.chat_template": template}
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields=fields)
    inputs = open_inputs(BuildOptions(checkpoints=path, device="cpu", cache_dir=tmp_path))
    chat = [{"role": "user", "content": "ab"}]
    (ids,) = encode_chats(inputs.tokenizer, chat_template_of(inputs.checkpoint), [chat])
    assert ids == [257, *inputs.tokenizer.encode("ab"), 258]


def test_a_tokenizer_not_read_here_stops_nobody_who_needs_none(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields=bpe_fields(CONFIG.vocab_size, pre="qwen2"))
    inputs = open_inputs(BuildOptions(checkpoints=path, device="cpu", cache_dir=tmp_path))
    assert inputs.stop_ids == frozenset({258})
    with pytest.raises(
        UnusableInput, match="a pre-tokenizer 'qwen2', which is not read here; llama-bpe and smollm are"
    ):
        _ = inputs.tokenizer


def test_a_file_that_says_it_has_no_vocabulary_has_none(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, fields={"tokenizer.ggml.model": "no_vocab"})
    inputs = open_inputs(BuildOptions(checkpoints=path, device="cpu", cache_dir=tmp_path))
    assert inputs.stop_ids == frozenset()
    with pytest.raises(UnusableInput, match="copy the model's tokenizer there"):
        _ = inputs.tokenizer


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": "bert"}, "a tokenizer of model 'bert', which is not read here"),
    "a token twice": ({"tokens": ["a", "b", "a"]}, "a token that comes twice"),
    "tokens that are numbers": ({"tokens": [1, 2, 3]}, "no list of str as tokenizer.ggml.tokens"),
    "too few types": ({"token_type": [1, 1]}, "2 of tokenizer.ggml.token_type for 300 tokens"),
    "no merges": ({"merges": None}, "no list of str as tokenizer.ggml.merges"),
    "a merge of three": ({"merges": ["a b c"]}, "a merge that is no pair of tokens: 'a b c'"),
    "a merge of no tokens": ({"merges": ["\u0120 \u0120", "zz yy"]}, "its vocabulary contradicts itself"),
    "an id beyond all tokens": ({"eos_token_id": 300}, "300 as tokenizer.ggml.eos_token_id, which is no token's id"),
    "no BOS to put in front": ({"bos_token_id": None}, "puts BOS around a text, and no id of it"),
    "no EOS to put behind": ({"eos_token_id": None, "add_eos_token": True}, "puts EOS around a text, and no id of it"),
    "a flag that is a number": ({"add_bos_token": 1}, "1 as tokenizer.ggml.add_bos_token, not true or false"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_vocabulary_that_contradicts_itself_is_refused(what: str) -> None:
    changed, said = DAMAGE[what]
    fields = {**bpe_fields(300), **{f"tokenizer.ggml.{key}": value for key, value in changed.items()}}
    with pytest.raises(UnusableInput) as caught:
        of_fields(fields)
    assert said in str(caught.value)


def test_scores_are_needed_where_they_say_what_is_joined() -> None:
    with pytest.raises(UnusableInput, match=r"no list of float as tokenizer.ggml.scores"):
        of_fields(spm_fields(scores=None))
    with pytest.raises(UnusableInput, match="removes spaces"):
        of_fields(spm_fields(remove_extra_whitespaces=True))


def test_sentencepiece_names_bos_and_eos_by_their_places_where_the_file_does_not() -> None:
    fields = spm_fields()
    del fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    ours = of_fields(fields)
    assert (ours.prefix, ours.stop_ids) == ((1,), frozenset({2}))


def test_endless_pieces_are_refused_before_any_is_cut() -> None:
    fields = spm_fields()
    fields["tokenizer.ggml.tokens"][300] = "\u2581" * (4 << 20)
    with pytest.raises(UnusableInput, match="a token of more than 512 characters"):
        of_fields(fields)


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused() -> None:
    vocabulary = Vocabulary.from_metadata(bpe_fields(300), Path("m.gguf"))
    with pytest.raises(UnusableInput, match="has 300 tokens, but the model's vocabulary has 9000"):
        load_tokenizer(Path("nowhere"), config_of(9000), vocabulary)
