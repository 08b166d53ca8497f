"""Kernels run on the caller's current device: it is the model's in every call that computes, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama.llm import LLaMA
from llama.model import Transformer
from tests.gguf_files import CONFIG, random_tensors, write_gguf
from wsm.engine.device import Device


def test_whatever_computes_does_it_on_the_models_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, seen = 0, list[int]()

    @contextmanager
    def current(self: Device) -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    forward, load = Transformer.forward, LLaMA._load

    def watched(self: Transformer, *args: Any, **how: Any) -> Any:
        seen.append(depth)
        return forward(self, *args, **how)

    def loaded(self: LLaMA, *args: Any) -> None:
        seen.append(depth)
        load(self, *args)

    monkeypatch.setattr(Device, "current", current)
    monkeypatch.setattr(Transformer, "forward", watched)
    monkeypatch.setattr(LLaMA, "_load", loaded)
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG)
    with LLaMA.build(path, mode="full", device="cpu", max_seq_len=64) as llm:
        llm.generate([[5, 6, 7]], max_new_tokens=2, temperature=0)
        llm.logits([[5, 6, 7]])
    assert seen == [1] * 4
    assert depth == 0
