"""Tiny packed stores for tests: a checkpoint, a packed file, a version 1 device, a loop device."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.checkpoint.base import all_tensors, stretch
from llama.checkpoint.synthetic import SyntheticCheckpoint
from llama.config import ModelConfig
from llama.names import Cut, full_name
from llama.stores import pack
from wsm.layout.groups import GroupId, round_up, views
from wsm.layout.model import SourceFile
from wsm.store.description import DTYPE_NAMES
from wsm.store.pack import PackRequest, Progress
from wsm.store.packed_store import PackedStore

CONFIG = ModelConfig("tiny", dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=300)
Params = list[dict[str, Any]]


class CountingCheckpoint:
    """Weights that count: the same for ever, for tests of the format's bytes."""

    def __init__(self, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.bfloat16) -> None:
        self.config, self.dtype = config, dtype
        self.directory: Path | None = None
        self.names: list[str] = []

    def sources(self) -> tuple[SourceFile, ...]:
        return (SourceFile("counting", 0, "00"),)

    def read_into(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        self.names.append(name)
        shape = dict(all_tensors(self.config))[name]
        # Whole numbers below 256 are exact in every dtype.
        whole = ((torch.arange(math.prod(shape)) + sum(name.encode())) % 251).view(shape)
        out.copy_(stretch(whole, cut))

    def first_row(self, name: str, cut: Cut | None = None) -> Tensor:
        shape = dict(all_tensors(self.config))[name]
        whole = tensor_of(self, name, shape, self.dtype)
        return stretch(whole, cut)[0] if len(shape) == 2 else whole

    def close(self) -> None:
        """There are no files."""


def checkpoint(config: ModelConfig = CONFIG, seed: int = 0) -> SyntheticCheckpoint:
    return SyntheticCheckpoint(config, seed=seed, dtype=torch.bfloat16)


def tensor_of(source: Checkpoint, name: str, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype)
    source.read_into(name, out)
    return out


def aligned(nbytes: int) -> Tensor:
    """A page-aligned uint8 buffer, filled with bytes that are no weights."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).fill_(0xA5)


def pack_tiny(
    directory: Path,
    *,
    targets: Sequence[str] | None = None,
    source: Checkpoint | None = None,
    dtype: torch.dtype = torch.bfloat16,
    force: bool = False,
    progress: Progress = lambda nbytes: None,
) -> Path:
    """Pack the tiny model into ``directory``, saying yes to everything; the manifest's path."""
    manifest = directory / "store.json"
    request = PackRequest(tuple(targets or [str(directory / "store.wsm")]), manifest, dtype, force)
    pack(source or checkpoint(), request, confirm=lambda question: True, progress=progress)
    return manifest


def read_tensors(store: PackedStore) -> dict[str, Tensor]:
    """Every tensor of the store, by full name."""
    tensors = {}
    for group, stored in store.description.groups.items():
        buffer = aligned(stored.layout.nbytes)
        store.read(group, buffer).checked.result()
        for name, tensor in views(buffer, stored.layout).items():
            tensors[full_name(group, name)] = tensor.clone()
    return tensors


def assert_equals(store: PackedStore, source: Checkpoint, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every tensor of ``source`` comes out of the store bit by bit."""
    found = read_tensors(store)
    expected = {name: tensor_of(source, name, shape, dtype) for name, shape in all_tensors(source.config)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def flip(path: Path, offset: int) -> None:
    """Change one byte."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def edit(manifest: Path, **fields: Any) -> Path:
    """Change top-level fields of a manifest; None takes one away."""
    content = json.loads(manifest.read_text())
    content.update(fields)
    manifest.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return manifest


def write_v1(
    directory: Path,
    source: Checkpoint,
    *,
    gaps: Sequence[int] = (0,),
    order: Sequence[str] | None = None,
    embedding: str = "tok_embeddings.weight",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A version 1 store as the older tool wrote it: a file for a device, and its manifest.

    Args:
        gaps: blocks of 512 bytes left free before each tensor, in turn.
        order: the tensors' order on the device.
    """
    shapes = dict(all_tensors(source.config))
    params: Params = []
    offset = 8192
    with (directory / "v1.raw").open("wb") as device:
        for number, name in enumerate(order or list(shapes)):
            tensor = tensor_of(source, name, shapes[name], dtype)
            offset += gaps[number % len(gaps)] * 512
            device.seek(offset)
            device.write(tensor.view(torch.uint8).numpy().tobytes())
            nbytes = tensor.nbytes
            params.append(
                {
                    "name": embedding if name == "tok_embeddings.weight" else name,
                    "layer": int(name.split(".")[1]) if name.startswith("layers.") else -1,
                    "dtype": DTYPE_NAMES[dtype],
                    "shape": list(shapes[name]),
                    "offset": offset,
                    "nbytes": nbytes,
                    "stride": round_up(nbytes, 512),
                    "policy": "stream" if "layers" in name else "resident",
                }
            )
            offset += round_up(nbytes, 512)
    manifest = {"version": 1, "raw_device": str(directory / "v1.raw"), "block_size": 512, "header_reserve": 8192}
    path = directory / "v1.json"
    path.write_text(json.dumps({**manifest, "params": params}))
    return path


def edit_param(manifest: Path, tensor: str, **fields: Any) -> Path:
    """Change fields of one tensor of a version 1 manifest; None takes one away; ``rename`` changes the name."""
    if "rename" in fields:
        fields["name"] = fields.pop("rename")
    content = json.loads(manifest.read_text())
    for param in content["params"]:
        if param["name"] == tensor:
            param.update(fields)
            for field in [field for field, value in fields.items() if value is None]:
                del param[field]
    manifest.write_text(json.dumps(content))
    return manifest


@contextlib.contextmanager
def loop_device(image: Path, nbytes: int) -> Iterator[str]:
    """A loop device over a new file; skips the test where there can be none."""
    losetup = shutil.which("losetup", path=f"{os.defpath}:/usr/sbin:/sbin")
    if os.geteuid() != 0 or losetup is None:
        pytest.skip("needs root and losetup")
    with image.open("wb") as file:
        file.truncate(nbytes)
    made = subprocess.run([losetup, "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"losetup fails here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([losetup, "--detach", device], check=True)


def group_named(text: str) -> GroupId:
    """``L1.ffn`` -> its GroupId."""
    layer, _, kind = text[1:].partition(".")
    return GroupId(int(layer), "attn" if kind == "attn" else "ffn")
