"""With any draft, in every mode, a run gives the tokens of the run without it; and the link goes on while it drafts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench.run import measure
from bench_infer import command_line
from llama.drafting import Drafting
from llama.generation import Generation
from llama.llm import LLaMA
from llama.loading import Reporter
from llama.nodes.tree import Tree
from llama.opening import open_inputs
from llama.options import build_options
from llama.plans import plan_run
from llama.sources import find_store
from llama.speculation.model_draft import ModelDraft
from llama.speculation.record import Counts
from tests.tiny import hf_directory, hf_model
from wsm.engine.stretch import PhaseStats
from wsm.errors import UnusableInput
from wsm.plan.inputs import RunShape

PROMPTS = [list(range(5, 255)), [7, 8, 9] * 5, [3, 4]]
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "cpu_cache_layers": 2, "prefetch_distance": 2, "warmup_layers": 1}
ROWS, NEW = 17, 8
DRAFTS: dict[str, dict[str, Any]] = {
    "ngram": {"draft": "ngram"},
    "int4 chain": {"draft_weight_format": "int4", "draft_depth": 4, "draft_width": 1},
    "int8 chain": {"draft_weight_format": "int8", "draft_depth": 16},
    "int8 tree": {"draft_weight_format": "int8", "draft_depth": 3, "draft_width": 3},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("model"), hf_model(num_hidden_layers=3))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def built(directory: Path, cache: Path, mode: str, **config: Any) -> LLaMA:
    config = {"cache_dir": cache, **PLACES, "verify_rows": ROWS, **config}
    if config.get("draft_weight_format"):
        config["draft"] = str(directory)
    return LLaMA.build(directory, mode=mode, mode_config=config, device="cpu", max_seq_len=300, max_batch_size=3)


def generation(llm: LLaMA, temperature: float, prompts: list[list[int]] = PROMPTS) -> Generation:
    return llm.generate(prompts, max_new_tokens=NEW, temperature=temperature, seed=3, ignore_eos=True)


def tokens(llm: LLaMA, temperature: float, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return generation(llm, temperature, prompts).tokens


@pytest.fixture(scope="module")
def plain(directory: Path, cache: Path) -> dict[float, list[list[int]]]:
    with built(directory, cache, "full") as llm:
        return {temperature: tokens(llm, temperature) for temperature in (0.0, 0.8)}


@pytest.mark.parametrize(
    ("mode", "names"),
    [("mixed", ["int8 tree"]), ("stream", [*DRAFTS]), ("preload", ["int4 chain"]), ("full", ["ngram", "int8 tree"])],
)
def test_no_draft_changes_a_token_in_any_mode(
    mode: str, names: list[str], directory: Path, cache: Path, plain: dict[float, list[list[int]]]
) -> None:
    for name in names:
        with built(directory, cache, mode, **DRAFTS[name]) as llm:
            assert tokens(llm, 0.8) == plain[0.8], name
            assert tokens(llm, 0.8, PROMPTS[:1]) == plain[0.8][:1], name
            found = generation(llm, 0.0)
            assert found.tokens == plain[0.0], name
            counts = Counts.of(found.decode_passes, found.accepted)
            assert sum(n * times for n, times in counts.tokens.items()) == len(PROMPTS) * (NEW - 1)
            if name.startswith("int8"):  # the model itself, but for what 8 bits lose
                assert (counts.tokens_a_pass or 0) > 1.3


def test_what_a_draft_decodes_is_drafting_and_no_decoding_of_the_model(directory: Path, cache: Path) -> None:
    config = {"cache_dir": cache, "draft": str(directory), "draft_weight_format": "int8", "draft_depth": 2}
    options, shape = build_options(config, mode="full", device="cpu", checkpoints=directory), RunShape(1, 8, NEW, 8)
    inputs = open_inputs(options)
    find_store(options, inputs, shape, Reporter())
    with LLaMA.assemble(inputs, plan_run(options, inputs, shape), Reporter()) as llm:
        generation(llm, 0.0, [[1, 2, 3]])
        assert llm.telemetry.drafts()
        assert not llm.telemetry.decodings()


def test_a_row_longer_than_the_draft_has_room_for_is_refused_and_the_longest_is_not(
    directory: Path, cache: Path
) -> None:
    """A tree of 37 grown nodes takes more columns of the draft's KV than the 17 verified ones of the model's."""
    with built(directory, cache, "full", draft=str(directory), draft_depth=6) as llm:
        assert llm.drafting is not None
        room = 512 - 36
        assert (llm.kv.tokens, llm.drafting.draft.room) == (512, room)
        (longest,) = tokens(llm, 0.0, [[5] * (room - NEW)])
        assert len(longest) == NEW
        with pytest.raises(UnusableInput, match=f"more than the {room} that the KV cache holds"):
            tokens(llm, 0.0, [[5] * (room - NEW + 1)])


def test_a_chain_of_the_model_itself_is_accepted_whole(directory: Path, cache: Path) -> None:
    own = {"draft": str(directory), "draft_depth": 4, "verify_rows": None}
    with built(directory, cache, "stream", **own) as llm:
        assert llm.drafting is not None
        assert (llm.drafting.speculation.nodes, llm.drafting.speculation.width) == (5, 1)
        assert generation(llm, 0.0, PROMPTS[1:2]).accepted == [[5, 2]]


def test_a_depth_of_auto_is_settled_by_a_warm_up_and_changes_no_token(
    directory: Path, cache: Path, plain: dict[float, list[list[int]]]
) -> None:
    with built(directory, cache, "stream", draft=str(directory)) as llm:
        assert llm.drafting is not None
        assert (llm.drafting.speculation.depth, llm.drafting.speculation.auto) == (8, True)
        assert tokens(llm, 0.8) == plain[0.8]
        free: dict[str, Any] = {"bytes_moved": {"weight_h2d": 0}, "busy_ms": {"h2d": None}, "stall_ms": {"h2d": None}}
        for drafting_ms, depth in ((0.001, ROWS - 1), (1e6, 1)):
            warm = PhaseStats(passes=1, wall_ms=100.0, bytes={}, idle_ms={}, drafting_ms=drafting_ms, **free)
            llm.drafting.settle(llm.plan, warm)
            assert (llm.drafting.speculation.depth, llm.drafting.draft.depth) == (depth, depth)
            assert tokens(llm, 0.8) == plain[0.8]


def test_a_depth_of_auto_is_settled_once_behind_the_last_warm_up(
    directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, run_round = list[str](), measure.run_round

    def counted(*args: Any, **more: Any) -> measure.Round:
        rounds.append("round")
        return run_round(*args, **more)

    monkeypatch.setattr(measure, "run_round", counted)
    monkeypatch.setattr(Drafting, "settle", lambda self, plan, decode: rounds.append("settled"))
    argv = ["--device", "cpu", "--mode", "full", "--checkpoints", str(directory), "--cache-dir", str(cache), "--quiet"]
    argv += ["--draft", str(directory), "--verify-rows", "3", "--prompt-len", "8", "--max-new-tokens", "3"]
    argv += ["--no-probe", "--warmup-rounds", "2", "--out-json", str(cache / "settled.json")]
    assert command_line(argv) == 0
    assert rounds == ["round", "round", "settled", "round"]


@pytest.mark.parametrize("mode", ["mixed", "stream"])
def test_slots_are_filled_for_the_next_pass_while_the_draft_computes(
    mode: str, directory: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow, filled = ModelDraft.propose, list[list[bool]]()

    def slowly(self: ModelDraft, roots: Tensor, starts: Tensor) -> Tree:
        assert llm.manager is not None
        slots = [slot for pool in llm.manager.memory.gpu_pools.values() for slot in pool.slots]
        until = time.monotonic() + 10
        while not all(slot.state == "ready" for slot in slots) and time.monotonic() < until:
            time.sleep(0.001)
        filled.append([slot.state == "ready" for slot in slots])
        return grow(self, roots, starts)

    monkeypatch.setattr(ModelDraft, "propose", slowly)
    with built(directory, cache, mode, draft=str(directory), draft_depth=2, group_prefetch_depth=2) as llm:
        llm.generate(PROMPTS[2:3], max_new_tokens=8, temperature=0.0, ignore_eos=True)
    assert len(filled) > 1
    assert all(map(all, filled))
