"""GGUF files, as ggml's docs/gguf.md describes them: metadata, and where each tensor lies; the rest is only mapped.

The ``gguf`` package's own reader makes arrays of every string (15 s for a vocabulary of 128 256) and follows any count
that a file names, so the header is read here, within bounds; the package names the types and their sizes.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.fields import MOST_WHOLE
from llama.files import AGAIN, refuse_pointer
from wsm.errors import UnusableInput

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_TENSORS, MOST_FIELDS, MOST_ITEMS, MOST_DIMENSIONS = 1 << 17, 1 << 16, 1 << 21, 4
"""Of a file; items are those of all its arrays. No LLaMA has half of them."""
MOST_STRING = 16 << 20
MOST_HEADER = 256 << 20
DEFAULT_ALIGNMENT, LEAST_ALIGNMENT, MOST_ALIGNMENT = 32, 8, 1 << 20

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """A tensor of a file: ``type`` as ggml spells it, ``shape`` with the row length last, ``offset`` and ``nbytes`` in
    the file."""

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """A file, mapped; UnusableInput for one that is damaged, cut short, or no GGUF file of a version known here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_pointer(path)
        self.data = _mapped(path)
        reader = _Reader(path, self.data.numpy().data)
        tensors, fields = reader.begin()
        self.fields = _unique([reader.field() for _ in range(fields)], path, "metadata field")
        found = [reader.tensor() for _ in range(tensors)]
        begin = _aligned(reader.place, self._alignment())
        self.tensors = {tensor.name: self._placed(tensor, begin) for tensor in found}
        _unique([(name, None) for name, *_ in found], path, "tensor")
        self._check_apart()

    def _alignment(self) -> int:
        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment & (alignment - 1) or not 8 <= alignment <= MOST_ALIGNMENT:
            raise damaged(self.path, f"general.alignment is {alignment!r:.40}, no power of two from 8 on")
        return alignment

    def _placed(self, tensor: _Entry, begin: int) -> GGUFTensor:
        name, shape, number, offset = tensor
        type_name, block, nbytes_of_block = _type(number, self.path, name)
        count = 1
        for size in shape:
            count *= size
        if shape[-1] % block:
            raise damaged(self.path, f"{name}: rows of {shape[-1]} are no whole blocks of {type_name}")
        nbytes = count // block * nbytes_of_block
        if offset % self._alignment() or begin + offset + nbytes > len(self.data):
            raise damaged(
                self.path,
                f"{name}: {nbytes} bytes at {offset} of the tensors' part are not aligned, or end beyond the file's "
                f"{len(self.data)} bytes: it is cut short, or was changed",
            )
        return GGUFTensor(self.path, name, type_name, shape, begin + offset, nbytes)

    def _check_apart(self) -> None:
        end, last = 0, ""
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise damaged(self.path, f"{tensor.name} lies within {last}")
            end, last = tensor.offset + tensor.nbytes, tensor.name

    def bytes_of(self, tensor: GGUFTensor) -> Tensor:
        """The bytes of a tensor, ``uint8``: a view of the mapped file."""
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]


def damaged(path: Path, reason: str) -> UnusableInput:
    """The error for a file that cannot be right."""
    return UnusableInput(f"{path} is damaged ({reason}); {AGAIN}")


def _mapped(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UnusableInput(f"{path} cannot be mapped: {getattr(error, 'strerror', None) or error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nobody may write to it, which nobody does
        return torch.frombuffer(memory, dtype=torch.uint8)


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _unique(pairs: list[tuple[str, Any]], path: Path, what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise damaged(path, f"{what} {name!r:.80} comes twice")
        found[name] = value
    return found


def _type(number: int, path: Path, name: str) -> tuple[str, int, int]:
    """A tensor's type: its name, weights in a block and bytes of one."""
    import gguf

    try:
        found = gguf.GGMLQuantizationType(number)
        weights, nbytes = gguf.GGML_QUANT_SIZES[found]
    except (ValueError, KeyError):
        raise damaged(path, f"{name}: no tensor type has the number {number}") from None
    return found.name, weights, nbytes


class _Entry(NamedTuple):
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Reader:
    """Goes through the header once. What it takes is in the file, so its work is bounded by counts that are checked."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.place, self._items = 0, 0
        self._path, self._data = path, data[:MOST_HEADER]

    def begin(self) -> tuple[int, int]:
        """How many tensors and fields there are."""
        if bytes(self._data[:4]) != MAGIC:
            raise damaged(self._path, "it does not begin as a GGUF file does")
        self.place = 4
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

    def _take(self, nbytes: int) -> memoryview:
        end = self.place + nbytes
        if end > len(self._data):
            raise damaged(self._path, "it ends within its header: it is cut short, or was changed")
        taken, self.place = self._data[self.place : end], end
        return taken
