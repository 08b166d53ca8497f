"""What a run reads: checkpoint, store and device, opened and checked before anything large is allocated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from llama.checkpoint import (
    Checkpoint,
    WeightlessCheckpoint,
    builtin_checkpoint,
    has_weights,
    is_of_pair,
    open_checkpoint,
    synthetic_checkpoint,
)
from llama.checkpoint.formats import check_format, formats_of, native_formats
from llama.config import ModelConfig
from llama.kv.format import KVFormat, kv_format
from llama.options import PLAIN_FORMATS, BuildOptions
from llama.parallel.world import World
from llama.speculation.shape import Speculating
from llama.tokenizer import Tokenizer, load_tokenizer, stop_ids_named
from wsm.disk.blockdev import is_block_device
from wsm.errors import UnusableInput
from wsm.formats import registry
from wsm.formats.mix import Formats, Mix
from wsm.layout.groups import GroupId, GroupLayout, alike_as_one
from wsm.layout.model import WHOLE, Shard
from wsm.plan.plan import Plan
from wsm.store import manifest
from wsm.store.description import DTYPE_FORMATS, DTYPES, StoreDescription
from wsm.store.images import coming_layout
from wsm.store.layout import FORMATTED, planned_layouts
from wsm.store.match import Asked, check_suits
from wsm.words import counted

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
    draft: OpenedDraft | None = None

    @property
    def format_name(self) -> str:
        """How weights lie at rest, as `--weight-format` spells it."""
        return DTYPE_FORMATS[self.dtype] if self.weight_format is None else self.weight_format.name

    @property
    def synthetic(self) -> bool:
        """Whether the weights are in no file: they are made in any format, fast enough to need no store."""
        return self.checkpoint.directory is None

    @property
    def encoded_here(self) -> bool:
        """Whether weights are put into a weight format here, and do not come in it."""
        return self.weight_format is not None and not isinstance(self.weight_format, Mix)

    @cached_property
    def layouts(self) -> Mapping[GroupId | None, GroupLayout]:
        """All images of this rank; in a format whose sizes follow from the weights, before it is packed, the least.

        Of several ranks all have to ask: an image is as large as the largest of any rank's, as it is in a store, so
        that all make the same plan.
        """
        if self.description is not None:
            return alike_as_one({group: stored.layout for group, stored in self.description.groups.items()})
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
        widest = {group: GroupLayout(size, own[group].tensors) for group, size in zip(own, sizes, strict=True)}
        return alike_as_one(widest)

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
        """What ends a row: what the tokenizer's files name, else the weights' own.

        Token ids need no tokenizer: without one, what any of the files name, or nothing.
        """
        try:
            return self.tokenizer.stop_ids or self.checkpoint.stop_ids
        except UnusableInput:
            directory = self.checkpoint.directory
            if named := self.checkpoint.stop_ids:
                return named
            return frozenset(stop_ids_named(directory, self.checkpoint.config) if directory is not None else ())

    @property
    def warnings(self) -> list[str]:
        """What is doubtful in the files that were read."""
        read = [self.tokenizer] if "tokenizer" in vars(self) else []
        of_draft = self.draft.inputs.warnings if self.draft is not None and self.draft.inputs is not None else []
        return [
            *of_draft,
            *self.checkpoint.warnings,
            *(warning for tokenizer in read for warning in tokenizer.warnings),
        ]

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
        if self.draft is not None and self.draft.inputs is not None:
            self.draft.inputs.close()


@dataclass(frozen=True)
class OpenedDraft:
    """Who proposes tokens, and how; ``options`` and ``inputs`` are its own, ``inputs`` None for `ngram`, no model."""

    speculating: Speculating
    options: BuildOptions
    inputs: Inputs | None


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
                f"this host has {counted(count, 'CUDA device')} for {local.size} ranks: start fewer with torchrun "
                f"--nproc-per-node {max(1, count)}, or give --device cpu"
            )
        if index >= count:
            have = f"this host has {counted(count, 'CUDA device')}"
            raise UnusableInput(f"--device {name}: {have}; --device cpu runs without")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UnusableInput(f"--device {name} is not supported; cpu and cuda[:N] are")
    return device


def choose_checkpoint(options: BuildOptions) -> Checkpoint:
    """The checkpoint that the options name."""
    if options.checkpoints is not None:
        directory = options.checkpoints.expanduser()
        if options.manifest is not None and directory.is_dir() and not has_weights(directory):
            return WeightlessCheckpoint(directory, stored_config(options.manifest))
        return open_checkpoint(directory)
    if options.synthetic is not None:
        dtype = DTYPES.get(options.dtype or "auto") or torch.bfloat16
        # Weights are a model's and not a run's: `--seed` is of prompts and sampling alone.
        return synthetic_checkpoint(options.synthetic, seed=0, dtype=dtype, of_pair=is_of_pair(options.draft))
    return builtin_checkpoint(options.cache_dir.expanduser())


def stored_config(path: Path) -> ModelConfig | None:
    """The model that a manifest describes; None for version 1, which does not."""
    if manifest.load_json(path)["version"] == 1:
        return None
    config = read_manifest(path).config
    assert isinstance(config, ModelConfig)
    return config


def open_model(options: BuildOptions, checkpoint: Checkpoint, world: World) -> Inputs:
    """One model, of ``checkpoint``, as the options have it; UnusableInput for what cannot be used."""
    device = choose_device(options.device, world.local)
    share = checkpoint.share(world.shard)
    asked = "plain" if options.weight_format in PLAIN_FORMATS else options.weight_format
    native = native_formats(checkpoint, options.weight_format)
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
        if native is None and checkpoint.has_weights and checkpoint.directory is not None:
            brought = "plain"
        check_suits(description, Asked(checkpoint.config, wanted, world.shard.size, asked, brought), flags)
        weight_format = native or formats_of(description)
    dtype = description.dtype if description is not None else wanted or checkpoint.dtype
    if weight_format is not None and description is None:
        check_format(checkpoint, weight_format, dtype, world.shard.size)
    record = kv_format(options.kv_dtype, dtype, checkpoint.config.head_dim)
    cache_dir = options.cache_dir.expanduser()
    return Inputs(world, checkpoint, share, device, dtype, record, cache_dir, description, weight_format)


def _in_format(path: Path) -> bool:
    """Whether a manifest's store is in a weight format."""
    return bool(manifest.load_json(path)["version"] == FORMATTED)
