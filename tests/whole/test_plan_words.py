"""What `plan` says to those who have read nothing but the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bench.cli.test_plan import DRAFTED, GIB, H70B
from tests.whole.conftest import Run


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], None),
        (["--acceptance", "0.8"], "a level's token assumed right 0.8 of the time"),
        (["--tokens-a-pass", "2.5"], "assumed to give 2.5 tokens a pass"),
        (
            ["--acceptance", "0.8", "--draft-width", "4", "--verify-rows", "24"],
            "a level's token assumed right 0.8 of the time, a tree's second choices not counted (a run's "
            "--tokens-a-pass has them)",
        ),
    ],
)
def test_what_a_prediction_believes_of_a_draft_stands_beside_it(run: Run, given: list[str], said: str | None) -> None:
    code, out, _ = run("plan", *H70B, *DRAFTED, *given)
    assert code == 0
    [decode] = re.findall(r"^decode: predicted .*$", out, re.MULTILINE)
    counted = "what is assumed of it is counted below" if given else "plan --acceptance X counts it"
    assert decode.endswith(f" tokens a second, as if nothing of the draft were accepted ({counted})")
    beside = re.findall(r"^with --draft synthetic:Llama-3.2-1B, (.*): predicted .* tokens a second", out, re.MULTILINE)
    assert beside == ([said] if said else [])


def test_memory_that_stays_unused_is_told_and_auto_named_where_it_was_not_given(run: Run) -> None:
    argv = ["plan", *H70B, "--machine", "RTX 4090", "--cpu-mem-gb", "128", "--ssd-gbps", "7", "--weight-format", "int4"]
    told = r"^\[INFO\] (.*) stay unused: --auto chooses layers and pools"

    def unused(*more: str) -> list[str]:
        code, out, _ = run(*argv, *more)
        assert code == 0
        return re.findall(told, out, re.MULTILINE)

    _, plan, _ = run(*argv, "-o", "json")
    gpu, cpu = (json.loads(plan)[f"{tier}_memory"] for tier in ("gpu", "cpu"))
    left = [(memory["budget_bytes"] - memory["bytes"]) / GIB for memory in (gpu, cpu)]
    assert unused() == [f"{left[0]:.2f} GiB of GPU memory and {left[1]:.2f} GiB of CPU memory"]
    assert re.fullmatch(r"[\d.]+ GiB of GPU memory", unused("--mode", "stream")[0])
    assert unused("--mode", "stream", "--gpu-cached-layers", "43", "--embedding", "cpu") == []
    small = ["--synthetic", "Llama-3.2-1B", "--weight-format", "bf16", "--gpu-mem-gb", "2.5", "--mode", "stream"]
    assert unused(*small)
    assert unused(*small, "--auto") == []


def test_a_choice_that_does_not_fit_is_not_offered_to_be_kept(run: Run) -> None:
    machine = [
        "--machine",
        "RTX 4090",
        "--cpu-mem-gb",
        "64",
        "--ssd-gbps",
        "7",
        "--synthetic",
        "Llama-3.1-70B",
        "--auto",
    ]
    code, out, err = run("plan", *machine, "--mode", "stream")
    assert code == 3
    assert "to keep this choice" not in out
    assert "it fits with --mode mixed beside --auto" in err
    assert "a decode pass of 8067.60 ms instead of 4791.66 ms (+68.4 %); a pass moves +56473.2 MB from the SSD" in err
    assert "the first run writes 141.11 GB into " in err
    assert re.search(r"--synthetic Llama-3.1-70B:layers=\d+$", err, re.MULTILINE)
    code, out, _ = run("plan", *machine, "--mode", "mixed")
    assert (code, out.count("to keep this choice")) == (0, 1)
    assert "decode: predicted 8067.60 ms" in out
    code, out, err = run("--mode", "stream", "--auto", "--cpu-mem-gb", "0.01", "--device", "cpu")
    assert code == 3
    assert "--auto chose" not in out
    assert "to keep this choice" not in out


def test_the_table_of_formats_has_a_column_for_what_is_assumed_of_a_draft(run: Run) -> None:
    def table(*more: str) -> tuple[str, list[str], str]:
        code, out, _ = run("plan", *H70B, *DRAFTED, *more)
        assert code == 0
        lines = out.splitlines()
        at = next(at for at, line in enumerate(lines) if line.startswith("the same in each weight format"))
        return lines[at], re.split(r"\s{2,}", lines[at + 1].strip()), out

    title, head, _ = table()
    assert title.endswith(
        "; tok/s: one token a row's pass, nothing of the draft accepted (plan --acceptance X counts it)"
    )
    assert "with draft" not in head
    title, head, out = table("--acceptance", "0.8")
    assert title.endswith("nothing of the draft accepted, with draft: as it is assumed")
    [row] = re.findall(r"^  int4 +.*$", out, re.MULTILINE)
    [told] = re.findall(r"^with --draft .*: predicted ([\d.]+) tokens a second", out, re.MULTILINE)
    assert row.split()[head.index("with draft")] == told
    plan = json.loads(run("plan", *H70B, *DRAFTED, "--acceptance", "0.8", "-o", "json")[1])
    of_formats = {found["weight_format"]: found["tokens_per_s_with_draft"] for found in plan["weight_formats"]}
    assert of_formats["int4"] == plan["speculation"]["tokens_per_s"]
    assert of_formats["int8"] < of_formats["int4"]


def test_a_plan_of_nothing_real_says_what_to_name(run: Run, tmp_path: Path) -> None:
    cache = ["--cache-dir", tmp_path, "--cpu-mem-gb", 128]
    code, out, _ = run("plan", *cache, "--machine", "RTX 4090")
    said = "[WARNING] this plans the small built-in model: --synthetic NAME, such as Llama-3.1-70B, plans a real one's"
    assert (code, said in out) == (0, True)
    assert said not in run("plan", *cache, "--machine", "RTX 4090", *H70B)[1]
    assert said not in run("plan", *cache)[1]
    code, _, err = run("plan", *cache, "--checkpoints", tmp_path / "none")
    assert code == 2
    assert "name one on this machine; --synthetic NAME plans a model's shape without its files" in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--machine RTX 4090 --cpu-mem-gb 8", "4090; put a name or text with blanks in quotes: --machine 'RTX 4090' ("),
        ("--prompt The sky is", "sky is; put a name or text with blanks in quotes: --prompt 'The sky is' ("),
        ("RTX", "plan takes no argument RTX, only flags and their values ("),
        ("--auto RTX 4090", "plan takes no argument RTX 4090, only flags and their values ("),
        ("--weight-format Q4_K_M", "not Q4_K_M; that is the mix of a GGUF file, which --checkpoints MODEL.gguf runs"),
        (
            "--weight-format Q5_K_S",
            "without the file, plan --synthetic Llama-3.1-70B --weight-format q5_K plans nearly",
        ),
        ("--checkpoints none-Q5_K_M.gguf", "plan --synthetic Llama-3.1-70B --weight-format q5_K plans nearly the same"),
        ("--checkpoints none.gguf", "plan --synthetic Llama-3.1-70B --weight-format q4_K plans nearly the same"),
        ("--weight-format Q4_K", "not Q4_K; did you mean q4_K?"),
        (
            "--manifest none.json",
            "No such file or directory; `pack --checkpoints PATH --to TARGET --manifest none.json",
        ),
    ],
)
def test_what_newcomers_type_is_answered_with_what_to_type_instead(run: Run, given: str, said: str) -> None:
    code, out, err = run("plan", *given.split())
    assert (code, out) == (2, "")
    assert said in err
