"""The two models of the parallel tests, both of heads that 1, 2 and 4 ranks divide, and how they are placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import LLAMA31_ROPE, hf_directory, hf_model

PROMPTS = [list(range(5, 45)), [7, 8, 9]]
PLACES: dict[str, Any] = {"gpu_cached_layers": 1, "cpu_cache_layers": 2, "prefetch_distance": 1, "warmup_layers": 1}
N_LAYERS = 3
SHAPES: dict[str, dict[str, Any]] = {
    # SmolLM2's proportions (its 9 heads and 3 KV heads made 12 and 4), its tied embedding and its theta.
    "smollm2": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "llama31": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rope_parameters": {**LLAMA31_ROPE, "rope_theta": 500000.0},
    },
}


def make_models(home: Path) -> list[Path]:
    """Random float32 models of both shapes, saved; their directories."""
    return [
        hf_directory(home / name, hf_model(**{"num_hidden_layers": N_LAYERS, "initializer_range": 0.1, **shape}))
        for name, shape in SHAPES.items()
    ]
