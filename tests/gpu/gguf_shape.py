"""A GGUF file of random blocks in a real model's shape: python tests/gpu/gguf_shape.py NAME LAYERS FILE

Matrices are q4_K, but w2 and wv of every second layer, embedding and head q6_K: what `Q4_K_M` is, more
or less. It has no tokenizer: `--prompt-len` needs none.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

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


def main(name: str, layers: int, path: Path) -> None:
    config = dataclasses.replace(PRESETS[name], n_layers=layers)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata(config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    made = {}
    for kind in ("q4_K", "q6_K"):
        block = registry.get(kind)
        assert isinstance(block, BlockType)
        made[kind] = block, block.seeded(SEEDED, config.dim**-0.5, seed=1).numpy()
    for at, (tensor, shape) in enumerate(all_tensors(config)):
        if len(shape) == 1:
            writer.add_tensor(gguf_name(tensor), np.ones(shape, dtype=np.float32))
            continue
        layer = int(tensor.split(".")[1]) if tensor.startswith("layers.") else 1
        block, blocks = made[
            "q6_K" if layer % 2 and tensor.split(".")[-2] not in ("wq", "wk", "wo", "w1", "w3") else "q4_K"
        ]
        rows = np.take(blocks, np.arange(shape[0] * shape[1] // block.weights) + 1009 * at, axis=0, mode="wrap")
        writer.add_tensor(gguf_name(tensor), rows.reshape(shape[0], -1), raw_dtype=Type[block.name.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
