"""GGUF files, as ggml's docs/gguf.md describes them: metadata, and where each tensor lies, to be read when asked.

The ``gguf`` package's own reader makes an array of every string and follows any count that a file names; here the
header is read within bounds. Nothing is mapped: of a file that shrinks, or a drive that fails, a read tells, and a map
would end the process.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from llama.fields import MOST_WHOLE
from llama.files import AGAIN, refuse_pointer
from wsm.disk.io_threads import transfer_fully
from wsm.errors import StoreError, UnusableInput
from wsm.formats.gguf_blocks import TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_TENSORS, MOST_FIELDS, MOST_ITEMS, MOST_DIMENSIONS = 1 << 17, 1 << 16, 1 << 21, 4
"""Of a file; items are those of all its arrays. No LLaMA has half of them."""
MOST_STRING = 16 << 20
MOST_HEADER = 256 << 20
DEFAULT_ALIGNMENT, LEAST_ALIGNMENT, MOST_ALIGNMENT = 32, 8, 1 << 20
NAMES = (
    *("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S"),
    *("IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M"),
    *("BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"),
    *("NVFP4", "Q1_0"),
)
"""Of ggml's tensor types (ggml.h), by their numbers; some are in no file any more."""
SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)} | {t.name.upper(): (t.weights, t.nbytes) for t in TYPES.values()}
"""Of the types that run here: the weights of a block, and its bytes."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """A tensor of a file: ``type`` as ggml spells it, ``shape`` with the row length last, ``offset`` and ``nbytes`` in
    the file; 0 bytes of a type that does not run here."""

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // SIZES[self.type][0] * SIZES[self.type][1]


class GGUFFile:
    """A file, open; UnusableInput for one that is damaged, cut short, or no GGUF file of a version known here.

    ``check`` gets its metadata before its tensors are looked at: what does not run here need not be taken again.
    """

    def __init__(self, path: Path, check: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path = path
        refuse_pointer(path)
        try:
            self._file = path.open("rb")
            self._nbytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UnusableInput(f"{path} cannot be read: {error.strerror}") from error
        try:
            self._read_header(check)
        except BaseException:
            self.close()
            raise

    def _read_header(self, check: Callable[[Mapping[str, Any]], None] | None) -> None:
        reader = _Reader(self.path, self._file, self._nbytes)
        tensors, fields = reader.begin()
        self.fields = _unique([reader.field() for _ in range(fields)], self.path, "metadata field")
        if check is not None:
            check(self.fields)
        found = [reader.tensor() for _ in range(tensors)]
        _unique([(name, None) for name, *_ in found], self.path, "tensor")
        alignment = self._alignment()
        begin = -(-reader.place // alignment) * alignment
        self.tensors = {tensor.name: self._placed(tensor, begin, alignment) for tensor in found}
        self._check_apart()

    def _alignment(self) -> int:
        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        is_power = type(alignment) is int and alignment & (alignment - 1) == 0
        if not is_power or not LEAST_ALIGNMENT <= alignment <= MOST_ALIGNMENT:
            raise damaged(
                self.path, f"general.alignment is {alignment!r:.40}, no power of two from {LEAST_ALIGNMENT} on"
            )
        return int(alignment)

    def _placed(self, tensor: _Entry, begin: int, alignment: int) -> GGUFTensor:
        name, shape, number, offset = tensor
        type_name = NAMES[number] if number < len(NAMES) else f"number {number}"
        if type_name not in SIZES:  # whoever wants it refuses it by name
            return GGUFTensor(self.path, name, type_name, shape, begin, 0)
        block, nbytes_of_block = SIZES[type_name]
        if shape[-1] % block:
            raise damaged(self.path, f"{name}: rows of {shape[-1]} are no whole blocks of {type_name}")
        nbytes = math.prod(shape) // block * nbytes_of_block
        if offset % alignment or begin + offset + nbytes > self._nbytes:
            raise damaged(
                self.path,
                f"{name}: {nbytes} bytes at {offset} of the tensors' part are not aligned, or end beyond the file's "
                f"{self._nbytes} bytes: it is cut short, or was changed",
            )
        return GGUFTensor(self.path, name, type_name, shape, begin + offset, nbytes)

    def _check_apart(self) -> None:
        end, last = 0, ""
        for tensor in sorted(filter(attrgetter("nbytes"), self.tensors.values()), key=attrgetter("offset")):
            if tensor.offset < end:
                raise damaged(self.path, f"{tensor.name} lies within {last}")
            end, last = tensor.offset + tensor.nbytes, tensor.name

    def read_into(self, tensor: GGUFTensor, out: Tensor, at: int = 0) -> None:
        """Fill ``out``, contiguous, with a tensor's bytes from its byte ``at`` on; thread-safe. StoreError where the
        file has become shorter, or the drive fails."""
        part = out.view(-1).view(torch.uint8).numpy().data
        transfer_fully(os.preadv, self._file.fileno(), [part], tensor.offset + at, self._failed)

    def _failed(self, offset: int, error: OSError | int) -> StoreError:
        if isinstance(error, int):
            return StoreError(f"{self.path} ends at byte {offset + error}: it became shorter since it was opened")
        return StoreError(f"{self.path}: read error at byte {offset}: {error.strerror}")

    def close(self) -> None:
        self._file.close()


def damaged(path: Path, reason: str) -> UnusableInput:
    """The error for a file that cannot be right."""
    return UnusableInput(f"{path} is damaged ({reason}); {AGAIN}")


def _unique(pairs: list[tuple[str, Any]], path: Path, what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise damaged(path, f"{what} {name!r:.80} comes twice")
        found[name] = value
    return found


class _Entry(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Reader:
    """Goes through the header once. What it takes is in the file, so its work is bounded by counts that are checked."""

    def __init__(self, path: Path, file: BinaryIO, nbytes: int) -> None:
        self.place, self._items = 0, 0
        self._path, self._file, self._end = path, file, min(nbytes, MOST_HEADER)

    def begin(self) -> tuple[int, int]:
        """How many tensors and fields there are."""
        if self._take(len(MAGIC)) != MAGIC:
            raise damaged(self._path, "it does not begin as a GGUF file does")
        version = self._number("<I")
        if version not in VERSIONS:
            big_endian = ", for machines of the other byte order" if version and not version & 0xFFFF else ""
            raise UnusableInput(
                f"{self._path} is a GGUF file of version {version}{big_endian}; {VERSIONS[0]} and {VERSIONS[1]} are "
                "read here: convert the model with a newer llama.cpp"
            )
        return self._count("<Q", MOST_TENSORS, "tensors"), self._count("<Q", MOST_FIELDS, "metadata fields")

    def field(self) -> tuple[str, Any]:
        """A name and its value."""
        name = self._text()
        kind = self._number("<I")
        if kind == _STRING:
            return name, self._text()
        if kind == _ARRAY:
            return name, self._array(name)
        if kind not in _SCALARS:
            raise damaged(self._path, f"metadata field {name!r:.80}: no type has the number {kind}")
        return name, self._number(_SCALARS[kind])

    def _array(self, name: str) -> list[Any]:
        kind = self._number("<I")
        count = self._count("<Q", MOST_ITEMS - self._items, f"items of {name!r:.80}")
        self._items += count
        if kind == _STRING:
            return [self._text() for _ in range(count)]
        if kind not in _SCALARS:
            raise damaged(self._path, f"metadata field {name!r:.80}: an array of type {kind}, not of scalars or text")
        code = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{code[1]}", self._take(count * struct.calcsize(code))))

    def tensor(self) -> _Entry:
        """A tensor's description; nothing of its place is checked yet."""
        name = self._text()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise damaged(self._path, f"{name!r:.80} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))
        if not all(1 <= size <= MOST_WHOLE for size in shape):
            raise damaged(self._path, f"{name!r:.80} has shape {list(shape)!r:.80}")
        return _Entry(name, tuple(reversed(shape)), self._number("<I"), self._number("<Q"))

    def _text(self) -> str:
        length = self._count("<Q", MOST_STRING, "bytes of text")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self._path, f"the text at byte {self.place - length} is not UTF-8") from error

    def _count(self, code: str, most: int, what: str) -> int:
        count: int = self._number(code)
        if count > most:
            raise damaged(self._path, f"{count} {what}, more than any model has")
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, nbytes: int) -> bytes:
        taken = b""
        if self.place + nbytes <= self._end:
            try:
                taken = self._file.read(nbytes)
            except OSError as error:
                raise UnusableInput(f"{self._path} cannot be read: {error.strerror}") from error
        if len(taken) < nbytes:
            raise damaged(self._path, "it ends within its header: it is cut short, or was changed")
        self.place += nbytes
        return taken
