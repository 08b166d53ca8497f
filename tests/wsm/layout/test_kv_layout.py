"""What goes together where KV lies."""

from __future__ import annotations

import pytest

from wsm.layout.kv import runs_of


@pytest.mark.parametrize(
    ("keys", "end", "runs"),
    [
        ([1, 1, 0, 2, 2, 2], 0, [(1, 0, 2), (0, 2, 3), (2, 3, 6)]),
        ([4, 4, 5], 7, [(4, 7, 9), (5, 9, 10)]),
        ([], 3, []),
    ],
)
def test_equal_neighbours_are_one_run(
    keys: list[int | None], end: int, runs: list[tuple[int | None, int, int]]
) -> None:
    assert list(runs_of(keys, end)) == runs
