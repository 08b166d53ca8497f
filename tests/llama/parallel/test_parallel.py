"""Several ranks over gloo: the same answers as one, and one sentence, within seconds, when a rank fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.inputs import read_manifest
from llama.parallel.world import ALONE
from tests.parallel_models import N_LAYERS, PLACES, PROMPTS, make_models
from tests.ranks import answer, answers, free_port, impatient_script, script, started
from tests.stores import flip
from wsm.layout.groups import GroupId

ROOT = Path(__file__).resolve().parents[3]
MODES = ("full", "preload", "stream", "mixed")
FLAGS = ["--device", "cpu", "--no-probe", "--temperature", "0", "--ignore-eos", "--prompt-len", "8"]
PLACE_FLAGS = ["--gpu-cached-layers", "1", "--cpu-cache-layers", "2", "--prefetch-distance", "1"]
LONG = ["--mode", "stream", "--max-new-tokens", "1800", "--warmup-rounds", "0"]
"""Minutes of decode, for tests that end it."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, saved, and the answers of one rank, of two and of four."""
    home = tmp_path_factory.mktemp("parallel")
    models = make_models(home)
    (home / "answers").mkdir()
    for size in (2, 4):
        arguments = (models, home / "cache", home / "answers", size)
        with started(home / f"said{size}", size, answers, lambda rank, given=arguments: given) as ranks:
            assert ranks.codes(120) == [0] * size, (home / f"said{size}" / "err0").read_text()
    return home


@pytest.fixture(scope="module")
def one(home: Path) -> dict[str, Any]:
    """A single process's answers, by model and mode."""
    config = {**PLACES, "cache_dir": home / "cache"}
    return {
        f"{name} {mode}": answer(home / name, mode, config, ALONE, PROMPTS)
        for name in ("smollm2", "llama31")
        for mode in MODES
    }


def of_rank(home: Path, size: int, rank: int) -> dict[str, Any]:
    return dict(torch.load(home / "answers" / f"answers-{size}-{rank}.pt"))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["smollm2", "llama31"])
def test_ranks_give_the_tokens_of_one_process_and_its_logits_to_1e_4(
    model: str, mode: str, size: int, home: Path, one: dict[str, Any]
) -> None:
    expected, found = one[f"{model} {mode}"], of_rank(home, size, 0)[f"{model} {mode}"]
    assert found["tokens"] == expected["tokens"]
    assert (found["logits"] - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_the_same_bits_and_samples_the_same_tokens(size: int, home: Path) -> None:
    first = of_rank(home, size, 0)
    for rank in range(1, size):
        for name, found in of_rank(home, size, rank).items():
            assert torch.equal(found["logits"], first[name]["logits"])
            assert found["sampled"] == first[name]["sampled"]


@pytest.mark.parametrize("size", [2, 4])
def test_on_ranks_too_the_modes_are_bit_equal(size: int, home: Path) -> None:
    found = of_rank(home, size, 0)
    for model in ("smollm2", "llama31"):
        for mode in MODES:
            assert torch.equal(found[f"{model} {mode}"]["logits"], found[f"{model} full"]["logits"])


@pytest.mark.parametrize("size", [2, 4])
def test_page_locked_memory_and_kv_of_all_ranks_are_one_copy(size: int, home: Path, one: dict[str, Any]) -> None:
    for name, expected in one.items():
        ranks = [of_rank(home, size, rank)[name] for rank in range(size)]
        assert sum(rank["kv"] for rank in ranks) == expected["kv"]
        # Each rank pads its images to 4096 bytes, and has the norms whole.
        assert 0 <= sum(rank["page_locked"] for rank in ranks) - expected["page_locked"] <= 16 * 4096 * size


def test_the_result_is_rank_0s_and_has_every_rank(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    flags = [
        *(word for word in FLAGS if word != "--no-probe"),
        *PLACE_FLAGS,
        "--mode",
        "mixed",
        "--max-new-tokens",
        "4",
    ]
    argv = [
        "--checkpoints",
        home / "llama31",
        "--cache-dir",
        home / "cache",
        "--out-json",
        out,
        *flags,
        "--repeats",
        "2",
    ]
    with started(tmp_path / "said", 2, script, lambda rank: [*map(str, argv), "--tp", "2"]) as ranks:
        assert ranks.codes(90) == [0, 0], ranks.said(0)
    assert ranks.out(1) == ""
    result = json.loads(out.read_text())
    import jsonschema

    from bench.cli.docs import result_schema

    jsonschema.validate(result, result_schema())
    parallel = result["parallel"]
    assert parallel["world_size"] == 2
    for name, phase in parallel["phases"].items():
        own = [rank["phases"][name] for rank in parallel["ranks"]]
        assert phase["bytes"]["weight_h2d"] == sum(part["bytes"]["weight_h2d"] for part in own)
        assert phase["floor_ms"] == max(part["floor_ms"] for part in own) == result["phases"][name]["floor_ms"]
        assert phase["collectives_ms"] == min(part["collectives_ms"] for part in own) > 0
        # After every wo and w2, the embedding's sum and the logits' gathering, once a pass.
        passes = result["phases"][name]["passes"]
        assert phase["collectives"] == passes * (2 * N_LAYERS + 2)
    assert list(parallel["cpu_page_locked_bytes"].values()) == [
        sum(rank["cpu_page_locked_bytes"] for rank in parallel["ranks"])
    ]
    assert result["config"]["resolved"]["tp"] == 2


# -- a rank fails


def run_ranks(
    home: Path,
    tmp_path: Path,
    size: int,
    *flags: str,
    own: dict[int, list[str]] | None = None,
    work: Callable[..., int] = script,
) -> Any:
    """The script on the model of Llama 3.1's shape; ``own``: flags of some ranks."""
    places = ["--checkpoints", f"{home}/llama31", "--cache-dir", f"{home}/cache", "--out-json", f"{tmp_path}/r.json"]
    argv = [*places, *FLAGS, *PLACE_FLAGS, *flags]
    return started(tmp_path / "said", size, work, lambda rank: [*argv, *(own or {}).get(rank, [])])


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_in_decode_ends_the_others_with_a_sentence_that_names_it(
    blow: signal.Signals, home: Path, tmp_path: Path
) -> None:
    """SIGSTOP leaves its sockets open: only its silence tells."""
    with run_ranks(home, tmp_path, 4 if blow == signal.SIGKILL else 2, *LONG, work=impatient_script) as ranks:
        ranks.wait_for("Weight streaming enabled")
        time.sleep(1)
        began = time.monotonic()
        os.kill(ranks.processes[1].pid or 0, blow)
        survivors = [rank for rank in range(len(ranks.processes)) if rank != 1]
        for rank in survivors:
            ranks.processes[rank].join(timeout=30)
        assert time.monotonic() - began < 30
        for rank in survivors:
            assert ranks.processes[rank].exitcode == 1
            assert [word for word in ranks.said(rank) if word.startswith("rank 1 on ")] == ranks.said(rank) != []
    assert not (tmp_path / "r.json").exists()


def test_a_damaged_part_of_the_store_ends_every_rank_as_the_one_that_read_it(home: Path, tmp_path: Path) -> None:
    pack = ["pack", "--checkpoints", f"{home}/llama31", "--tp", "2", "--to", f"{tmp_path}/s.wsm"]
    assert script(*pack, "--manifest", f"{tmp_path}/s.json") == 0
    part = read_manifest(tmp_path / "s.json", rank=1).groups[GroupId(2, "ffn")]
    flip(tmp_path / "s.wsm", part.extents[0].offset + 50_000)
    with run_ranks(home, tmp_path, 2, "--mode", "mixed", "--manifest", f"{tmp_path}/s.json") as ranks:
        assert ranks.codes(40) == [4, 4]
        assert all("L2.ffn of rank 1" in ranks.said(rank)[0] for rank in (0, 1))
        assert ranks.said(0)[0].startswith("rank 1 on ")


@pytest.mark.parametrize(
    ("own", "named"),
    [
        (["--gpu-cached-layers", "2"], "--gpu-cached-layers 2"),
        (["--seed", "7"], "--seed 7"),
        (["--prompt-len", "9"], "prompts"),
    ],
)
def test_a_rank_with_another_setting_is_named_once_with_it(
    own: list[str], named: str, home: Path, tmp_path: Path
) -> None:
    with run_ranks(home, tmp_path, 2, own={1: own}) as ranks:
        assert ranks.codes(40) == [2, 2]
        [said] = [*ranks.said(0), *ranks.said(1)]
    assert said.startswith("rank 1 on ")
    assert named in said


def test_a_rank_with_another_store_is_named(home: Path, tmp_path: Path) -> None:
    for name in ("smollm2", "llama31"):
        pack = ["pack", "--checkpoints", f"{home}/{name}", "--tp", "2", "--to", f"{tmp_path}/{name}.wsm"]
        assert script(*pack, "--manifest", f"{tmp_path}/{name}.json") == 0
    places = ["--cache-dir", f"{home}/cache", "--out-json", f"{tmp_path}/r.json", *FLAGS, *PLACE_FLAGS]

    def argv(rank: int) -> list[str]:
        name = ("llama31", "smollm2")[rank]
        return [*places, "--checkpoints", f"{home}/{name}", "--manifest", f"{tmp_path}/{name}.json"]

    with started(tmp_path / "said", 2, script, argv) as ranks:
        assert ranks.codes(40) == [2, 2]
        [said] = [*ranks.said(0), *ranks.said(1)]
    assert said.startswith("rank 1 on ")


def test_an_error_in_the_command_is_said_once(home: Path, tmp_path: Path) -> None:
    with run_ranks(home, tmp_path, 3) as ranks:
        assert ranks.codes(40) == [2, 2, 2]
        [said] = [sentence for rank in range(3) for sentence in ranks.said(rank)]
    assert "cannot be cut for 3 ranks" in said
    assert "--nproc-per-node 1 or 2 or 4" in said


def test_ctrl_c_on_all_ranks_ends_all_with_130(home: Path, tmp_path: Path) -> None:
    with run_ranks(home, tmp_path, 2, *LONG) as ranks:
        ranks.wait_for("Weight streaming enabled")
        time.sleep(0.5)
        for process in ranks.processes:
            os.kill(process.pid or 0, signal.SIGINT)
        assert ranks.codes(30) == [130, 130]
        [said] = [*ranks.said(0), *ranks.said(1)]
    assert said.endswith("interrupted; nothing half-written was left")


def test_ctrl_c_between_rounds_keeps_those_that_are_done(home: Path, tmp_path: Path) -> None:
    flags = ("--mode", "full", "--max-new-tokens", "2", "--repeats", "100000", "--trace", f"{tmp_path}/t.json")
    with run_ranks(home, tmp_path, 2, *flags) as ranks:
        ranks.wait_for("[MODE-DECISION]")
        time.sleep(4)
        for process in ranks.processes:
            os.kill(process.pid or 0, signal.SIGINT)
        assert ranks.codes(40) == [130, 130], ranks.said(0)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["interrupted"]
    assert result["repeats"]["n"] >= 1


# -- the number of ranks


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A rank's end ignores signals for good, which a test's own process must not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_tp_that_is_not_the_number_of_ranks_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("--tp", "2", "--mode", "full") == 2
    assert "torchrun --nproc-per-node 2 bench_infer.py --tp 2 --mode full" in capsys.readouterr().err
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert script("--tp", "4") == 2
    assert "torchrun --nproc-per-node 4 bench_infer.py --tp 4" in capsys.readouterr().err
    assert script("pack", "--to", "x", "--manifest", "y") == 2
    assert "pack takes one process, not 2 ranks" in capsys.readouterr().err


def test_a_store_of_another_number_of_ranks_is_refused_with_the_pack_command(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--checkpoints", f"{home}/llama31"]
    store = ["--manifest", f"{tmp_path}/s.json"]
    assert script("pack", *model, "--tp", "4", "--to", f"{tmp_path}/s.wsm", *store) == 0
    assert script(*model, *store, *FLAGS, "--mode", "mixed") == 2
    said = capsys.readouterr().err
    assert "is packed for 4 ranks, this run has 1" in said
    assert f"bench_infer.py pack --checkpoints {home}/llama31 --tp 1 --to TARGET --manifest FILE" in said


def test_plan_says_what_a_rank_takes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--synthetic", "Llama-3.1-70B", "--mode", "stream", "--device", "cpu", "--prompt-len", "8"]
    script(*argv, "--tp", "4")
    assert "80 layers of 427.9 MB" in capsys.readouterr().out


def test_one_process_imports_no_fairscale(home: Path, tmp_path: Path) -> None:
    flags = ["--checkpoints", f"{home}/llama31", *FLAGS, *PLACE_FLAGS, "--mode", "stream", "--max-new-tokens", "2"]
    argv = [*flags, "--cache-dir", f"{home}/cache", "--out-json", f"{tmp_path}/r.json"]
    program = (
        "import sys; from bench_infer import command_line as main; code = main(sys.argv[1:]); "
        "print([name for name in ('fairscale', 'llama.parallel.ranks') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert json.loads((tmp_path / "r.json").read_text())["parallel"] is None


def test_two_agents_of_torchrun_are_two_hosts(home: Path, tmp_path: Path) -> None:
    """As on two machines: each agent starts its own rank, and they meet at the first one's address."""
    port = str(free_port())
    flags = ["--checkpoints", f"{home}/llama31", *FLAGS, *PLACE_FLAGS, "--mode", "mixed", "--max-new-tokens", "12"]
    places = ["--cache-dir", f"{home}/cache", "--out-json", f"{tmp_path}/r.json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meet = ["--master-addr", "127.0.0.1", "--master-port", port]
    agents = [
        subprocess.Popen(
            [*torchrun, *meet, "--node-rank", str(node), str(ROOT / "bench_infer.py"), *flags, *places],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]
    said = [agent.communicate(timeout=110) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "Benchmark Summary" in said[0][0]
    assert said[1][0] == ""
    parallel = json.loads((tmp_path / "r.json").read_text())["parallel"]
    assert parallel["world_size"] == 2


def test_a_rank_that_finds_no_store_names_the_one_that_should_keep_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llama.parallel.ranks.START_S", 0.3)
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    assert script("--mode", "full") == 1
    said = capsys.readouterr().err
    assert said.startswith("bench_infer.py: rank 0 on 127.0.0.1: did not start within 0.3 s")


def test_a_missing_rank_is_named_by_those_that_came(home: Path, tmp_path: Path) -> None:
    argv = ["--checkpoints", f"{home}/llama31", *FLAGS, "--out-json", f"{tmp_path}/r.json"]
    with started(tmp_path / "said", 2, impatient_script, lambda rank: argv, only=[0]) as ranks:
        assert ranks.codes(20) == [1]
        [said] = ranks.said(0)
    assert said.startswith("rank 1 on a host that was not heard of: did not start within")
