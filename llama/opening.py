"""Everything that a run reads, opened and checked before anything large is allocated: the model, and its draft."""

from __future__ import annotations

from pathlib import Path

import torch

from llama.checkpoint import (
    SYNTHETIC_DRAFT,
    Checkpoint,
    WeightlessCheckpoint,
    is_of_pair,
    open_checkpoint,
    synthetic_draft,
)
from llama.inputs import Inputs, OpenedDraft, choose_checkpoint, open_model, stored_config
from llama.options import PLAIN_FORMATS, BuildOptions
from llama.parallel.world import ALONE, World
from llama.speculation.shape import NGRAM
from llama.speculation.vocabulary import check_tokenizers, check_vocabulary
from llama.tokenizer import Tokenizer
from wsm.disk.safety import refuse_in_dev
from wsm.errors import UnusableInput
from wsm.option import meant, options_of
from wsm.settings import Settings
from wsm.store.description import DTYPE_NAMES

_ALIKE = ("prefill_chunk_tokens", "micro_batch", "kv_dtype", "kv_device", "auto")
"""Flags that ranks have to agree on, besides those of ``Settings``."""


def open_inputs(options: BuildOptions, world: World = ALONE) -> Inputs:
    """Open and check everything that the run reads; UnusableInput for what cannot be used."""
    options.check_together()
    if options.nodes > 1 and world.shard.size > 1:
        # A sum over ranks is added up in an order that may depend on the place in it.
        flag = f"--verify-rows {options.nodes}" if options.draft is None else f"--draft {options.draft}"
        raise UnusableInput(f"{flag} does not run on several ranks: leave it out, or run on one")
    refuse_in_dev(options.cache_dir.expanduser(), f"--cache-dir {options.cache_dir}")
    inputs = open_model(options, choose_checkpoint(options), world)
    inputs.draft = _open_draft(options, inputs)
    if world.shard.size > 1:
        world.agree(_facts(options, inputs))
        world.connect(inputs.device)
    return inputs


def _open_draft(options: BuildOptions, target: Inputs) -> OpenedDraft | None:
    """The draft that ``--draft`` names, of the target's vocabulary and on its device; else UnusableInput."""
    speculating = options.speculating
    if speculating is None:
        return None
    name = speculating.draft
    if is_of_pair(name) and options.synthetic is None:
        raise UnusableInput(f"--draft {name} agrees with the model of its pair alone: give --synthetic NAME with it")
    if name == NGRAM:
        return OpenedDraft(speculating, options, None)
    path, is_file = Path(name).expanduser(), not name.startswith(SYNTHETIC_DRAFT)
    is_store = is_file and path.suffix == ".json" and path.is_file()
    stored_dtype = is_store or options.draft_weight_format in (*PLAIN_FORMATS, "exact")
    own = BuildOptions(
        mode="preload",
        checkpoints=path if is_file and not is_store else None,
        manifest=path if is_store else None,
        weight_format=options.draft_weight_format,
        dtype=None if stored_dtype else DTYPE_NAMES[target.dtype],
        cache_dir=options.cache_dir,
        device=str(target.device),
    )
    try:
        if is_store:
            checkpoint: Checkpoint = WeightlessCheckpoint(path.parent, stored_config(path))
        elif is_file:
            checkpoint = open_checkpoint(path)
        else:
            checkpoint = synthetic_draft(name.removeprefix(SYNTHETIC_DRAFT), dtype=target.dtype)
        inputs = open_model(own, checkpoint, ALONE)
        own.check_together()
    except UnusableInput as error:
        said = str(error).removeprefix(f"--draft {name}: ").removeprefix(f"--checkpoints {path}: ")
        if is_file and not path.exists():
            said += meant(name, (NGRAM, SYNTHETIC_DRAFT + name.partition(":")[2]))
        raise UnusableInput(f"--draft {name}: {said}") from error
    check_vocabulary(name, checkpoint.config, target.checkpoint.config, max(s.width for s in speculating.possible))
    tokenizers = [_tokenizer_of(each) for each in (inputs, target)]
    if tokenizers[0] is not None and tokenizers[1] is not None:
        check_tokenizers(name, tokenizers[0], tokenizers[1])
    return OpenedDraft(speculating, own, inputs)


def _tokenizer_of(inputs: Inputs) -> Tokenizer | None:
    """The one that lies beside the weights, if there is one that can be used."""
    try:
        return None if inputs.synthetic else inputs.tokenizer
    except UnusableInput:
        return None


def _facts(options: BuildOptions, inputs: Inputs) -> dict[str, str]:
    """What has to be the same on every rank, as the user spells it."""
    description, known = inputs.description, options_of(BuildOptions)
    sources = [f"{source.name} {source.digest}" for source in inputs.checkpoint.sources()]
    return {
        **{known[name].spelled: str(getattr(options, name)) for name in (*options_of(Settings), *_ALIKE)},
        "model": str(inputs.checkpoint.config),
        "checkpoint": ", ".join(sources),
        "store": str(description.content) if description is not None else "none",
        "dtype": str(inputs.dtype),
        "weight format": inputs.weight_format.name if inputs.weight_format is not None else "plain",
        "device": inputs.device.type,
        "torch": torch.__version__,
    }
