"""Manifests of packed LLaMAs: the store's, with the model's shape read as a ModelConfig."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llama.config import ModelConfig
from wsm.store import manifest

read_manifest = partial(manifest.read_manifest, read_shape=ModelConfig.from_json)


def stored_config(path: Path) -> ModelConfig | None:
    """The model that a manifest describes; None for version 1, which does not."""
    if manifest.load_json(path)["version"] == 1:
        return None
    config = read_manifest(path).config
    assert isinstance(config, ModelConfig)
    return config
