"""What a run reads: options, checkpoint, store and device, opened and checked before anything large is allocated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from llama.checkpoint import (
    Checkpoint,
    WeightlessCheckpoint,
    builtin_checkpoint,
    has_weights,
    open_checkpoint,
    share_of,
    synthetic_checkpoint,
)
from llama.kv.format import KVFormat, kv_format
from llama.loading import DEFAULT_CACHE, choose_device
from llama.parallel.world import ALONE, World
from llama.stores import read_manifest, stored_config
from llama.tokenizer import Tokenizer, load_tokenizer
from wsm.errors import UnusableInput
from wsm.plan.hardware import GIB, Hardware, measure_hardware, tightest
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.levers import choose_settings
from wsm.plan.plan import Plan, make_plan
from wsm.settings import Settings, spelled
from wsm.store.description import DTYPES, StoreDescription
from wsm.store.extents import plan_store
from wsm.store.match import check_suits

SYNTHETIC_SEED = 0
"""Of synthetic weights, which are a model's and not a run's: `--seed` is of prompts and sampling alone."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Which model, from where, onto what; ``settings`` say how it is paged, ``world`` with which other processes."""

    settings: Settings
    checkpoints: Path | None = None
    synthetic: str | None = None
    raw_device: str | None = None
    manifest: Path | None = None
    cache_dir: Path = DEFAULT_CACHE
    device: str | None = None
    dtype: str | None = None
    prefill_chunk_tokens: int | None = None
    micro_batch: int | None = None
    topk_blk: int = 8
    kv_dtype: str = "auto"
    kv_device: str | None = None
    auto: bool = False
    world: World = ALONE


@dataclass(slots=True)
class Inputs:
    """What a run reads: opened and checked, nothing large allocated.

    ``checkpoint`` is the whole model's, ``share`` what this rank holds of it.
    """

    options: BuildOptions
    checkpoint: Checkpoint
    share: Checkpoint
    device: torch.device
    dtype: torch.dtype
    description: StoreDescription | None
    _tokenizer: Tokenizer | None = None

    @property
    def world(self) -> World:
        return self.options.world

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
    if options.checkpoints is not None and options.synthetic is not None:
        raise UnusableInput("--checkpoints and --synthetic exclude each other: give one")
    if options.checkpoints is not None:
        directory = options.checkpoints.expanduser()
        if options.manifest is not None and directory.is_dir() and not has_weights(directory):
            return WeightlessCheckpoint(directory, stored_config(options.manifest))
        return open_checkpoint(directory)
    if options.synthetic is not None:
        dtype = _dtype_named(options.dtype) or torch.bfloat16
        return synthetic_checkpoint(options.synthetic, seed=SYNTHETIC_SEED, dtype=dtype)
    return builtin_checkpoint(options.cache_dir.expanduser())


def _dtype_named(name: str | None) -> torch.dtype | None:
    if name in (None, "auto"):
        return None
    if name not in DTYPES:
        raise UnusableInput(f"--dtype {name} is not known; {', '.join(DTYPES)} are")
    return DTYPES[str(name)]


def open_inputs(options: BuildOptions) -> Inputs:
    """Open and check everything that the run reads.

    Raises:
        UnusableInput: for a checkpoint, manifest, device or dtype that cannot be used.
    """
    if options.raw_device and not options.manifest:
        raise UnusableInput("--raw-device needs --manifest, which says what lies where on it")
    world = options.world
    device = choose_device(options.device, world.local)
    checkpoint = _choose_checkpoint(options)
    share = share_of(checkpoint, world.shard)
    wanted = _dtype_named(options.dtype)
    description = None
    if options.manifest is not None and options.settings.mode != "full":
        description = read_manifest(
            options.manifest, raw_device=options.raw_device, checkpoint=checkpoint, rank=world.shard.rank
        )
        check_suits(description, checkpoint.config, wanted, world.shard.size, _model_flags(options))
    dtype = description.dtype if description is not None else wanted or checkpoint.dtype
    inputs = Inputs(options, checkpoint, share, device, dtype, description)
    if world.shard.size > 1:
        world.agree(_facts(inputs))
        world.connect(device)
    return inputs


def _model_flags(options: BuildOptions) -> str:
    """The flags that name the model, as the user gave them."""
    named = {"--checkpoints": options.checkpoints, "--synthetic": options.synthetic}
    return " ".join(f"{flag} {value}" for flag, value in named.items() if value is not None)


def _facts(inputs: Inputs) -> dict[str, str]:
    """What has to be the same on every rank, as the user spells it."""
    settings, description = inputs.options.settings, inputs.description
    sources = [f"{source.name} {source.digest}" for source in inputs.checkpoint.sources()]
    return {
        **{spelled(field.name): str(getattr(settings, field.name)) for field in fields(settings)},
        "model": str(inputs.checkpoint.config),
        "checkpoint": ", ".join(sources),
        "store": str(description.content) if description is not None else "none",
        "dtype": str(inputs.dtype),
        "device": inputs.device.type,
        "--prefill-chunk-tokens": str(inputs.options.prefill_chunk_tokens),
        "--micro-batch": str(inputs.options.micro_batch),
        "--kv-dtype": str(inputs.options.kv_dtype),
        "--kv-device": str(inputs.options.kv_device),
        "--auto": str(inputs.options.auto),
        "torch": torch.__version__,
    }


def record_of(inputs: Inputs) -> KVFormat:
    """How keys and values are stored."""
    return kv_format(inputs.options.kv_dtype, inputs.dtype, inputs.checkpoint.config.head_dim)


def plan_run(inputs: Inputs, shape: RunShape) -> Plan:
    """What will lie where, and how much memory it takes; allocates nothing."""
    if inputs.description is not None:
        layouts = {group: stored.layout for group, stored in inputs.description.groups.items()}
    else:
        layouts = dict(plan_store(inputs.checkpoint.config, inputs.dtype, 1, inputs.world.shard.size).layouts)
    world = inputs.world
    hardware = measure_hardware(inputs.device, world.local.size, (GIB if world.shard.size == 1 else 2 * GIB))
    everywhere = world.exchange(json.dumps(asdict(hardware)))
    planned = PlanInputs(
        config=inputs.share.config,
        dtype=inputs.dtype,
        layouts=layouts,
        settings=inputs.options.settings,
        shape=shape,
        hardware=tightest(hardware, [Hardware(**json.loads(text)) for text in everywhere if text is not None]),
        chunk_tokens=inputs.options.prefill_chunk_tokens,
        micro_batch=inputs.options.micro_batch,
        kv_record_bytes=record_of(inputs).record_bytes,
        topk_blk=inputs.options.topk_blk,
        kv_device=inputs.options.kv_device,
        ranks=world.shard.size,
        ranks_here=world.local.size,
    )
    return make_plan(choose_settings(planned) if inputs.options.auto else planned)
