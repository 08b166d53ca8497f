"""What a caller has set for torch in general, kept out of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_torch() -> Iterator[None]:
    """In here no default device, autocast or inference mode of the caller counts; also a decorator.

    The threads that load weights could not fill the tensors of inference mode, and autocast would change the results.
    """
    with contextlib.ExitStack() as own:
        own.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            own.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # else it would cost each torch call a little
            own.enter_context(torch.device("cpu"))
        yield
