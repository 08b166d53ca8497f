"""A quantised matrix of a Hugging Face directory: the tensors it consists of, as planes of a weight format of ours.

The layouts are those that AutoAWQ, AutoGPTQ and GPTQModel, compressed-tensors and vLLM write and read. Nothing is
quantised here: codes, zeros and scales keep their values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from llama.checkpoint.base import FLOATS
from llama.checkpoint.hf_files import TensorFiles
from llama.checkpoint.hf_scheme import Scheme
from llama.names import Cut
from wsm.errors import StoreError, UnusableInput
from wsm.formats.format import Shape
from wsm.formats.fp8 import Float8
from wsm.formats.integer import Integer


class QuantisedMatrix(ABC):
    """A matrix ``shape`` (outputs, inputs) as planes of its ``weight_format``; ``names`` are the tensors behind it."""

    codes: ClassVar[str]
    """The tensor that holds the codes, by the last part of its name."""
    weight_format: Integer | Float8

    def __init__(self, files: TensorFiles, module: str, shape: Shape, scheme: Scheme) -> None:
        self.shape, self._files, self._module, self._scheme = shape, files, module, scheme
        self.names: list[str] = []

    @property
    def _together(self) -> int:
        """Columns that cannot be parted."""
        return 1

    def fill(self, planes: Mapping[str, Tensor], cut: Cut) -> None:
        """Put a part of the matrix into ``planes``; its columns must begin and end where groups do.

        UnusableInput for values that cannot be: NaN among them, or zeros beyond the codes.
        """
        if cut.column % self._together or (cut.columns % self._together and cut.column + cut.columns != self.shape[1]):
            raise UnusableInput(f"{self._where}: it cannot be cut at input {cut.column}, inside of a group")
        self._fill(planes, cut)
        try:
            self.weight_format.check((cut.rows, cut.columns), planes)
        except StoreError as error:
            raise UnusableInput(f"{self._where}: {error}") from error

    def planes(self, cut: Cut) -> dict[str, Tensor]:
        """A part of the matrix in new memory, as :meth:`fill` has it."""
        made = self.weight_format.planes((cut.rows, cut.columns))
        planes = {plane.name: torch.empty(plane.shape, dtype=plane.dtype) for plane in made}
        self.fill(planes, cut)
        return planes

    @abstractmethod
    def _fill(self, planes: Mapping[str, Tensor], cut: Cut) -> None: ...

    @property
    def _where(self) -> str:
        return f"{self._files.path(f'{self._module}.{self.codes}')}: {self._module}"

    def _expect(self, name: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> str:
        """The name of a tensor of the module that is there, of one of ``dtypes`` and ``shapes``; else UnusableInput."""
        stored = self._files.describe(f"{self._module}.{name}")
        if stored.dtype not in dtypes:
            raise UnusableInput(
                f"{stored.path}: {stored.name} is of dtype {stored.dtype}, where {' or '.join(dtypes)} belongs"
            )
        if stored.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise UnusableInput(
                f"{stored.path}: {stored.name} has shape {list(stored.shape)}, but config.json asks for {wanted}: the "
                "two are not of the same model"
            )
        self.names.append(stored.name)
        return stored.name

    def _has(self, name: str) -> bool:
        return f"{self._module}.{name}" in self._files


class Fp8(QuantisedMatrix):
    """``weight`` in E4M3 with a scale, or one a row, by which it is multiplied: also where it is named the inverse."""

    codes = "weight"
    weight_format: Float8

    def __init__(self, files: TensorFiles, module: str, shape: Shape, scheme: Scheme) -> None:
        super().__init__(files, module, shape, scheme)
        self._codes = self._expect("weight", ("F8_E4M3",), tuple(shape))
        inverse = self._has("weight_scale_inv") and not self._has("weight_scale")
        name, one, by_row = "weight_scale_inv" if inverse else "weight_scale", ((), (1,), (1, 1)), (shape[0], 1)
        self._scales = self._expect(name, FLOATS, *one, by_row, by_row[:1])
        if self._has("weight_zero_point"):
            zeros = self._files.tensor(self._expect("weight_zero_point", ("I8", "F8_E4M3", *FLOATS), *one, by_row))
            if bool(zeros.float().any()):
                raise UnusableInput(f"{self._where}: fp8 with zero points does not run here; without them it does")
        self.weight_format = Float8(per_row=files.describe(self._scales).shape not in one)

    def _fill(self, planes: Mapping[str, Tensor], cut: Cut) -> None:
        rows, codes = slice(cut.row, cut.row + cut.rows), self._files.tensor(self._codes).view(torch.uint8)
        planes["values"].view(torch.uint8).copy_(codes[rows, cut.column : cut.column + cut.columns])
        scales = self._files.tensor(self._scales).float().view(-1)
        planes["scales"].copy_(scales[rows] if self.weight_format.per_row else scales)
