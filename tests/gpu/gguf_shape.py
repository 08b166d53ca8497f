"""A GGUF file of random blocks in a real model's shape: python tests/gpu/gguf_shape.py NAME LAYERS FILE [TYPE]

Matrices are q4_K, but w2 and wv of every second layer, embedding and head q6_K: what `Q4_K_M` is, more
or less. With a TYPE, such as q4_0, all of the layers' are of that one. It has no tokenizer, and says so, since
llama.cpp asks: `--prompt-len` needs none.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama.checkpoint.base import all_tensors
from llama.checkpoint.gguf import gguf_name
from llama.config import PRESETS
from tests.gguf_files import metadata
from wsm.formats import registry
from wsm.formats.gguf_blocks import BlockType

SEEDED = 32771
"""Blocks that are made; a matrix is filled with them from a place of its own on."""


def main(name: str, layers: int, path: Path, only: str = "") -> None:
    config = dataclasses.replace(PRESETS[name], n_layers=layers)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata(config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tokenizer_model("no_vocab")
    made = {}
    for kind in (only or "q4_K", "q6_K"):
        block = registry.get(kind)
        assert isinstance(block, BlockType)
        made[kind] = block, block.seeded(SEEDED, config.dim**-0.5, seed=1).numpy()
    written: list[Callable[[], np.ndarray[Any, Any]]] = []
    for at, (tensor, shape) in enumerate(all_tensors(config)):
        if len(shape) == 1:
            writer.add_tensor_info(gguf_name(tensor), shape, np.dtype(np.float32), 4 * shape[0])
            written.append(partial(np.ones, shape, np.float32))
            continue
        layer = int(tensor.split(".")[1]) if tensor.startswith("layers.") else 1
        large = layer % 2 and tensor.split(".")[-2] not in ("wq", "wk", "wo", "w1", "w3")
        block, blocks = made[(only if tensor.startswith("layers.") else "") or ("q6_K" if large else "q4_K")]
        bytes_ = (shape[0], shape[1] // block.weights * blocks.shape[1])
        found = Type[block.name.upper()]
        writer.add_tensor_info(gguf_name(tensor), bytes_, np.dtype(np.uint8), bytes_[0] * bytes_[1], found)
        written.append(partial(_repeated, blocks, 1009 * at, bytes_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in written:  # one at a time: no second copy of the model in memory
        writer.write_tensor_data(values())
    writer.close()


def _repeated(blocks: np.ndarray[Any, Any], first: int, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.resize(np.roll(blocks, -first, axis=0), shape)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
