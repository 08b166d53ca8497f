"""Checksums of bytes that are moved, made beside other threads.

By objects, which let others run meanwhile: the one-shot functions of xxhash 3 keep the interpreter until they are done,
50 ms for a gigabyte, in which nobody queues a copy.
"""

from __future__ import annotations

import xxhash


def xxh3_64(data: memoryview) -> int:
    """xxh3-64 of bytes that lie in one piece."""
    return int(xxhash.xxh3_64(data).intdigest())


def xxh3_128(data: memoryview) -> str:
    """xxh3-128 of bytes that lie in one piece, as hexadecimal digits."""
    return str(xxhash.xxh3_128(data).hexdigest())
