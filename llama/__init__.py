"""The model: configuration, checkpoints, tokenizers, transformer and generation. Knows nothing of memory tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.llm import LLaMA

__all__ = ["LLaMA"]


def __getattr__(name: str) -> Any:
    """``LLaMA`` is imported when it is first asked for: it needs torch, which takes seconds."""
    if name != "LLaMA":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llama.llm import LLaMA

    return LLaMA
