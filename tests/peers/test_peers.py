"""The script that measures others: what it keeps when they fail, what it sets beside what, and that it runs."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from gguf import GGUFReader

from llama.config import PRESETS
from tests.gguf_files import CONFIG
from tests.gpu import gguf_shape
from tests.gpu.performance import PLACE
from tests.peers import llama_bench, ours
from tests.peers.__main__ import BEGIN, END, load, rows_of, table
from tests.peers.rows import MARK, Row, Work, attempt

ROW = Row("peer", "scene", "q4_0", 2, "flags", s_a_pass=0.5, passes=3)
WORK = Work("tiny-peer", 1, 2, 1, 1, device="cpu", prompt=4)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, WORK.name, CONFIG)


def written(capsys: pytest.CaptureFixture[str]) -> list[Row]:
    lines = capsys.readouterr().out.splitlines()
    return [Row(**json.loads(line.removeprefix(MARK))) for line in lines if line.startswith(MARK)]


def test_what_a_peer_cannot_do_is_a_row_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    with attempt("peer", "scene", "bf16", 1, "flags"):
        raise NotImplementedError("Cannot copy\nout of meta tensor")
    (row,) = written(capsys)
    assert row.could_not == "NotImplementedError: Cannot copy out of meta tensor"
    assert row.s_a_pass is None


def part_that(then: str) -> list[str]:
    code = f"import os, sys, time; print({MARK + json.dumps(asdict(ROW))!r}, flush=True); print('noise'); {then}"
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.mark.parametrize(
    ("then", "limit", "said"),
    [("time.sleep(60)", 3, "stopped at its limit of 3 s"), ("sys.exit('no such card')", 60, "no such card")],
)
def test_rows_before_a_bad_end_are_kept_and_the_end_is_said(tmp_path: Path, then: str, limit: int, said: str) -> None:
    first, end = rows_of(part_that(then), tmp_path / "part.log", limit)
    assert (first.peer, first.s_a_pass, first.part) == ("peer", 0.5, "part")
    assert said in end.could_not


def test_a_part_ends_when_nobody_reads_its_rows_any_more(tmp_path: Path) -> None:
    began, log = time.monotonic(), tmp_path / "part.log"
    rows = rows_of(part_that("print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"), log, 60)
    next(rows)
    while not log.read_text().strip() and time.monotonic() - began < 30:
        time.sleep(0.01)
    rows.close()
    assert time.monotonic() - began < 40
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_a_peer_is_compared_with_ours_of_its_scene_batch_and_format(tmp_path: Path) -> None:
    mine = [Row(ours.NAME, "scene", form, 2, "", s_a_pass=s) for form, s in (("int4", 0.1), ("q4_0", 0.25))]
    others = [
        Row(ours.NAME, "other", "q4_0", 2, "", s_a_pass=9.0),
        Row(ours.NAME, "scene", "q4_0", 1, "", s_a_pass=9.0),
    ]
    path = tmp_path / "peers.json"
    path.write_text(
        json.dumps([asdict(row) for row in (*mine, *others, ROW, Row("x", "scene", "", 0, "", could_not="why"))])
    )
    text = table(load(path))
    assert next(line for line in text.splitlines() if line.startswith("| peer")).split("|")[5].strip() == "2.00 ×"
    assert [line.split("|")[5].strip() for line in table([mine[0], ROW]).splitlines() if "peer" in line] == [
        "5.00 × int4"
    ]
    assert "* x (scene): why" in text


def test_the_page_shows_the_published_rows() -> None:
    docs = Path(__file__).parents[2] / "docs"
    rows = [row for path in sorted(docs.glob("results/peers/*.json")) for row in load(path)]
    shown = (docs / "PERFORMANCE.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    assert rows
    assert shown == table(rows)
    assert PLACE.findall(" ".join(row.settings + row.could_not for row in rows)) == []


def test_llama_benchs_times_are_a_pass() -> None:
    test = {
        "n_gen": 8,
        "n_prompt": 0,
        "n_threads": 16,
        "samples_ns": [8e8, 9e8, 8e9],
        "build_number": 1,
        "build_commit": "c",
    }
    made = llama_bench.row_of(test, "scene", "-ngl 13 -t 8,16 --no-host 1")
    assert (made.batch, made.s_a_pass, made.settings) == (1, pytest.approx(0.1125), "-ngl 13 -t 16 --no-host 1")
    prompt = llama_bench.row_of({**test, "n_gen": 0, "n_prompt": 24}, "scene", "-t 16")
    assert (prompt.batch, prompt.s_a_pass, prompt.tok_s) == (24, pytest.approx(0.9), pytest.approx(24 / 0.9))
    assert prompt.settings == "24 tokens of one row; -t 16"


def test_a_gguf_of_one_type_has_it_in_its_layers_and_no_vocabulary(tmp_path: Path) -> None:
    gguf_shape.main(WORK.name, 2, tmp_path / "one.gguf", "q4_0")
    read = GGUFReader(tmp_path / "one.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read.tensors if len(tensor.shape) > 1}
    assert {kind for name, kind in kinds.items() if name.startswith("blk.")} == {"Q4_0"}
    assert {kinds["output.weight"], kinds["token_embd.weight"]} == {"Q6_K"}
    assert bytes(read.fields["tokenizer.ggml.model"].parts[-1]) == b"no_vocab"


def test_accelerates_rows_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    from tests.peers import torch_peers

    torch_peers.accelerate(WORK)
    torch_peers.accelerate_partly(WORK)
    rows = written(capsys)
    assert [(row.scene, row.batch) for row in rows] == [
        (WORK.bare, 1),
        (WORK.bare, 1),
        (WORK.bare, 32),
        (WORK.partly, 1),
    ]
    assert all(row.s_a_pass and not row.could_not for row in rows)
