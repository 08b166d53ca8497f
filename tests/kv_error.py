"""What int8 KV changes in the logits of small random LLaMAs, on the CPU: python tests/kv_error.py

The figures of docs/KV.md: against KV in the model's dtype, with the same weights and tokens (3 rows of 400).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llama.llm import LLaMA
from tests.tiny import hf_directory, hf_model

TOKENS = torch.randint(0, 256, (3, 400), generator=torch.Generator().manual_seed(0)).tolist()


def logits(directory: Path, dtype: str, kv_dtype: str) -> Tensor:
    config = {"dtype": dtype, "kv_dtype": kv_dtype}
    with LLaMA.build(
        str(directory), mode="full", mode_config=config, device="cpu", max_seq_len=512, max_batch_size=3
    ) as llm:
        return llm.logits(TOKENS).double()


def main() -> None:
    for head_dim in (24, 128):
        with tempfile.TemporaryDirectory() as name:
            directory = hf_directory(Path(name), hf_model(head_dim=head_dim))
            exact = logits(directory, "float32", "auto")
            for dtype in ("float32", "bfloat16"):
                plain, found = logits(directory, dtype, "auto"), logits(directory, dtype, "int8")
                rms = 100 * (found - plain).norm() / plain.norm()
                same = 100 * (found.argmax(-1) == plain.argmax(-1)).double().mean()
                print(
                    f"heads of {head_dim}, {dtype}: rms {rms:.2f} %, largest {(found - plain).abs().max():.3f} of "
                    f"logits of rms {plain.square().mean().sqrt():.3f}; same best token {same:.1f} %; "
                    f"rms of the dtype itself {100 * (plain - exact).norm() / exact.norm():.2f} %"
                )


if __name__ == "__main__":
    main()
