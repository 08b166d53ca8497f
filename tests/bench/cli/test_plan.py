"""`plan` for another machine: budgets and rates as they are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_infer import command_line as main
from wsm.plan.machines import MACHINES

Planned = Callable[..., tuple[int, dict[str, Any], str]]
H70B = ["--synthetic", "Llama-3.1-70B", "--prompt-len", "512"]
LAYER = 1_711_308_800
GIB = 1 << 30


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    """The exit code, the plan as JSON, and what was said on stderr."""

    def planned(*argv: object) -> tuple[int, dict[str, Any], str]:
        words = ["plan", *H70B, "--cache-dir", tmp_path, "-o", "json", *argv]
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, json.loads(said.out or "{}"), said.err

    return planned


def test_budgets_are_taken_as_given_whatever_this_machine_has(planned: Planned) -> None:
    code, plan, _ = planned("--gpu-mem-gb", 24, "--cpu-mem-gb", 2048, "--mode", "stream")
    assert (code, plan["fits"]) == (0, True)
    assert plan["gpu_memory"]["budget_bytes"] == 24 * GIB
    assert plan["cpu_memory"]["budget_bytes"] == 2048 * GIB
    assert "CUDA context and kernels" in plan["gpu_memory"]["lines"]
    assert not [note for note in plan["notes"] if "mem-gb" in note]


def test_a_budget_that_is_too_small_does_not_fit_there_either(planned: Planned) -> None:
    code, plan, err = planned("--gpu-mem-gb", 24, "--cpu-mem-gb", 32)
    assert (code, plan["fits"]) == (3, False)
    assert "it fits with --cpu-cache-layers 20" in err


def test_the_cpu_as_compute_device_is_planned_with_the_memory_given(planned: Planned) -> None:
    code, plan, _ = planned("--device", "cpu", "--cpu-mem-gb", 2048)
    assert (code, plan["cpu_memory"]["budget_bytes"]) == (0, 2048 * GIB)
    assert "CUDA context and kernels" not in plan["gpu_memory"]["lines"]


def test_a_named_machine_brings_its_memory_and_rates(planned: Planned) -> None:
    code, plan, _ = planned("--machine", "rtx4090", "--cpu-mem-gb", 128, "--ssd-gbps", 7)
    assert code == 0
    assert plan["gpu_memory"]["budget_bytes"] == pytest.approx(0.98 * 24 * GIB, rel=1e-6)
    rates = {name: ceiling["value"] for name, ceiling in plan["ceilings"].items()}
    assert rates == {"h2d": 25_000, "hbm": 1_008_000, "matmul": 165.2, "ssd": 7_000}
    assert "whitepaper" in plan["ceilings"]["hbm"]["how"]
    assert "practical rate" in plan["ceilings"]["h2d"]["how"]
    assert plan["floor"]["decode"]["bound_by"] == "ssd"
    assert plan["predicted_pass_ms"]["decode"] == pytest.approx(42 * LAYER / 7e6, rel=1e-4)


def test_what_is_given_beats_the_machines_figures(planned: Planned) -> None:
    fits = ["--cpu-mem-gb", 256, "--mode", "stream"]
    _, plan, _ = planned("--machine", "H100", *fits, "--link-gbps", 12.5, "--gpu-mem-gb", 24)
    assert plan["ceilings"]["h2d"] == {
        "value": 12_500,
        "median": 12_500,
        "unit": "MBps",
        "spread_pct": 0,
        "how": "as given",
    }
    assert plan["gpu_memory"]["budget_bytes"] == 24 * GIB
    assert plan["predicted_pass_ms"]["decode"] == pytest.approx(76 * LAYER / 12.5e6, rel=1e-4)


def test_a_rate_alone_is_enough_for_a_prediction(planned: Planned) -> None:
    _, plan, _ = planned("--gpu-mem-gb", 24, "--cpu-mem-gb", 256, "--mode", "stream", "--link-gbps", 54)
    assert plan["predicted_pass_ms"]["decode"] == pytest.approx(76 * LAYER / 54e6, rel=1e-4)
    assert list(plan["ceilings"]) == ["h2d"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("rtx4080", "is not known; did you mean RTX 4090? Known are RTX 3090,"),
        ("GTX 1080", "is not known. Known are RTX 3090,"),
        ("RTX A4000", "is not known; did you mean RTX A5000? Known are"),
        ("RTX A9090", "is not known. Known are RTX 3090,"),
        ("RXT 4090", "is not known; did you mean RTX 4090?"),
    ],
)
def test_a_machine_that_is_not_known_is_answered_with_those_that_are(planned: Planned, typed: str, said: str) -> None:
    code, _, err = planned("--machine", typed)
    assert code == 2
    assert f"--machine {typed} is not known" in err
    assert said in err


@pytest.mark.parametrize("argv", [["--link-gbps", "0"], ["--ssd-gbps", "nan"], ["--matmul-tflops", "-1"]])
def test_a_rate_that_is_none_is_refused(planned: Planned, argv: list[str]) -> None:
    code, _, err = planned(*argv)
    assert code == 2
    assert "must be a number above 0" in err


def test_a_run_takes_no_machine_and_the_kept_command_names_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--machine", "H100"]) == 2
    capsys.readouterr()
    argv = ["plan", *H70B, "--cache-dir", str(tmp_path), "--cpu-mem-gb", "200", "--mode", "stream", "--auto"]
    assert main([*argv, "--machine", "H100", "--link-gbps=40"]) == 0
    [kept] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[INFO] to keep this choice")]
    assert "--machine" not in kept
    assert "--link-gbps" not in kept
    assert "--gpu-cached-layers" in kept


@pytest.mark.parametrize(("given", "budget"), [([], "23.52"), (["--gpu-mem-gb", "16"], "16")])
def test_the_kept_command_holds_a_larger_card_to_the_machine_s_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], budget: str
) -> None:
    argv = ["plan", *H70B, "--cache-dir", str(tmp_path), "--machine", "RTX 4090", "--cpu-mem-gb", "256"]
    assert main([*argv, "--mode", "stream", "--auto", *given]) == 0
    [kept] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[INFO] to keep this choice")]
    words = kept.split()
    assert [words[at + 1] for at, word in enumerate(words) if word == "--gpu-mem-gb"] == [budget]
    assert words[words.index("--cpu-mem-gb") + 1] == "256"


@pytest.mark.parametrize("name", ["RTX 3090 Ti", "RTX A5000", "A10", "L4"])
def test_usual_cards_of_24_gb_are_known(planned: Planned, name: str) -> None:
    code, plan, _ = planned("--machine", name.lower(), "--cpu-mem-gb", 256, "--mode", "stream", "--auto")
    assert code == 0
    assert 22 * GIB < plan["gpu_memory"]["budget_bytes"] < 24 * GIB


def told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(["plan", "--cache-dir", str(tmp_path), *argv])
    return capsys.readouterr().out


NO_GPU = (
    "[INFO] there is no GPU here, and nothing is known of the one that is planned for: give --machine, or its rates "
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a GPU that is not here")
def test_a_gpu_that_is_not_here_is_said_to_be_none_whose_rates_a_run_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told_of(tmp_path, capsys, "--gpu-mem-gb", "24", "--mode", "stream")
    assert f"{NO_GPU}(--link-gbps), or plan for what is here with --device cpu" in said
    assert "not known in time yet: give --link-gbps\n" in said
    said = told_of(tmp_path, capsys, "--gpu-mem-gb", "24", "--mode", "full")
    assert f"{NO_GPU}(--hbm-gbps and --matmul-tflops), or plan" in said
    said = told_of(tmp_path, capsys, "--gpu-mem-gb", "24", "--mode", "stream", "--link-gbps", "25")
    assert NO_GPU not in said
    assert "decode: predicted" in said


def test_rates_that_are_missing_are_named_with_the_run_that_measures_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = ["--device", "cpu", "--weight-format", "int4", "--cpu-mem-gb", "8"]
    said = told_of(tmp_path, capsys, *cpu, "--mode", "stream")
    assert "[INFO] no time is predicted: rates of the link are missing; what measures them here stands " in said
    assert "rates of the link are missing, which a run of builtin-v1 in int4 with --mode stream measures here" in said
    said = told_of(tmp_path, capsys, *cpu, "--mode", "mixed", "--link-gbps", "25")
    assert "rates of the drive are missing, which a run of builtin-v1 in int4 with --mode mixed measures here" in said
    assert "or give --ssd-gbps\n" in said
    said = told_of(tmp_path, capsys, *cpu, "--mode", "full")
    assert "no time is predicted: rates of device memory and arithmetic are missing" in said


@pytest.mark.parametrize(("device", "told"), [(["--device", "cpu"], 1), (["--machine", "H100"], 0)])
def test_a_plan_on_the_cpu_says_what_its_predictions_are_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: list[str], told: int
) -> None:
    said = told_of(tmp_path, capsys, *device, "--mode", "stream", "--link-gbps", "25")
    assert said.count("[WARNING] the compute device is the CPU: floors and predictions are informative only") == told


def test_where_the_drive_is_not_known_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", *H70B, "--cache-dir", str(tmp_path), "--machine", "H100", "--cpu-mem-gb", "128"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "[INFO] nothing is known of the drive, which this plan reads: give --ssd-gbps" in said
    assert "what each flag would buy, not known in time yet: give --ssd-gbps\n" in said
    assert "decode: predicted" not in said
    assert main([*argv[:-1], "30"]) == 3
    assert "its cost is not known in time yet: give --ssd-gbps; a pass" in capsys.readouterr().err


def test_a_plan_that_does_not_fit_shows_its_budgets_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", *H70B, "--cache-dir", str(tmp_path), "--machine", "RTX 4090", "--cpu-mem-gb", "32"]
    assert main(argv) == 3
    said = capsys.readouterr()
    assert "the budget is 32.00 GiB; it fits with --cpu-cache-layers" in said.err
    assert (said.out.count("  budget "), said.err.count("  budget ")) == (2, 0)


def test_the_docs_have_the_table_as_it_is() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "TUNING.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 7}
    for machine in MACHINES:
        for figure in (
            f"{machine.memory_gib:g} GiB",
            f"{machine.hbm_gbps:g} GB/s",
            f"{machine.matmul_tflops:g} TFLOPs",
        ):
            assert figure in rows[machine.name]
        assert machine.source in rows[machine.name]


DRAFTED = ["--machine", "rtx4090", "--cpu-mem-gb", 128, "--ssd-gbps", 7, "--weight-format", "int4", "--mode", "stream"]
DRAFTED += ["--draft", "synthetic:Llama-3.2-1B", "--draft-depth", 8, "--draft-width", 1, "--gpu-cached-layers", 20]


def test_tokens_a_second_are_predicted_at_the_acceptance_that_is_named(planned: Planned) -> None:
    code, plan, _ = planned(*DRAFTED, "--acceptance", 0.8)
    assert code == 0
    found, pass_ms = plan["speculation"], plan["predicted_pass_ms"]["decode"]
    assert found["tokens_a_pass"] == pytest.approx((1 - 0.8**9) / 0.2, rel=1e-4)
    # Nine times the draft's 2.47 GB at 1008 GB/s, its KV and what it multiplies aside; the slots take 70 ms to fill.
    assert found["drafting_ms"] == pytest.approx(9 * 2.47e9 / 1008e6, rel=0.02)
    assert found["drafting_hidden_ms"] == found["drafting_ms"]
    assert found["pass_ms"] == pytest.approx(pass_ms)
    assert found["tokens_per_s"] == pytest.approx(1e3 * found["tokens_a_pass"] / pass_ms, rel=1e-4)


def test_what_the_slots_cannot_hide_of_drafting_lengthens_the_pass(planned: Planned) -> None:
    deep = ["--draft-depth", 48, "--verify-rows", 49, "--group-prefetch-depth", 1]
    _, plan, _ = planned(*DRAFTED, *deep, "--tokens-a-pass", 5)
    found = plan["speculation"]
    assert found["tokens_a_pass"] == 5
    assert 0 < found["drafting_hidden_ms"] < found["drafting_ms"]
    beside = found["drafting_ms"] - found["drafting_hidden_ms"]
    assert found["pass_ms"] == pytest.approx(plan["predicted_pass_ms"]["decode"] + beside, rel=1e-4)


def test_a_depth_of_auto_is_planned_as_deep_as_the_link_hides_and_5_percent_of_a_pass(planned: Planned) -> None:
    def found(depth: object) -> dict[str, Any]:
        wide = ["--draft-depth", depth, "--verify-rows", 90, "--group-prefetch-depth", 1]
        return dict(planned(*DRAFTED, *wide, "--tokens-a-pass", 1)[1]["speculation"])

    def beside(plan: dict[str, Any]) -> float:
        return float((plan["drafting_ms"] - plan["drafting_hidden_ms"]) / plan["pass_ms"])

    chosen = found("auto")
    assert 8 < chosen["depth"] < 89
    assert chosen == found(chosen["depth"])
    assert beside(chosen) <= 0.05 / 1.05 < beside(found(chosen["depth"] + 1))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--acceptance", 0.5], "--acceptance without --draft"),
        ([*DRAFTED, "--acceptance", 0.5, "--tokens-a-pass", 2], "exclude each other"),
        ([*DRAFTED, "--tokens-a-pass", 9.5], "gives at most 9"),
        ([*DRAFTED, "--acceptance", 1.5], "--acceptance"),
        ([*DRAFTED, "--tokens-a-pass", 0.5], "--tokens-a-pass"),
    ],
)
def test_an_acceptance_that_cannot_be_is_refused(planned: Planned, given: list[object], said: str) -> None:
    code, _, err = planned(*given)
    assert code == 2
    assert said in err


def test_a_smaller_draft_is_never_predicted_to_be_slower_and_a_level_takes_what_its_kernels_do(
    planned: Planned,
) -> None:
    """1.42 ms a level were measured in int4 on an H100."""

    def level_ms(machine: str, weight_format: str) -> float:
        asked = ["--machine", machine, "--draft-weight-format", weight_format, "--acceptance", 0.8]
        return float(planned(*DRAFTED, *asked)[1]["speculation"]["drafting_ms"]) / 9

    assert level_ms("H100", "int4") == pytest.approx(1.42, rel=0.05)
    assert level_ms("RTX 4090", "bf16") == pytest.approx(2.47e9 / 1008e6, rel=0.02)
    for machine in ("H100", "RTX 4090"):
        assert level_ms(machine, "int4") <= level_ms(machine, "bf16")


def test_without_an_acceptance_nothing_is_predicted_of_a_draft(planned: Planned) -> None:
    assert planned(*DRAFTED)[1]["speculation"] is None


def test_a_plan_is_written_as_it_is_printed_also_where_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    argv = ["plan", *H70B, "--cache-dir", str(tmp_path), "--machine", "RTX 4090", "--out-json", str(out)]
    for memory, code in ((200, 0), (32, 3)):
        assert main([*argv, "--cpu-mem-gb", str(memory), "-o", "json"]) == code
        assert json.loads(out.read_text(encoding="utf-8")) == json.loads(capsys.readouterr().out)
    assert main([*argv, "--cpu-mem-gb", "200", "--mode", "stream", "--auto"]) == 0
    said = capsys.readouterr().out
    assert json.loads(out.read_text(encoding="utf-8"))["fits"]
    [kept] = [line for line in said.splitlines() if line.startswith("[INFO] to keep this choice")]
    assert "--out-json" not in kept


def test_a_plan_takes_no_run_s_result_away_and_no_file_that_it_cannot_write(
    tmp_path: Path, measured_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    newer = tmp_path / "newer.json"
    newer.write_text('{"schema_version": 99}', encoding="utf-8")
    argv = ["plan", *H70B, "--cache-dir", str(tmp_path), "--machine", "H100", "--cpu-mem-gb", "200", "--out-json"]
    for result in (measured_files[0], newer):
        before = result.read_bytes()
        assert main([*argv, str(result)]) == 0
        assert "holds the result of a run and stays: --out-json names another file" in capsys.readouterr().err
        assert result.read_bytes() == before
    assert main([*argv, str(tmp_path / "nowhere" / "p.json")]) == 2
    assert "its directory does not exist" in capsys.readouterr().err
