"""What importing the package gives, and what it costs."""

from __future__ import annotations

import pytest


def test_the_model_is_imported_from_the_package() -> None:
    import llama
    from llama import LLaMA

    assert LLaMA is llama.LLaMA
    assert LLaMA.__module__ == "llama.llm"


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    import llama

    with pytest.raises(AttributeError, match="Llama"):
        llama.Llama  # noqa: B018
