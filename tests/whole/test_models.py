"""Whole runs on checkpoints as people have them: the tokens of transformers, and what is said of the files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench_infer import command_line as main
from llama import LLaMA
from tests.tiny import hf_directory, hf_model, hf_tokenizer
from wsm.errors import UnusableInput

BEGIN = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)])
AROUND = TemplateProcessing(single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 256), ("</s>", 257)])
TEXTS = ["Hello world", "The sky is", "x", "naïve 模型"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_tokenizer(hf_directory(tmp_path_factory.mktemp("models") / "tiny", hf_model()))


def copy(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to / "copied"))


def run(directory: Path, out: Path, *more: str, mode: str = "full") -> int:
    flags = ["--max-new-tokens", "6", "--temperature", "0", "--no-probe", "--device", "cpu", "--warmup-rounds", "0"]
    return main(["--checkpoints", str(directory), "--mode", mode, *flags, "--out-json", str(out), *more])


def hash_of(rows: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.mark.parametrize(("processor", "around"), [(None, ([], [])), (BEGIN, ([256], [])), (AROUND, ([256], [257]))])
def test_a_hugging_face_model_continues_its_prompts_as_transformers_does(
    processor: Any, around: tuple[list[int], list[int]], home: Path, tmp_path: Path
) -> None:
    directory = copy(home, tmp_path)
    if processor is not None:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.post_processor = processor
        tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    assert run(directory, tmp_path / "r.json", "--prompts", str(prompts), "--batch-size", "4", "--ignore-eos") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["special_tokens"] == {"before": around[0], "after": around[1]}
    oracle, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = oracle.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        rows.append(made[0, ids.shape[1] :].tolist())
    assert found["output"]["sha256"] == hash_of(rows)
    with LLaMA.build(directory, "full", device="cpu", max_seq_len=64, max_batch_size=4) as llm:
        assert llm.generate(TEXTS, 6, temperature=0, ignore_eos=True).tokens == rows


def test_random_ids_need_no_tokenizer_and_have_nothing_put_around_them(home: Path, tmp_path: Path) -> None:
    directory = copy(home, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    assert run(directory, tmp_path / "r.json", "--prompt-len", "9") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["prompt_lens"] == [9]
    assert found["special_tokens"] == {"before": [], "after": []}
    with LLaMA.build(directory, "full", device="cpu", max_seq_len=64) as llm:
        [whole] = llm.generate([[1, 2, 3]], 6, temperature=0, ignore_eos=True).tokens
        assert llm.inputs.stop_ids == {257}  # by config.json
    for name in ("config.json", "generation_config.json"):
        change(directory / name, eos_token_id=whole[2])
    with LLaMA.build(directory, "full", device="cpu", max_seq_len=64) as llm:
        assert llm.generate([[1, 2, 3]], 6, temperature=0).tokens == [whole[: whole.index(whole[2]) + 1]]
        with pytest.raises(UnusableInput, match=r"neither tokenizer\.json"):
            llm.generate(["text"])


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_texts_that_no_tokenizer_can_show_are_refused_before_the_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy(home, tmp_path)
    (directory / "tokenizer.json").unlink()
    assert run(directory, tmp_path / "r.json", "--prompt-len", "9", "--print-text") == 2
    assert "neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_a_prompt_of_which_the_tokenizer_leaves_nothing_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy(home, tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = Replace("~", "")
    tokenizer.save(str(directory / "tokenizer.json"))
    assert run(directory, tmp_path / "r.json", "--prompt", "~~~") == 2
    assert "prompt 0 gives no token with the model's tokenizer" in capsys.readouterr().err


def test_a_token_without_an_embedding_warns_and_refuses_only_a_prompt_that_has_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy(home, tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert run(directory, tmp_path / "r.json", "--prompt", "no pad") == 0
    [warning] = [w for w in json.loads((tmp_path / "r.json").read_text())["warnings"] if "embedding" in w]
    assert "1 token beyond the 300 of the model's embedding" in warning
    assert run(directory, tmp_path / "other.json", "--prompt", "a <pad>") == 2
    assert "'<pad>' the id 300, for which the model has no embedding" in capsys.readouterr().err


def test_a_stored_head_of_a_tied_model_is_used_in_every_mode_and_the_result_says_so(tmp_path: Path) -> None:
    directory = hf_tokenizer(hf_directory(tmp_path / "tied", hf_model(tie_word_embeddings=True)))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([[1, 2, 3]])).logits
    for mode in ("full", "stream", "mixed"):
        config = {"cache_dir": tmp_path / "cache"}
        with LLaMA.build(directory, mode, config, device="cpu", max_seq_len=64) as llm:
            torch.testing.assert_close(llm.logits([[1, 2, 3]]), theirs, atol=1e-4, rtol=1e-4)
            assert "the stored head is used" in llm.warnings[0]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "another default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another default type": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("mode", ["mixed", "stream", "full"])
@pytest.mark.parametrize("setting", AMBIENT)
def test_what_a_caller_has_set_for_torch_changes_nothing(setting: str, mode: str, home: Path, tmp_path: Path) -> None:
    def logits() -> torch.Tensor:
        config = {"cache_dir": tmp_path / "cache", "gpu_cached_layers": 1, "cpu_cache_layers": 2}
        with LLaMA.build(home, mode, config, device="cpu", max_seq_len=64) as llm:
            llm.generate(["text"], 3)
            return llm.logits([[1, 2, 3]])

    plain = logits()
    with AMBIENT[setting]():
        found = logits()
    assert torch.equal(found, plain)
