"""Which matrices of a Hugging Face directory are quantised, and what else its modules may hold."""

from __future__ import annotations

from llama.checkpoint.base import FLOATS
from llama.checkpoint.hf_files import TensorFiles
from llama.checkpoint.hf_integers import Awq, Gptq, Int8, Packed
from llama.checkpoint.hf_matrix import Fp8, QuantisedMatrix
from llama.checkpoint.hf_scheme import Layout, Scheme
from wsm.formats.format import Shape

_KINDS: dict[Layout, type[QuantisedMatrix]] = {
    Layout.AWQ: Awq,
    Layout.GPTQ: Gptq,
    Layout.PACKED: Packed,
    Layout.INT8: Int8,
    Layout.FP8: Fp8,
}
NOT_USED = (
    *("input_scale", "input_scale_ub", "input_zero_point", "output_scale", "output_zero_point"),
    *("k_scale", "v_scale", "q_scale", "kv_scale"),
)
"""What a module may hold for quantised activations and KV, which stay as they are computed here."""


def quantised_matrix(files: TensorFiles, module: str, shape: Shape, scheme: Scheme) -> QuantisedMatrix | None:
    """The matrix of a module if the files hold it in codes; None where it is a plain one, or missing.

    UnusableInput where tensors of it are missing or are not of the shapes that the scheme asks for.
    """
    kind = _KINDS[scheme.layout]
    name = f"{module}.{kind.codes}"
    if name not in files or (kind.codes == "weight" and files.describe(name).dtype in FLOATS):
        return None
    return kind(files, module, shape, scheme)
