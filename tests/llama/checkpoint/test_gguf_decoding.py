"""Blocks are decoded on several threads: the values are those of one thread, and a failure is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import wsm.formats.format as formats
from llama.checkpoint import open_checkpoint
from llama.names import Cut
from tests.gguf_files import CONFIG, random_tensors, write_gguf
from wsm.errors import StoreError

pytestmark = pytest.mark.usefixtures("three_threads")

EMBEDDING = "tok_embeddings.weight"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(formats, "CPU_PIECE", 3 * CONFIG.dim)
    return write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, lambda name: "q6_K")


def read(path: Path) -> torch.Tensor:
    out = torch.empty(CONFIG.vocab_size, CONFIG.dim, dtype=torch.bfloat16)
    open_checkpoint(path).read_into(EMBEDDING, out)
    return out


def test_several_threads_decode_the_values_of_one(path: Path) -> None:
    several = read(path)
    torch.set_num_threads(1)
    assert torch.equal(read(path), several)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wsm-spread")]


def test_a_part_of_a_matrix_is_decoded_alike(path: Path) -> None:
    cut = Cut(row=5, column=64, rows=11, columns=128)
    out = torch.empty(cut.rows, cut.columns, dtype=torch.bfloat16)
    open_checkpoint(path).fill(EMBEDDING, out, cut)
    assert torch.equal(out, read(path)[5:16, 64:192])


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_that_became_shorter_is_an_error_on_any_number_of_threads(path: Path, count: int) -> None:
    torch.set_num_threads(count)
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 8)
    with pytest.raises(StoreError, match="became shorter"):
        checkpoint.read_into("layers.2.feed_forward.w2.weight", torch.empty(CONFIG.dim, CONFIG.ffn_dim))
