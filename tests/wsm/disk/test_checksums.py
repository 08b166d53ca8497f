"""Checksums, held against xxhash's one-shot functions, which are not to be used for what is large."""

from __future__ import annotations

import os

import pytest
import xxhash

from wsm.disk.checksums import xxh3_64, xxh3_128


@pytest.mark.parametrize("nbytes", [0, 1, 240, 241, 4096, (1 << 20) + 5])
def test_they_are_those_of_the_one_shot_functions_and_do_not_use_them(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of xxhash 3 hold the interpreter until they are done."""
    data = os.urandom(nbytes)
    expected = xxhash.xxh3_64_intdigest(data), xxhash.xxh3_128_hexdigest(data)
    for name in [name for name in dir(xxhash) if name.endswith("digest")]:
        monkeypatch.delattr(xxhash, name)
    assert (xxh3_64(memoryview(data)), xxh3_128(memoryview(data))) == expected
