"""Whether the ranks' shares of a model suit its weight formats: what belongs together cannot be parted."""

from __future__ import annotations

import torch

from wsm.errors import UnusableInput
from wsm.formats.mix import Formats, Mix, columns_together, format_of
from wsm.layout.groups import is_encoded, pass_order
from wsm.layout.model import ModelShape


def check_cuts(config: ModelShape, dtype: torch.dtype, ranks: int, formats: Formats) -> None:
    """UnusableInput, with the numbers of ranks that can be, where a rank's share of a matrix does not suit its
    format."""
    if (reason := _unsuited(config, ranks, dtype, formats)) is None:
        return
    possible = [str(n) for n in range(1, config.n_kv_heads + 1) if _can_share(config, n, dtype, formats)]
    if not possible:
        raise UnusableInput(f"{config.name}: {reason}")
    raise UnusableInput(
        f"{config.name} cannot be cut for {ranks} ranks, its {reason}: start it with torchrun --nproc-per-node "
        f"{' or '.join(possible)}"
    )


def _unsuited(config: ModelShape, ranks: int, dtype: torch.dtype, formats: Formats) -> str | None:
    """Why a share's matrix cannot be in its format.

    Weights that are encoded are so a share at a time. Those that come encoded are cut as they lie.
    """
    share = config.share(ranks)
    for group in pass_order(config.n_layers):
        for whole, part in zip(config.specs(group.kind), share.specs(group.kind), strict=True):
            found = format_of(formats, config.full_name(group, whole.name)) if is_encoded(whole) else None
            if found is None:
                continue
            try:
                found.planes((part.shape[0], part.shape[1]), dtype)
            except UnusableInput as error:
                return f"{whole.name} being in {error}"
            together = columns_together(found)
            if isinstance(formats, Mix) and part.shape[1] != whole.shape[1] and part.shape[1] % together:
                return f"{whole.name} being in {found.name}, whose groups of {together} weights cannot be parted"
    return None


def _can_share(config: ModelShape, ranks: int, dtype: torch.dtype, formats: Formats) -> bool:
    try:
        return _unsuited(config, ranks, dtype, formats) is None
    except UnusableInput:  # heads or another dimension cannot be cut so
        return False
