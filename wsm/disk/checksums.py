"""Checksums of bytes that are moved, made beside other threads.

By ``update``, which lets others run meanwhile: the one-shot functions of xxhash 3 keep the interpreter until they are
done, 50 ms for a gigabyte, in which nobody queues a copy.
"""

from __future__ import annotations

import xxhash


def xxh3_64(data: memoryview) -> int:
    """xxh3-64 of bytes that lie in one piece."""
    found = xxhash.xxh3_64()
    found.update(data)
    return int(found.intdigest())


def xxh3_128(data: memoryview) -> str:
    """xxh3-128 of bytes that lie in one piece, as hexadecimal digits."""
    found = xxhash.xxh3_128()
    found.update(data)
    return str(found.hexdigest())
