"""When Ctrl-C counts: after an import that it would break."""

from __future__ import annotations

import signal

import pytest

from bench.run.job import unbroken


def test_ctrl_c_counts_once_the_imports_have_ended() -> None:
    ended: list[bool] = []

    def imports() -> None:
        signal.raise_signal(signal.SIGINT)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt), unbroken():
        imports()
    assert ended
    with unbroken():
        pass
    with pytest.raises(KeyboardInterrupt):  # as before
        signal.raise_signal(signal.SIGINT)
