"""What a run reads: checkpoint, store and device, opened and checked before anything large is allocated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
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
from llama.config import ModelConfig
from llama.kv.format import KVFormat, kv_format
from llama.options import PLAIN_FORMATS, BuildOptions
from llama.parallel.world import ALONE, World
from llama.tokenizer import Tokenizer, load_tokenizer, stop_ids_named
from wsm.disk.blockdev import is_block_device
from wsm.disk.safety import refuse_in_dev
from wsm.errors import UnusableInput
from wsm.formats import registry
from wsm.formats.gguf_blocks import NOT_ENCODED
from wsm.formats.mix import Formats, Mix, formats_named
from wsm.layout.groups import GroupId, GroupLayout
from wsm.layout.model import WHOLE, Shard
from wsm.option import options_of
from wsm.plan.hardware import GIB, Hardware, measure_hardware, tightest
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.plan.levers import choose_settings
from wsm.plan.plan import Plan, make_plan
from wsm.settings import Settings
from wsm.store import manifest
from wsm.store.cuts import check_cuts
from wsm.store.description import DTYPE_FORMATS, DTYPES, StoreDescription
from wsm.store.images import coming_layout
from wsm.store.layout import FORMATTED, planned_layouts
from wsm.store.match import Asked, check_suits

_ALIKE = ("prefill_chunk_tokens", "micro_batch", "kv_dtype", "kv_device", "auto")
"""Flags that ranks have to agree on, besides those of ``Settings``."""
read_manifest = partial(manifest.read_manifest, read_shape=ModelConfig.from_json)
"""Of a packed LLaMA."""


@dataclass
class Inputs:
    """``checkpoint`` is the whole model's, ``share`` what this rank has of it; packed files are in ``cache_dir``.

    ``description`` is the store that is read, None where there is none yet; a ``weight_format`` of None is plain.
    """

    world: World
    checkpoint: Checkpoint
    share: Checkpoint
    device: torch.device
    dtype: torch.dtype
    kv_format: KVFormat
    cache_dir: Path
    description: StoreDescription | None
    weight_format: Formats | None = None

    @property
    def format_name(self) -> str:
        """How weights lie at rest, as `--weight-format` spells it."""
        return DTYPE_FORMATS[self.dtype] if self.weight_format is None else self.weight_format.name

    @property
    def synthetic(self) -> bool:
        """Whether the weights are in no file: they are made in any format, fast enough to need no store."""
        return self.checkpoint.directory is None

    @cached_property
    def layouts(self) -> Mapping[GroupId | None, GroupLayout]:
        """All images of this rank; in a format whose sizes follow from the weights, before it is packed, the least.

        Of several ranks all have to ask: an image is as large as the largest of any rank's, as it is in a store, so
        that all make the same plan.
        """
        if self.description is not None:
            return {group: stored.layout for group, stored in self.description.groups.items()}
        shapes = planned_layouts(self.share.config, self.dtype, self.weight_format, most=False)
        weight_format = self.weight_format
        if weight_format is None or isinstance(weight_format, Mix) or not self.synthetic:
            return shapes
        own = {
            g: lay if g is None else coming_layout(self.share, g, self.dtype, weight_format)
            for g, lay in shapes.items()
        }
        told = self.world.exchange(json.dumps([layout.nbytes for layout in own.values()]))
        sizes = map(max, zip(*(json.loads(text) for text in told if text is not None), strict=True))
        return {group: GroupLayout(size, own[group].tensors) for group, size in zip(own, sizes, strict=True)}

    def read_from(self, description: StoreDescription) -> None:
        """Read the weights from that store."""
        self.description = description
        vars(self).pop("layouts", None)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's; UnusableInput if the checkpoint has none, or one that does not fit its vocabulary."""
        return load_tokenizer(self.checkpoint.directory, self.checkpoint.config, self.checkpoint.vocabulary)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends a row. Token ids need no tokenizer: without one, what the JSON files name, or nothing."""
        try:
            return self.tokenizer.stop_ids
        except UnusableInput:
            directory = self.checkpoint.directory
            return frozenset(stop_ids_named(directory, self.checkpoint.config) if directory is not None else ())

    @property
    def warnings(self) -> list[str]:
        """What is doubtful in the files that were read."""
        read = [self.tokenizer] if "tokenizer" in vars(self) else []
        return [*self.checkpoint.warnings, *(warning for tokenizer in read for warning in tokenizer.warnings)]

    def kv_disk(self, plan: Plan) -> tuple[str, Sequence[str]]:
        """``--kv-device`` (of several ranks each has a file of its own), and the weights' targets."""
        path = plan.inputs.kv_device
        assert path is not None
        if self.world.shard.size > 1:
            if is_block_device(path):
                raise UnusableInput(f"--kv-device {path}: several ranks cannot share a device: name a file")
            path = f"{path}.rank{self.world.shard.rank}"
        return path, self.description.targets if self.description is not None else ()

    def close(self) -> None:
        self.checkpoint.close()


def choose_device(name: str | None, local: Shard = WHOLE) -> torch.device:
    """The named device, or a CUDA device, or the CPU; of several ranks on a host each has its own GPU."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise UnusableInput(f"--device {name} is not known; cpu and cuda[:N] are") from None
    if device.type == "cuda":
        if device.index is not None and local.size > 1:
            raise UnusableInput(f"--device {name} would be every rank's: with --device cuda each has its own")
        index, count = device.index or local.rank, torch.cuda.device_count()
        if index >= count and local.size > 1:
            raise UnusableInput(
                f"there are {count} CUDA devices here for {local.size} ranks: start fewer with torchrun "
                f"--nproc-per-node {max(1, count)}, or give --device cpu"
            )
        if index >= count:
            raise UnusableInput(f"--device {name}: there are {count} CUDA devices here; --device cpu runs without")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UnusableInput(f"--device {name} is not supported; cpu and cuda[:N] are")
    return device


def _choose_checkpoint(options: BuildOptions) -> Checkpoint:
    if options.checkpoints is not None:
        directory = options.checkpoints.expanduser()
        if options.manifest is not None and directory.is_dir() and not has_weights(directory):
            return WeightlessCheckpoint(directory, _stored_config(options.manifest))
        return open_checkpoint(directory)
    if options.synthetic is not None:
        dtype = DTYPES.get(options.dtype or "auto") or torch.bfloat16
        # Weights are a model's and not a run's: `--seed` is of prompts and sampling alone.
        return synthetic_checkpoint(options.synthetic, seed=0, dtype=dtype)
    return builtin_checkpoint(options.cache_dir.expanduser())


def _stored_config(path: Path) -> ModelConfig | None:
    """The model that a manifest describes; None for version 1, which does not."""
    if manifest.load_json(path)["version"] == 1:
        return None
    config = read_manifest(path).config
    assert isinstance(config, ModelConfig)
    return config


def open_inputs(options: BuildOptions, world: World = ALONE) -> Inputs:
    """Open and check everything that the run reads; UnusableInput for what cannot be used."""
    options.check_together()
    refuse_in_dev(options.cache_dir.expanduser(), f"--cache-dir {options.cache_dir}")
    device = choose_device(options.device, world.local)
    checkpoint = _choose_checkpoint(options)
    share = checkpoint.share(world.shard)
    asked = "plain" if options.weight_format in PLAIN_FORMATS else options.weight_format
    native = _native(checkpoint, options.weight_format)
    weight_format = native or (registry.get(asked) if asked in registry.ALL else None)
    wanted = DTYPES.get(PLAIN_FORMATS.get(options.weight_format, options.dtype or "auto"))
    if asked == "exact":
        wanted = torch.bfloat16
    description = None
    if options.manifest is not None and (options.mode != "full" or weight_format or _in_format(options.manifest)):
        description = read_manifest(
            options.manifest, raw_device=options.raw_device, checkpoint=checkpoint, rank=world.shard.rank
        )
        named = {"--checkpoints": options.checkpoints, "--synthetic": options.synthetic}
        flags = " ".join(f"{flag} {value}" for flag, value in named.items() if value is not None)
        brought = native.name if native is not None else None
        check_suits(description, Asked(checkpoint.config, wanted, world.shard.size, asked, brought), flags)
        weight_format = native or _formats_of(description)
    dtype = description.dtype if description is not None else wanted or checkpoint.dtype
    if weight_format is not None and description is None:
        _check_format(checkpoint, weight_format, dtype, world)
    record = kv_format(options.kv_dtype, dtype, checkpoint.config.head_dim)
    cache_dir = options.cache_dir.expanduser()
    inputs = Inputs(world, checkpoint, share, device, dtype, record, cache_dir, description, weight_format)
    if world.shard.size > 1:
        world.agree(_facts(options, inputs))
        world.connect(device)
    return inputs


def _native(checkpoint: Checkpoint, asked: str) -> Mix | None:
    """The formats that a checkpoint brings; UnusableInput where another one is asked for."""
    native = checkpoint.formats
    if native is not None and asked not in ("auto", native.name):
        raise UnusableInput(
            f"--weight-format {asked}: {checkpoint.config.name} is quantised already, in {native.name}, and runs as it "
            "is: leave the flag out (--dtype says what is computed in), or take the unquantised checkpoint"
        )
    return native


def _formats_of(description: StoreDescription) -> Formats | None:
    """How the matrices of a store lie there, without the checkpoint's word."""
    if description.weight_format is None:
        return None
    found = formats_named(description.weight_format)
    if len(found) == 1 and description.weight_format not in registry.BLOCK_TYPES:  # those are a checkpoint's own
        return found[description.weight_format]
    full_name = description.config.full_name
    tensors = ((full_name(group, t.name), t) for group, s in description.groups.items() for t in s.layout.encoded)
    return Mix({name: tensor.format for name, tensor in tensors if tensor.format is not None})


def _check_format(checkpoint: Checkpoint, weight_format: Formats, dtype: torch.dtype, world: World) -> None:
    """UnusableInput for GGUF's blocks where weights would be put into them, or where ranks' shares do not fill them."""
    if weight_format.name in registry.BLOCK_TYPES and checkpoint.directory is not None and checkpoint.formats is None:
        raise UnusableInput(f"--weight-format {weight_format.name}: {NOT_ENCODED.format(weight_format.name)}")
    check_cuts(checkpoint.config, dtype, world.shard.size, weight_format)


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


def _in_format(path: Path) -> bool:
    """Whether a manifest's store is in a weight format."""
    return bool(manifest.load_json(path)["version"] == FORMATTED)


def hardware_here(inputs: Inputs) -> Hardware:
    """The memory of this machine, a rank's share of the CPU's."""
    world = inputs.world
    return measure_hardware(inputs.device, world.local.size, GIB if world.shard.size == 1 else 2 * GIB)


def plan_run(options: BuildOptions, inputs: Inputs, shape: RunShape, hardware: Hardware | None = None) -> Plan:
    """What will be where, and how much memory it takes, on this machine or on other ``hardware``; allocates nothing."""
    world = inputs.world
    hardware = hardware or hardware_here(inputs)
    everywhere = world.exchange(json.dumps(asdict(hardware)))
    planned = PlanInputs(
        config=inputs.share.config,
        dtype=inputs.dtype,
        layouts=inputs.layouts,
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


def plans_by_format(options: BuildOptions, inputs: Inputs, plan: Plan) -> dict[str, Plan]:
    """The same run in every weight format, by name, ``plan`` among them; with ``--auto`` each with its own choice."""
    plans = dict[str, Plan]()
    if inputs.checkpoint.formats is not None:  # what is quantised already comes in no other format
        return {inputs.format_name: plan}
    for name in (DTYPE_FORMATS[inputs.dtype], *registry.NAMES):
        weight_format = registry.get(name) if name in registry.NAMES else None
        if weight_format is not None and weight_format.exact and inputs.dtype != torch.bfloat16:
            continue
        layouts = planned_layouts(inputs.share.config, inputs.dtype, weight_format, most=False)
        other = replace(plan.inputs, layouts=layouts, settings=options)
        plans[name] = make_plan(choose_settings(other) if options.auto else other)
    return plans | {inputs.format_name: plan}
