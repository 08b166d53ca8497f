"""The program as tests call it: in their own process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench_infer import command_line

Run = Callable[..., tuple[int, str, str]]
"""The exit code of a command line, and what it said on standard output and standard error."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command_line([str(word) for word in argv])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run
