"""What importing the package gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.parametrize("module", ["config", "files", "loading", "names", "tokenizer"])
def test_what_the_command_line_reads_is_imported_without_torch(module: str) -> None:
    code = f"import sys, llama.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
