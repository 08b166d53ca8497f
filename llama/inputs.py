"""What a run reads: checkpoint, store and device, opened and checked before anything large is allocated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llama.checkpoint import (
    Checkpoint,
    WeightlessCheckpoint,
    builtin_checkpoint,
    has_weights,
    open_checkpoint,
    synthetic_checkpoint,
)
from llama.kv.format import KVFormat, kv_format
from llama.loading import choose_device
from llama.options import BuildOptions
from llama.parallel.world import ALONE, World
from llama.stores import read_manifest, stored_config
from llama.tokenizer import Tokenizer, load_tokenizer
from wsm.option import options_of
from wsm.plan.hardware import GIB, Hardware, measure_hardware, tightest
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.levers import choose_settings
from wsm.plan.plan import Plan, make_plan
from wsm.settings import Settings
from wsm.store.description import DTYPES, StoreDescription
from wsm.store.layout import plan_store
from wsm.store.match import check_suits

SYNTHETIC_SEED = 0
"""Of synthetic weights, which are a model's and not a run's: `--seed` is of prompts and sampling alone."""
_ALIKE = ("prefill_chunk_tokens", "micro_batch", "kv_dtype", "kv_device", "auto")
"""Flags that ranks have to agree on, besides those of ``Settings``."""


@dataclass(slots=True)
class Inputs:
    """What a run reads: opened and checked, nothing large allocated.

    ``checkpoint`` is the whole model's, ``share`` what this rank holds of it,
    ``world`` the processes that run the model together, ``cache_dir`` where packed files are kept.
    """

    world: World
    checkpoint: Checkpoint
    share: Checkpoint
    device: torch.device
    dtype: torch.dtype
    kv_format: KVFormat
    cache_dir: Path
    description: StoreDescription | None
    _tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; bytes for the built-in and the synthetic models.

        Raises:
            UnusableInput: if the checkpoint has none, or one that does not fit its vocabulary.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint.directory, self.checkpoint.config)
        return self._tokenizer

    def close(self) -> None:
        self.checkpoint.close()


def _choose_checkpoint(options: BuildOptions) -> Checkpoint:
    if options.checkpoints is not None:
        directory = options.checkpoints.expanduser()
        if options.manifest is not None and directory.is_dir() and not has_weights(directory):
            return WeightlessCheckpoint(directory, stored_config(options.manifest))
        return open_checkpoint(directory)
    if options.synthetic is not None:
        dtype = DTYPES.get(options.dtype or "auto") or torch.bfloat16
        return synthetic_checkpoint(options.synthetic, seed=SYNTHETIC_SEED, dtype=dtype)
    return builtin_checkpoint(options.cache_dir.expanduser())


def open_inputs(options: BuildOptions, world: World = ALONE) -> Inputs:
    """Open and check everything that the run reads.

    Raises:
        UnusableInput: for a checkpoint, manifest, device or dtype that cannot be used.
    """
    options.check_together()
    device = choose_device(options.device, world.local)
    checkpoint = _choose_checkpoint(options)
    share = checkpoint.share(world.shard)
    wanted = DTYPES.get(options.dtype or "auto")
    description = None
    if options.manifest is not None and options.mode != "full":
        description = read_manifest(
            options.manifest, raw_device=options.raw_device, checkpoint=checkpoint, rank=world.shard.rank
        )
        check_suits(description, checkpoint.config, wanted, world.shard.size, _model_flags(options))
    dtype = description.dtype if description is not None else wanted or checkpoint.dtype
    record = kv_format(options.kv_dtype, dtype, checkpoint.config.head_dim)
    inputs = Inputs(world, checkpoint, share, device, dtype, record, options.cache_dir.expanduser(), description)
    if world.shard.size > 1:
        world.agree(_facts(options, inputs))
        world.connect(device)
    return inputs


def _model_flags(options: BuildOptions) -> str:
    """The flags that name the model, as the user gave them."""
    named = {"--checkpoints": options.checkpoints, "--synthetic": options.synthetic}
    return " ".join(f"{flag} {value}" for flag, value in named.items() if value is not None)


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
        "device": inputs.device.type,
        "torch": torch.__version__,
    }


def plan_run(options: BuildOptions, inputs: Inputs, shape: RunShape) -> Plan:
    """What will be where, and how much memory it takes; allocates nothing."""
    world = inputs.world
    if inputs.description is not None:
        layouts = {group: stored.layout for group, stored in inputs.description.groups.items()}
    else:
        layouts = dict(plan_store(inputs.checkpoint.config, inputs.dtype, 1, world.shard.size).layouts)
    hardware = measure_hardware(inputs.device, world.local.size, (GIB if world.shard.size == 1 else 2 * GIB))
    everywhere = world.exchange(json.dumps(asdict(hardware)))
    planned = PlanInputs(
        config=inputs.share.config,
        dtype=inputs.dtype,
        layouts=layouts,
        settings=options,
        shape=shape,
        hardware=tightest(hardware, [Hardware(**json.loads(text)) for text in everywhere if text is not None]),
        chunk_tokens=options.prefill_chunk_tokens,
        micro_batch=options.micro_batch,
        kv_record_bytes=inputs.kv_format.record_bytes,
        topk_blk=options.topk_blk,
        kv_device=options.kv_device,
        ranks=world.shard.size,
        ranks_here=world.local.size,
    )
    return make_plan(choose_settings(planned) if options.auto else planned)
