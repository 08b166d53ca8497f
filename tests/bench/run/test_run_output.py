"""What a run and a plan print for people and pipes: rows, warnings, the choice to keep, what a flag would buy."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from bench.options.program import called
from bench.options.verb_flags import LISTED
from bench.result.summary import row, summary
from bench.result.types_machine import KV
from bench.run import measure
from bench.run.ceilings import recall_for, recall_near, remember
from bench.run.warnings import blocks_left_out, early_ends
from bench_infer import command_line as main
from llama.inputs import Inputs
from llama.opening import open_inputs
from llama.options import BuildOptions
from llama.tokenizer import ByteTokenizer
from tests.results import typed, varied
from tests.tiny import hf_directory, hf_model
from wsm.plan.time import Ceiling

FAST = ["--max-new-tokens", "4", "--prompt-len", "16", "--ignore-eos", "--no-probe", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 6 layers without a tokenizer."""
    return hf_directory(tmp_path_factory.mktemp("model") / "hf", hf_model(num_hidden_layers=6))


@pytest.fixture
def run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: str) -> tuple[int, str, str]:
        places = [
            "--checkpoints",
            str(model),
            "--cache-dir",
            str(tmp_path / "c"),
            "--out-json",
            str(tmp_path / "r.json"),
        ]
        verb, rest = (argv[:1], argv[1:]) if argv[:1] == ("plan",) else ((), argv)
        capsys.readouterr()
        code = main([*verb, *places, *FAST, *rest])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# -- rows


def test_standard_lengths_need_no_tokenizer_and_become_a_row(
    model: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    assert not list(model.glob("tokenizer*"))
    code, out, _ = run("--mode", "full", "-o", "csv", "--repeats", "2")
    assert code == 0
    [row] = csv.DictReader(io.StringIO(out))
    assert (row["prefill_tokens_total"], row["decode_tokens_total"], row["repeats"]) == ("16", "4", "2")
    assert float(row["e2e_stdev_ms"]) > 0


def test_a_row_has_the_settings_that_a_sweep_may_vary_commit_and_time(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    flags = ["--prefetch-distance=2", "--mode", "mixed"]
    _, out, _ = run(*flags, "-o", "csv")
    [row] = csv.DictReader(io.StringIO(out))
    assert {each.name for each in LISTED.values()} <= row.keys()
    assert (row["prefetch_distance"], row["gpu_cached_layers"], row["ignore_eos"]) == ("2", "4", "True")
    made = json.loads((tmp_path / "r.json").read_text())["provenance"]
    assert row["time"] == made["utc"]
    assert row["commit"].rstrip("+") == (made["git_commit"] or "")[:12]
    _, out, _ = run(*flags, "-o", "md")
    head = [cell.strip() for cell in out.splitlines()[0].strip("|").split("|")]
    assert head[:2] == ["model", "prefetch_distance"]
    assert "gpu_cached_layers" not in head  # only what was given
    assert head[-2:] == ["commit", "time"]


def test_a_bar_in_a_cell_of_a_table_is_escaped(measured: Mapping[str, Any]) -> None:
    line = row(typed(varied(measured, config__resolved__prompt="a|b\nc")), "md", ["prompt"]).splitlines()[2]
    assert "a\\|b c" in line


@pytest.mark.parametrize("output", ["csv", "md"])
def test_a_row_has_no_room_for_warnings_so_they_go_to_stderr(
    run: Callable[..., tuple[int, str, str]], output: str
) -> None:
    _, out, err = run("--mode", "full", "-o", output)
    assert "[WARNING]" not in out
    assert "[WARNING] the compute device is the CPU" in err


def test_json_for_pipes_is_one_line_with_its_warnings_inside(run: Callable[..., tuple[int, str, str]]) -> None:
    _, out, err = run("--mode", "full", "-o", "json")
    assert err == ""
    assert json.loads(out)["warnings"]
    assert out.count("\n") == 1


# -- the summary


def test_paging_that_did_not_go_as_planned_stands_in_the_summary(measured: Mapping[str, Any]) -> None:
    line = "decode: 1.0 MB of ssd_read were used, 2.0 MB were planned: paging did not go as planned"
    assert f"[WARNING] {line}" in summary(typed(varied(measured, warnings=[line]))).splitlines()


def test_the_summary_says_what_its_figures_are_the_middle_of(measured: Mapping[str, Any]) -> None:
    spread = {
        **measured["repeats"]["statistics"]["e2e_ms"],
        "median": 101.0,
        "stdev": 2.5,
        "median_ci95": [99.0, 104.0],
    }
    text = summary(typed(varied(measured, repeats__n=5, repeats__statistics__e2e_ms=spread)))
    assert "median 101.000 ms of 5 rounds, sample stdev 2.500, 95 % interval of the median 99.000 to 104.000" in text


def test_the_summary_says_what_ran(measured: Mapping[str, Any]) -> None:
    assert "of: builtin-v1 in mode mixed, 1 row, 8 prompt tokens, 6 new tokens" in summary(typed(dict(measured)))
    short = varied(measured, decode_tokens_total=18, max_new_tokens=32)
    assert "8 prompt tokens, 18 of 32 new tokens" in summary(typed(short))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([32], None),
        ([18], "1 of 1 row ended at a stop token, after 18 of 32 tokens"),
        ([32, 5, 20, 32], "2 of 4 rows ended at a stop token, after 5 to 20 of 32 tokens"),
    ],
)
def test_rows_that_ended_early_are_a_warning(tokens: list[int], said: str | None) -> None:
    lines = list(early_ends(tokens, 32))
    assert lines == [] if said is None else lines[0].startswith(said)


def test_blocks_of_kv_that_were_left_out_are_a_warning(measured: Mapping[str, Any]) -> None:
    whole = typed(measured).kv
    assert isinstance(whole, KV)
    assert list(blocks_left_out(whole)) == []
    left_out = msgspec.structs.replace(whole, exact=False, fraction_fetched=0.679)
    assert list(blocks_left_out(left_out)) == [
        "decode steps attended over 67 % of the context that lies below the GPU, 8 blocks of 256 tokens at a time: "
        "tokens may differ from those of all; --topk-blk 0 takes all"
    ]


def test_a_run_that_ends_at_a_stop_token_says_so_and_goes_on_where_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in model's weights are random: any id of its vocabulary may come, so all of them are made to stop."""
    monkeypatch.setattr(ByteTokenizer, "stop_ids", frozenset(range(320)))
    flags = ["--device", "cpu", "--mode", "full", "--no-probe", "--cache-dir", str(tmp_path), "-n", "4"]
    flags += ["--prompt", "abc", "--out-json", str(tmp_path / "r.json")]
    counts = []
    for more in ([], ["--no-ignore-eos"], ["--ignore-eos"]):
        assert main([*flags, *more]) == 0
        out = capsys.readouterr().out
        counts.append(json.loads((tmp_path / "r.json").read_text())["decode_tokens_total"])
        assert ("[WARNING] 1 of 1 row ended at a stop token, after 1 of 4 tokens" in out) is (counts[-1] == 1)
    assert counts == [4, 1, 4]


def test_a_prompt_that_is_cut_names_the_flag_that_keeps_it(run: Callable[..., tuple[int, str, str]]) -> None:
    said = run("plan", "--max-seq-len", "12")[1]
    assert "[INFO] 1 of 1 prompt cut to the last 8 tokens (the longest had 16; --max-seq-len 20 keeps it whole)" in said
    assert "cut to" not in run("plan", "--max-seq-len", "20")[1]


def test_a_result_that_is_replaced_is_named_with_its_time(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    place = tmp_path / "r.json"
    place.write_text('{"batch_size": 1}')
    assert "was replaced" not in run("--mode", "full")[1], "no result was there"
    utc = json.loads(place.read_text())["provenance"]["utc"]
    said = run("--mode", "full")[1]
    assert f"[INFO] the result of {utc} that was there was replaced; another --out-json NAME keeps both\n" in said


# -- --auto


@pytest.mark.parametrize("verb", ["", "plan"])
def test_the_kept_command_plans_what_auto_chose(run: Callable[..., tuple[int, str, str]], verb: str) -> None:
    asked = [*verb.split(), "--auto", "--mode", "mixed", "--cpu-mem-gb", "0.002", "--gpu-cached-layers", "5"]
    code, out, _ = run(*asked)
    assert code == 0
    [kept] = [line for line in out.splitlines() if line.startswith("[INFO] to keep this choice: ")]
    words = shlex.split(kept.partition(": ")[2])
    assert words[:2] == called()
    assert "--auto" not in words
    assert words.count("--gpu-cached-layers") == 1
    before, after = (run(*argv)[1] for argv in (["plan", *asked[len(verb.split()) :]], ["plan", *words[2:]]))
    assert tiers(before) == tiers(after)
    assert "--prefetch-distance 2 clipped to 1" in before
    assert "clipped" not in after, "what is kept is in force"


def tiers(plan: str) -> list[str]:
    """The lines of a plan that say what lies where, and in which pools."""
    found = [line for line in plan.splitlines() if line.startswith(("  GPU  ", "  CPU  ", "  SSD  ", "pools:"))]
    assert len(found) == 4
    return found


# -- plan and exit 3


def test_plan_shows_what_a_flag_would_buy_in_bytes_and_once_rates_are_known_in_time(
    run: Callable[..., tuple[int, str, str]], model: Path, tmp_path: Path
) -> None:
    flags = ["--gpu-cached-layers", "1", "--cpu-cache-layers", "2", "--prefetch-distance", "1"]
    _, unknown, _ = run("plan", *flags)
    assert "what each flag would buy, not known in time yet" in unknown
    [line] = [line for line in unknown.splitlines() if "--gpu-cached-layers 2" in line]
    assert line.split()[2:4] == ["-", "-"]
    assert float(line.split()[4]) < 0
    rates = {name: Ceiling(1000.0, 900.0, "MBps", 1.0, "") for name in ("ssd", "h2d", "h2d_with_ssd")}
    remember(*opened(tmp_path / "c", model), rates)
    _, known, _ = run("plan", *flags)
    assert "what each flag would buy: a decode pass " in known
    [line] = [line for line in known.splitlines() if "--gpu-cached-layers 2" in line]
    assert float(line.split()[2]) < 0


def test_a_plan_as_json_says_what_the_text_says(run: Callable[..., tuple[int, str, str]]) -> None:
    flags = ["--gpu-cached-layers", "1", "--cpu-cache-layers", "2", "--prefetch-distance", "1", "--prompt-len", "3000"]
    code, out, err = run("plan", *flags, "-o", "json")
    assert code == 0
    assert "cut to the last 2044 tokens" in err
    plan = json.loads(out)
    assert {tier: len(layers) for tier, layers in plan["residency"].items()} == {"gpu": 1, "cpu": 1, "ssd": 4}
    assert plan["fits"] is True
    assert sum(plan["gpu_memory"]["lines"].values()) == plan["gpu_memory"]["bytes"]
    assert plan["bytes_per_pass"]["ssd_read"] == 4 * plan["layer_bytes"]
    _, text, _ = run("plan", *flags)
    for lever in plan["levers"]:
        assert lever["flag"] in text


def test_a_plan_as_json_that_does_not_fit_is_exit_3_all_the_same(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("plan", "-o", "json", "--gpu-mem-gb", "0.0001")
    assert code == 3
    assert json.loads(out)["fits"] is False
    assert "does not fit" in err


def test_a_plan_has_no_row(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("plan", "-o", "csv")
    assert (code, out) == (2, "")
    assert "json" in err


def opened(tmp_path: Path, model: Path, **settings: Any) -> tuple[BuildOptions, Inputs]:
    options = BuildOptions(**settings, checkpoints=model, cache_dir=tmp_path, device="cpu")
    return options, open_inputs(options)


def test_rates_are_known_to_plans_of_other_budgets_and_modes_but_no_run_is_measured_against_them(
    tmp_path: Path, model: Path
) -> None:
    mixed = {
        "ssd": Ceiling(7000.0, 6900.0, "MBps", 1.0, "read"),
        "h2d": Ceiling(20000.0, 19000.0, "MBps", 1.0, "copied"),
    }
    stream = {"h2d": Ceiling(25000.0, 24000.0, "MBps", 1.0, "copied")}
    remember(*opened(tmp_path, model, mode="mixed"), mixed)
    remember(*opened(tmp_path, model, mode="stream"), stream)
    other = opened(tmp_path, model, mode="mixed", gpu_mem_gb=1.0)
    assert recall_for(*other) == {}
    near = recall_near(*other)
    assert {name: ceiling.value for name, ceiling in near.items()} == {"ssd": 7000.0, "h2d": 25000.0}
    assert near["ssd"].how == "read (of an earlier run)"
    assert recall_near(*opened(tmp_path, model, mode="mixed"))["h2d"].value == 20000.0


def test_a_device_that_runs_out_in_the_run_is_exit_3_with_budget_and_advice(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def runs_out(*ignored: Any, **also: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(measure, "run_round", runs_out)
    code, _, err = run("--mode", "stream", "--warmup-rounds", "0", "--gpu-cached-layers", "2")
    first, cost, *budget = err.splitlines()
    assert code == 3
    assert "CUDA out of memory. Tried to allocate 2 GiB), though" in first
    assert "it fits with --group-prefetch-depth" in first
    assert "cost" in cost
    assert any("weights resident, 2 layers" in line for line in budget)
    assert not (tmp_path / "r.json").exists()


def test_a_result_in_a_directory_that_is_not_there_is_refused_with_the_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out-json", str(tmp_path / "new" / "r.json")]) == 2
    assert "its directory does not exist; make it first" in capsys.readouterr().err
