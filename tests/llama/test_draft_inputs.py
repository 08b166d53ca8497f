"""A draft is opened and checked with everything else, before anything is loaded, and is in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench_infer import command_line
from llama.inputs import Inputs
from llama.loading import Reporter
from llama.opening import open_inputs
from llama.options import BuildOptions
from llama.parallel.world import World
from llama.plans import plan_run
from llama.sources import find_store
from tests.tiny import hf_directory, hf_model, hf_tokenizer
from wsm.errors import DoesNotFit, UnusableInput
from wsm.layout.model import Shard
from wsm.plan.advice import check_fits
from wsm.plan.inputs import RunShape
from wsm.plan.memory import MemoryKind
from wsm.plan.plan import Plan

SHAPE = RunShape(2, 100, 20, 200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The target, a smaller model of its vocabulary, one of another size, and one whose ids mean something else."""
    made = {}
    for name, changes in {
        "target": {},
        "draft": {"num_hidden_layers": 2},
        "large": {"vocab_size": 320},
        "odd": {},
    }.items():
        made[name] = hf_tokenizer(hf_directory(tmp_path_factory.mktemp(name), hf_model(**changes)))
    file = made["odd"] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    return made


def opened(folders: dict[str, Path], tmp_path: Path, draft: object, **more: Any) -> tuple[BuildOptions, Inputs]:
    options = BuildOptions(
        checkpoints=folders["target"], device="cpu", cache_dir=tmp_path, draft=str(draft), mode="stream", **more
    )
    return options, open_inputs(options)


def drafted(plan: Plan) -> int:
    return sum(line.nbytes for line in plan.gpu_lines if line.kind == MemoryKind.DRAFT)


def test_a_draft_of_the_same_vocabulary_is_opened_in_a_format_of_its_own(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options, inputs = opened(folders, tmp_path, folders["draft"], draft_depth=4, draft_weight_format="int4")
    assert inputs.draft is not None
    draft = inputs.draft.inputs
    assert draft is not None
    assert (draft.format_name, inputs.format_name) == ("int4", "float32")
    assert (draft.dtype, draft.device) == (inputs.dtype, inputs.device)
    assert draft.description is None
    find_store(options, inputs, SHAPE, Reporter())
    assert draft.description is not None, "packed into the cache, as the target's own format would be"
    assert inputs.description is None
    again = opened(folders, tmp_path, draft.description.path, draft_depth=4)[1].draft
    assert again is not None
    assert again.inputs is not None
    assert again.inputs.format_name == "int4"


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        ("large", "has a vocabulary of 320 tokens, .* one of 300"),
        ("odd", "its tokenizer gives other ids"),
        ("nowhere", "no such directory or file; nothing is downloaded here, name one on this machine$"),
        ("ngarm", "no such directory .*; did you mean ngram\\?$"),
        ("sythetic:Llama-3.2-1B", "no such directory .*; did you mean synthetic:Llama-3.2-1B\\?$"),
        ("synthetic:Llama-3.2-1B", "has a vocabulary of 128256 tokens"),
        ("synthetic:Llama-9", "'Llama-9' is no known model"),
    ],
)
def test_what_cannot_draft_is_one_sentence_that_names_it(
    draft: str, said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    name = str(folders.get(draft, draft))
    with pytest.raises(UnusableInput, match=said) as refused:
        opened(folders, tmp_path, name)
    assert str(refused.value).count("--draft") == 1
    assert str(refused.value).startswith(f"--draft {name}: ")
    assert "--checkpoints" not in str(refused.value)


@pytest.mark.parametrize(("draft", "why"), [(None, "without --draft"), ("ngram", "for ngram, which has no weights")])
def test_a_weight_format_of_no_draft_is_refused(draft: str | None, why: str, tmp_path: Path) -> None:
    options = BuildOptions(device="cpu", cache_dir=tmp_path, draft=draft, draft_weight_format="int4")
    with pytest.raises(UnusableInput, match=f"--draft-weight-format int4 {why}: name a draft"):
        open_inputs(options)


def test_a_level_wider_than_the_vocabulary_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="--draft-width 301 is more than the 300 tokens of the vocabulary"):
        opened(folders, tmp_path, folders["draft"], draft_width=301, verify_rows=400)
    assert opened(folders, tmp_path, folders["draft"], draft_width=300, verify_rows=400)[1].draft is not None


def test_a_draft_without_a_tokenizer_is_compared_by_size_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    bare = hf_directory(tmp_path / "bare", hf_model(num_hidden_layers=1))
    assert opened(folders, tmp_path, bare)[1].draft is not None


@pytest.mark.parametrize(("flags", "named"), [({"draft": "ngram"}, "--draft ngram"), ({}, "--verify-rows 4")])
def test_several_ranks_are_refused(flags: dict[str, str], named: str, tmp_path: Path) -> None:
    options = BuildOptions(device="cpu", cache_dir=tmp_path, verify_rows=4, **flags)  # type: ignore[arg-type]
    with pytest.raises(UnusableInput, match=f"{named} does not run on several ranks"):
        open_inputs(options, World(Shard(0, 2), Shard(0, 2)))
    assert not list(tmp_path.iterdir()), "before anything is made"


def test_a_draft_is_planned_with_its_kv_and_one_that_does_not_fit_is_said_before_it_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options, inputs = opened(folders, tmp_path, folders["draft"], draft_depth=8, verify_rows=24)
    plan = plan_run(options, inputs, SHAPE)
    assert plan.draft is not None
    assert plan.draft.kv_tokens == 256, "120 tokens, and the 49 nodes that a tree of 24 is chosen from"
    draft = inputs.draft.inputs if inputs.draft is not None else None
    assert draft is not None
    weights = sum(layout.nbytes for layout in draft.layouts.values())
    kv = 2 * 2 * 2 * 256 * 2 * 24 * 4  # layers, rows, KV heads, tokens, keys and values, head_dim, bytes
    assert drafted(plan) > weights + kv
    wide = plan_run(options, inputs, RunShape(4, 100, 20, 400))
    assert drafted(wide) >= drafted(plan) + kv
    without = plan_run(*opened_without(folders, tmp_path), SHAPE)
    assert plan.gpu_bytes - without.gpu_bytes == drafted(plan)
    tight = BuildOptions(**{**vars_of(options), "gpu_mem_gb": (without.gpu_bytes + drafted(plan) // 2) / 2**30})
    with pytest.raises(DoesNotFit, match="the run does not fit"):
        check_fits(plan_run(tight, inputs, SHAPE))


def opened_without(folders: dict[str, Path], tmp_path: Path) -> tuple[BuildOptions, Inputs]:
    options = BuildOptions(
        checkpoints=folders["target"], device="cpu", cache_dir=tmp_path, mode="stream", verify_rows=24
    )
    return options, open_inputs(options)


def vars_of(options: BuildOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


def test_the_table_of_ngram_is_planned_by_the_token(folders: dict[str, Path], tmp_path: Path) -> None:
    options, inputs = opened(folders, tmp_path, "ngram")
    plan = plan_run(options, inputs, SHAPE)
    assert plan.draft is None
    assert drafted(plan) == 2 * plan.inputs.kv_tokens * 48


def test_both_models_decode_in_one_scratch(folders: dict[str, Path], tmp_path: Path) -> None:
    options, inputs = opened(folders, tmp_path, folders["draft"], draft_weight_format="int8")
    plan = plan_run(options, inputs, SHAPE)
    assert plan.decoding.scratch_bytes == 0
    assert plan.draft is not None
    assert plan.scratch_bytes == plan.draft.scratch_bytes > 0


def test_the_command_line_refuses_before_it_loads(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--device", "cpu", "--checkpoints", str(folders["target"]), "--cache-dir", str(tmp_path), "--quiet"]
    assert command_line([*argv, "--prompt-len", "8", "--draft", str(folders["odd"])]) == 2
    assert "its tokenizer gives other ids" in capsys.readouterr().err
    assert command_line([*argv, "--prompt-len", "8", "--draft", "ngram", "--verify-rows", "1"]) == 2
    assert "has no room for a draft's tokens" in capsys.readouterr().err
