"""Is a store the one that a run needs: this model, this number of ranks, this dtype?"""

from __future__ import annotations

import torch

from wsm.errors import UnusableInput
from wsm.layout.model import ModelShape
from wsm.store.description import DTYPE_NAMES, StoreDescription


def check_suits(
    description: StoreDescription, config: ModelShape, dtype: torch.dtype | None, ranks: int, model_flags: str
) -> None:
    """Refuse a store of another model, for another number of ranks, or of another dtype than asked for.

    Args:
        config: the whole model's.
        dtype: None where any will do.
        model_flags: how the user named the model, for the command that mends it.

    Raises:
        UnusableInput: with the `pack` command that mends it.
    """
    found = description.config.to_json()
    for part, asked in config.to_json().items():
        stored = found.get(part)
        if stored != asked and part != "name":
            raise UnusableInput(
                f"--manifest {description.path} holds {description.config.name} ({part} {stored}), "
                f"the model is {config.name} ({part} {asked}): give the checkpoint that was packed"
            )
    packed_for = description.shard.size
    if packed_for != ranks:
        raise UnusableInput(
            f"the store of {description.path} is packed for {packed_for} rank{'s' * (packed_for > 1)}, this run has "
            f"{ranks}; pack another: {_pack_command(model_flags, f'--tp {ranks}')}, or start it with torchrun "
            f"--nproc-per-node {packed_for}"
        )
    if dtype is not None and dtype != description.dtype:
        raise UnusableInput(
            f"the store of {description.path} holds {DTYPE_NAMES[description.dtype]}; pack another: "
            + _pack_command(model_flags, f"--dtype {DTYPE_NAMES[dtype]}")
        )


def _pack_command(model_flags: str, more: str) -> str:
    return " ".join(filter(None, ["bench_infer.py pack", model_flags, more, "--to TARGET --manifest FILE"]))
