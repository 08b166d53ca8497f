"""Packed stores of LLaMAs: the weight streaming manager's, told what it cannot know of a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llama.checkpoint.shard import share_of
from llama.config import ModelConfig
from wsm.store import cache, manifest
from wsm.store import pack as packing

read_manifest = partial(manifest.read_manifest, read_shape=ModelConfig.from_json)
pack = partial(packing.pack, cut=share_of)
cached_store = partial(cache.cached_store, cut=share_of)


def stored_config(path: Path) -> ModelConfig | None:
    """The model that a manifest describes; None for version 1, which does not."""
    if manifest.load_json(path)["version"] == 1:
        return None
    config = read_manifest(path).config
    assert isinstance(config, ModelConfig)
    return config
