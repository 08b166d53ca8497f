"""The figures of docs/PERFORMANCE.md are those that tests/gpu/performance.py and `plan` print."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import performance
from tests.gpu.performance import BEGIN, COLUMNS, END, IN_TABLE, NOTHING, ORDER, PLACE, ended, put_into, table
from tests.whole.conftest import Run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "PERFORMANCE.md"
CHINESE = ROOT / "docs" / "QUICKSTART.zh-CN.md"
QUICKSTART = ROOT / "docs" / "QUICKSTART.md"
RESULTS = ROOT / "docs" / "results"
STREAM = "--mode stream --embedding cpu --group-prefetch-depth 2 --gpu-cached-layers"  # as --auto chooses, but sooner
PAIR = "--synthetic Llama-3.1-70B:cycle --max-new-tokens 128 --acceptance 0.8 --draft-depth 12 --verify-rows 64 "
PAIR += "--draft synthetic:Llama-3.2-1B:agree=0.8,second=0.1 --draft-weight-format int4"
UNFIT = "the run does not fit: it takes {} GiB of GPU memory and the budget is 23.53 GiB; it fits with --mode stream"
PLANS = [
    ("--mode mixed --ssd-gbps 7", ["predicted 10267.85 ms a pass, 0.09739 tokens"], "0.0974 tok/s"),
    (
        f"{STREAM} 10",
        ["predicted 4791.66 ms a pass, 0.2087 tokens", " 113.522 "],
        "| 4.79 s | 0.209 | 10 | 113.5 GiB |",
    ),
    (
        f"{STREAM} 14 --weight-format exact",
        ["predicted 3389.40 ms a pass, 0.295 tokens", " 80.873 "],
        "| 3.39 s | 0.295 | 14 | 80.9 GiB |",
    ),
    (
        f"{STREAM} 46 --weight-format int4",
        ["predicted 609.15 ms a pass, 1.642 tokens", " 16.140 "],
        "| 0.609 s | 1.64 | 46 | 16.1 GiB |",
    ),
    (
        f"{STREAM} 42 --weight-format int4 {PAIR}",
        ["predicted 6.94 tokens", "680.82 ms", " 17.809 "],
        "| 0.681 s | 6.94 | 42 | 17.8 GiB |",
    ),
    ("--mode preload", [UNFIT.format("132.55")], UNFIT.format("132.55")),
    ("--mode full", [UNFIT.format("132.24")], UNFIT.format("132.24")),
]
"""What is planned for another machine, a part of what the plan prints, and how a page shows it."""
TINY = ("--target", "Llama-3.2-1B:layers=1", "--draft", "Llama-3.2-1B:layers=1")


def between(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def measure(monkeypatch: pytest.MonkeyPatch, out: Path, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["performance.py", str(out), *TINY, "--cache", str(out / "cache"), *argv])
    return performance.main()


def test_the_page_shows_what_the_command_prints() -> None:
    assert between(PAGE) == table(RESULTS)


def test_published_results_are_small_and_name_no_place() -> None:
    for path in RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert len(text) < 5000, path.name
        assert json.loads(text)["row"] == path.stem
        assert path.stem in ORDER
        assert PLACE.findall(text) == [], path.name


def test_what_is_published_of_a_row_names_no_place(tmp_path: Path) -> None:
    told = f'{tmp_path / "cache"}/m.wsm: no room; --cache-dir {ROOT}/x; 10^6 bytes/s, "{tmp_path}"'
    (tmp_path / "small").mkdir()
    performance.write(tmp_path, {"row": "int4_b1", "sentence": told})
    written = (tmp_path / "small" / "int4_b1.json").read_text(encoding="utf-8")
    assert PLACE.findall(written) == []
    assert json.loads(written)["sentence"].endswith('10^6 bytes/s, "…"')
    assert PLACE.findall(f'"{told}"')


@pytest.mark.parametrize(("flags", "printed", "shown"), PLANS)
def test_what_two_pages_predict_for_a_4090_is_what_plan_prints(
    run: Run, flags: str, printed: list[str], shown: str
) -> None:
    work = "--synthetic Llama-3.1-70B --prompt-len 128 --max-new-tokens 8 --cpu-mem-gb 128"
    code, out, err = run("plan", "--machine", "RTX 4090", *work.split(), *flags.split())
    assert code == (3 if "does not fit" in shown else 0)
    assert [words for words in printed if words not in out + err] == []
    for page in (PAGE, CHINESE):
        assert shown in page.read_text(encoding="utf-8"), page.name


@pytest.mark.parametrize("page", [PAGE, CHINESE, QUICKSTART], ids=lambda page: page.name)
def test_three_pages_have_the_command_of_the_row_with_a_draft(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [flag for flag in PAIR.strip().split(" --") if flag not in text] == []


def test_the_table_has_a_place_for_every_row() -> None:
    assert set(ORDER) <= set(IN_TABLE)


def test_a_measured_row_and_one_that_does_not_fit_stand_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure(monkeypatch, tmp_path, "int4_b8", "--commit", "0123abcd", "--", "--device", "cpu") == 0
    assert measure(monkeypatch, tmp_path, "exact_b1", "--", "--device", "cpu", "--cpu-mem-gb", "0.5") == 1
    result, small = (json.loads((tmp_path / place / "int4_b8.json").read_text()) for place in ("", "small"))
    assert small["measured"]["sha256"] == result["output"]["sha256"]
    assert small["measured"]["passes"] == 7
    assert small["measured"]["tokens_a_pass"] == 1
    assert small["measured"]["ratio"] == pytest.approx(100 / result["phases"]["decode"]["roofline_pct"], rel=1e-3)
    assert small["ceilings"]["hbm"]["value"] == result["ceilings"]["hbm"]["value"]
    assert str(tmp_path) not in json.dumps(small)
    exact, int4 = re.findall(r"^\| \w.*(?<!run) \|$", table(tmp_path / "small"), re.MULTILINE)
    assert exact.startswith("| exact | 1 | none | - |")
    assert re.search(r"b: exit 3: the run does not fit: it takes [\d.]+ GiB of CPU memory", exact)
    assert len(int4.strip("| ").split(" | ")) == len(COLUMNS)
    assert int4.startswith(f"| int4 | 8 | none | {small['measured']['pass_ms'] / 1e3:.4f} | ")
    assert "commit 0123abcd" in table(tmp_path / "small")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    put_into(page, table(tmp_path / "small"))
    assert between(page) == table(tmp_path / "small")
    small["measured"]["pass_ms"] += 1
    (tmp_path / "small" / "int4_b8.json").write_text(json.dumps(small))
    assert between(page) != table(tmp_path / "small")


def test_a_row_is_stopped_at_its_limit() -> None:
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=subprocess.DEVNULL)
    assert ended(process, 0.5) is None
    assert process.returncode is not None
    assert time.monotonic() - began < 60


def test_no_row_begins_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(monkeypatch, tmp_path, "int4_*", "--seconds", "-1") == 0
    names = " ".join(name for name in ORDER if name.startswith("int4_"))
    assert capsys.readouterr().out == f"not started, the time being over: {names}\n"


def test_a_name_that_no_row_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no row is called int3_b1; there are int4_b1, "):
        measure(monkeypatch, tmp_path, "int3_b1")


def test_without_results_the_table_says_so(tmp_path: Path) -> None:
    assert table(tmp_path) == NOTHING
