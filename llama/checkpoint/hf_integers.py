"""Matrices of integer codes, packed into 32-bit words from the lowest bits up: AWQ, GPTQ, compressed-tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint.base import FLOATS
from llama.checkpoint.hf_files import TensorFiles
from llama.checkpoint.hf_matrix import QuantisedMatrix
from llama.checkpoint.hf_scheme import Scheme
from llama.names import Cut
from wsm.errors import UnusableInput
from wsm.formats.format import Shape
from wsm.formats.integer import Integer

_PIECE = 1 << 20
"""Codes that are unpacked at once: no second copy of a matrix, and long enough stretches of each row of a file."""
_GROUPS = (128, 64, 32)
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word the outputs 0 to 7 are."""
_NO_ACT_ORDER = "take a version of the model that was quantised without it"


class _Integers(QuantisedMatrix):
    """Integer codes; a subclass says where they, the scales and the zeros lie."""

    weight_format: Integer

    def __init__(self, files: TensorFiles, module: str, shape: Shape, scheme: Scheme) -> None:
        super().__init__(files, module, shape, scheme)
        cols, group = shape[1], scheme.group
        self._source_groups = -(-cols // group) if group else 1
        scales, zeros = self._find()
        self._scales, self._zeros = scales, zeros
        stored = next((size for size in _GROUPS if group % size == 0), 0) if group else 0
        self._repeat = min(group, cols + stored) // stored if stored else 1
        dtype = files.describe(scales).dtype
        self.weight_format = Integer(scheme.bits, stored, dtype, zeros is not None)

    def _refuse_act_order(self, name: str) -> None:
        """Refuse inputs that are not in the order of their groups, which act-order makes."""
        if not self._has(name):
            if self._scheme.act_order:
                raise UnusableInput(f"{self._where} lacks {name}, which act-order (desc_act) needs; {_NO_ACT_ORDER}")
            return
        cols = self.shape[1]
        found = self._files.tensor(self._expect(name, ("I32", "I64"), (cols,)))
        if not torch.equal(found.long(), torch.arange(cols) // (self._scheme.group or cols)):
            raise UnusableInput(f"{self._where}: act-order (desc_act) does not run here; {_NO_ACT_ORDER}")

    @abstractmethod
    def _find(self) -> tuple[str, str | None]:
        """Check all tensors; the names of the scales and of the zeros, None where the middle is meant."""

    @abstractmethod
    def _values_of(self, rows: slice, cols: slice) -> Tensor:
        """Codes of a part whose columns begin and end with a byte, as the plane ``values`` has them."""

    @abstractmethod
    def _scales_of(self, rows: slice) -> Tensor:
        """``[rows, groups]``, or ``[rows, 1]``."""

    @abstractmethod
    def _zeros_of(self, rows: slice) -> Tensor:
        """``[rows, groups]``, uint8."""

    @property
    def _together(self) -> int:
        return self.weight_format.group or 8 // self.weight_format.bits

    def _fill(self, planes: Mapping[str, Tensor], cut: Cut) -> None:
        rows, cols = slice(cut.row, cut.row + cut.rows), slice(cut.column, cut.column + cut.columns)
        step = max(8, _PIECE // cut.columns // 8 * 8)
        for begin in range(0, cut.rows, step):
            piece = slice(cut.row + begin, min(cut.row + begin + step, rows.stop))
            planes["values"][begin : begin + step] = self._values_of(piece, cols)
        planes["scales"].copy_(self._grouped(self._scales_of(rows), cols))
        if self._zeros is not None:
            planes["zeros"].copy_(self._grouped(self._zeros_of(rows), cols))

    def _grouped(self, found: Tensor, cols: slice) -> Tensor:
        """Those of the groups of ``cols``; a source's group may be several of ours."""
        if not (width := self.weight_format.group):
            return found
        groups = slice(cols.start // width, -(-cols.stop // width))
        return found.repeat_interleave(self._repeat, 1)[:, groups]


class Awq(_Integers):
    """``qweight`` ``[inputs, outputs / 8]``: a word has outputs in an order of its own, as one of ``qzeros`` has.

    Source: AutoAWQ's ``WQLinear_GEMM``.
    """

    codes = "qweight"

    def _find(self) -> tuple[str, str]:
        (rows, cols), groups = self.shape, self._source_groups
        words = _whole_words(rows, self._scheme.bits, f"{self._where}: outputs")
        self._codes = self._expect("qweight", ("I32",), (cols, words))
        return self._expect("scales", FLOATS, (groups, rows)), self._expect("qzeros", ("I32",), (groups, words))

    def _values_of(self, rows: slice, cols: slice) -> Tensor:
        words, inside = _words_of(rows, 4)
        found = self._files.tensor(self._codes)[cols, words].t()
        octets = _octets(F.pad(found, (0, found.shape[1] % 2))).view(found.shape[0], -1, 2, 4)
        values = octets.new_empty(found.shape[0], 8, octets.shape[1])
        for output, place in enumerate(_AWQ_ORDER):
            even, odd = octets[:, :, :, place // 2].unbind(-1)
            values[:, output] = (even >> 4 | odd & 0xF0) if place % 2 else (even & 0xF | odd << 4)
        return values.flatten(0, 1)[inside]

    def _scales_of(self, rows: slice) -> Tensor:
        return self._files.tensor(self._scales)[:, rows].t()

    def _zeros_of(self, rows: slice) -> Tensor:
        words, inside = _words_of(rows, 4)
        assert self._zeros is not None
        return _reordered(_unpacked(self._files.tensor(self._zeros)[:, words], 4))[:, inside].t()


class Gptq(_Integers):
    """``qweight`` ``[inputs x bits / 32, outputs]``: a word has neighbouring inputs; of ``qzeros``, outputs.

    Source: AutoGPTQ's ``QuantLinear`` and GPTQModel's, which keeps zeros as they are in its second version.
    """

    codes = "qweight"

    def _find(self) -> tuple[str, str | None]:
        (rows, cols), groups, bits = self.shape, self._source_groups, self._scheme.bits
        inputs = _whole_words(cols, bits, f"{self._where}: inputs")
        outputs = _whole_words(rows, bits, f"{self._where}: outputs")
        self._codes = self._expect("qweight", ("I32",), (inputs, rows))
        self._middle = self._expect("qzeros", ("I32",), (groups, outputs))
        self._refuse_act_order("g_idx")
        if self._has("bias"):
            bias = self._files.tensor(self._expect("bias", FLOATS, (rows,)))
            if bool(bias.any()):
                raise UnusableInput(f"{self._where}: a bias that is not zero does not run here")
        return self._expect("scales", FLOATS, (groups, rows)), self._middle if self._scheme.has_zeros else None

    def _fill(self, planes: Mapping[str, Tensor], cut: Cut) -> None:
        middle = 1 << self._scheme.bits - 1
        if self._zeros is None and bool((self._zeros_of(slice(cut.row, cut.row + cut.rows)) != middle).any()):
            raise UnusableInput(
                f"{self._where}: qzeros are not all {middle}, so sym must be false in its configuration"
            )
        super()._fill(planes, cut)

    def _values_of(self, rows: slice, cols: slice) -> Tensor:
        words, inside = _octets_of(cols, self._scheme.bits)
        return _octets(self._files.tensor(self._codes)[words, rows].t())[:, inside]

    def _scales_of(self, rows: slice) -> Tensor:
        return self._files.tensor(self._scales)[:, rows].t()

    def _zeros_of(self, rows: slice) -> Tensor:
        bits = self._scheme.bits
        words, inside = _words_of(rows, bits)
        zeros = _unpacked(self._files.tensor(self._middle)[:, words], bits)[:, inside].t()
        return (zeros + self._scheme.minus_one) & (1 << bits) - 1


class _Rowwise(_Integers):
    """compressed-tensors: codes, scales and zeros in the order of the matrix, less the middle of the codes.

    Source: its ``PackedQuantizationCompressor`` and ``NaiveQuantizationCompressor``.
    """

    def _find(self) -> tuple[str, str | None]:
        (rows, cols), groups, bits = self.shape, self._source_groups, self._scheme.bits
        if self.codes == "weight":
            self._codes = self._expect("weight", ("I8",), (rows, cols))
        else:
            self._codes = self._expect("weight_packed", ("I32",), (rows, -(-cols * bits // 32)))
            self._refuse_act_order("weight_g_idx")
            if self._has("weight_shape"):
                told = self._files.tensor(self._expect("weight_shape", ("I64", "I32"), (2,))).tolist()
                if told != [rows, cols]:
                    raise UnusableInput(
                        f"{self._where}: weight_shape is {told}, but config.json asks for {[rows, cols]}"
                    )
        alone: tuple[tuple[int, ...], ...] = () if self._scheme.group else ((rows,), (1, 1), (1,), ())
        scales = self._expect("weight_scale", FLOATS, (rows, groups), *alone)
        if not self._has("weight_zero_point") and not self._scheme.has_zeros:
            return scales, None
        packed = () if self.codes == "weight" else ((-(-rows * bits // 32), groups),)
        stored = self._files.describe(f"{self._module}.weight_zero_point")
        shapes = packed if stored.dtype == "I32" else ((rows, groups), *alone)
        return scales, self._expect("weight_zero_point", ("I8", "I32") if packed else ("I8",), *shapes)

    def _scales_of(self, rows: slice) -> Tensor:
        return self._by_row(self._files.tensor(self._scales))[rows]

    def _zeros_of(self, rows: slice) -> Tensor:
        assert self._zeros is not None
        zeros, bits = self._files.tensor(self._zeros), self._scheme.bits
        if zeros.dtype == torch.int8:
            return self._by_row(zeros)[rows].view(torch.uint8) + (1 << bits - 1)
        words, inside = _words_of(rows, bits)
        return _unpacked(zeros[words].t(), bits)[:, inside].t()

    def _by_row(self, found: Tensor) -> Tensor:
        rows = self.shape[0]
        return found.view(-1, 1).expand(rows, 1) if found.numel() in (1, rows) else found.view(rows, -1)


class Packed(_Rowwise):
    codes = "weight_packed"

    def _values_of(self, rows: slice, cols: slice) -> Tensor:
        words, inside = _octets_of(cols, self._scheme.bits)
        return _octets(self._files.tensor(self._codes)[rows, words])[:, inside]


class Int8(_Rowwise):
    codes = "weight"

    def _values_of(self, rows: slice, cols: slice) -> Tensor:
        return self._files.tensor(self._codes)[rows, cols].view(torch.uint8) ^ 128


def _whole_words(count: int, bits: int, what: str) -> int:
    """Words that ``count`` codes fill; UnusableInput where they fill none to its end."""
    if count * bits % 32:
        raise UnusableInput(f"{what} ({count}) are no multiple of {32 // bits}, as this layout needs")
    return count * bits // 32


def _words_of(codes: slice, bits: int) -> tuple[slice, slice]:
    """The words that hold a stretch of codes, and where in what they hold it is."""
    each = 32 // bits
    first = codes.start // each
    return slice(first, -(-codes.stop // each)), slice(codes.start - first * each, codes.stop - first * each)


def _octets(words: Tensor) -> Tensor:
    """int32 ``[n, words]`` as bytes ``[n, 4 x words]``; of a single word a transposed view counts as contiguous."""
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _octets_of(codes: slice, bits: int) -> tuple[slice, slice]:
    """As :func:`_words_of`, in bytes: neighbouring codes lie in a word as in our planes."""
    words, inside = _words_of(codes, bits)
    return words, slice(inside.start * bits // 8, -(-inside.stop * bits // 8))


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 ``[n, words]`` as codes ``[n, words x 32 / bits]``, uint8, from the lowest bits up."""
    octets = _octets(words)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(1)


def _reordered(codes: Tensor) -> Tensor:
    """AWQ's codes ``[n, outputs]`` in the order of the outputs: in a word they are 0, 2, 4, 6, 1, 3, 5, 7."""
    return codes.view(codes.shape[0], -1, 8)[:, :, _AWQ_ORDER].flatten(1)
