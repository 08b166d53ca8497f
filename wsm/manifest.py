"""The packed store's description: what lies where. Written and read as version 2; version 1 is in manifest_v1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from llama.checkpoint import Checkpoint, SourceFile
from llama.checkpoint.names import KINDS, GroupId, pass_order
from llama.config import ModelConfig, UnusableInput
from wsm.groups import BLOCK, GroupLayout, globals_layout, group_layout, round_up
from wsm.superblock import Superblock

FORMAT, VERSION = "wsm-packed-store", 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of a target, ready for O_DIRECT; only its first ``needed`` bytes have to exist."""

    target: int
    offset: int
    nbytes: int
    slot_offset: int
    needed: int


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """One group (None: the globals): its image, where its bytes lie, and the xxh3-128 of the image."""

    group: GroupId | None
    layout: GroupLayout
    extents: tuple[Extent, ...]
    checksum: str | None

    @property
    def name(self) -> str:
        return str(self.group) if self.group is not None else "the globals"


@dataclass(frozen=True, slots=True)
class StoreDescription:
    """A manifest, read and checked. ``warnings`` are for the user."""

    version: int
    path: Path
    targets: tuple[str, ...]
    config: ModelConfig
    dtype: torch.dtype
    groups: Mapping[GroupId | None, StoredGroup]
    superblocks: tuple[Superblock, ...] = ()
    sources: tuple[SourceFile, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """What a full read moves."""
        return sum(extent.nbytes for group in self.groups.values() for extent in group.extents)


def stripes(nbytes: int, offset: int, targets: int) -> tuple[Extent, ...]:
    """An image cut into one contiguous part a target, each at the same ``offset``; parts are multiples of 4096."""
    part = stride_of(nbytes, targets)
    return tuple(
        Extent(target, offset, min(part, nbytes - start), start, min(part, nbytes - start))
        for target in range(targets)
        if (start := target * part) < nbytes
    )


def stride_of(nbytes: int, targets: int) -> int:
    """Bytes that an image takes on each target."""
    return round_up(-(-nbytes // targets), BLOCK)


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Where a checkpoint's groups will lie on ``targets`` devices: globals first, then pass order."""

    config: ModelConfig
    dtype: torch.dtype
    targets: int
    offsets: Mapping[GroupId | None, int]
    layouts: Mapping[GroupId | None, GroupLayout]
    target_bytes: int


def plan_store(config: ModelConfig, dtype: torch.dtype, targets: int) -> StorePlan:
    """The layout of a new store; ``target_bytes`` is what each target has to hold, superblock included."""
    by_kind = {kind: group_layout(config, kind, dtype) for kind in KINDS}
    layouts: dict[GroupId | None, GroupLayout] = {None: globals_layout(config, dtype)}
    layouts.update({group: by_kind[group.kind] for group in pass_order(config.n_layers)})
    offsets: dict[GroupId | None, int] = {}
    offset = BLOCK
    for group, layout in layouts.items():
        offsets[group] = offset
        offset += stride_of(layout.nbytes, targets)
    return StorePlan(config, dtype, targets, offsets, layouts, offset)


def manifest_json(
    plan: StorePlan,
    *,
    store_id: str,
    created: str,
    targets: Sequence[str],
    sources: Sequence[SourceFile],
    checksums: Mapping[GroupId | None, str],
) -> dict[str, Any]:
    """The manifest of a store packed by ``plan``."""
    entries = [_entry(plan, group, checksums[group]) for group in plan.offsets]
    return {
        "format": FORMAT,
        "version": VERSION,
        "store_id": store_id,
        "created": created,
        "targets": list(targets),
        "block_size": BLOCK,
        "dtype": DTYPE_NAMES[plan.dtype],
        "model": plan.config.to_json(),
        "source": [source._asdict() for source in sources],
        "globals": entries[0],
        "groups": entries[1:],
    }


def _entry(plan: StorePlan, group: GroupId | None, checksum: str) -> dict[str, Any]:
    layout = plan.layouts[group]
    return {
        "layer": group.layer if group is not None else -1,
        "kind": group.kind if group is not None else "globals",
        "offset": plan.offsets[group],
        "nbytes": layout.nbytes,
        "stride": stride_of(layout.nbytes, plan.targets),
        "checksum": checksum,
        "tensors": [
            {
                "name": tensor.name,
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "offset": tensor.offset,
                "nbytes": tensor.nbytes,
            }
            for tensor in layout.tensors
        ],
    }


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """xxh3-128 of the manifest without its device names, which may change from boot to boot."""
    content = {key: value for key, value in manifest.items() if key != "targets"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def load_json(path: Path) -> dict[str, Any]:
    """The manifest's JSON object.

    Raises:
        UnusableInput: if it is missing, damaged, or no manifest.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"--manifest {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnusableInput(f"--manifest {path} is damaged (no JSON: {error}): pack again") from error
    if not isinstance(content, dict) or "version" not in content:
        raise UnusableInput(f"--manifest {path} is no manifest of a packed store: it has no version")
    return content


def read_manifest(
    path: Path, *, raw_device: str | None = None, checkpoint: Checkpoint | None = None
) -> StoreDescription:
    """The description of the store that ``path`` names, of version 2 or 1.

    Args:
        raw_device: overrides the manifest's devices (comma-separated where it is striped).
        checkpoint: gives the model's shape to a version 1 manifest, which has none.

    Raises:
        UnusableInput: for a manifest that cannot be used, naming the field.
    """
    manifest = load_json(path)
    targets = tuple(raw_device.split(",")) if raw_device else None
    if manifest["version"] == 1:
        from wsm.manifest_v1 import describe_v1

        return describe_v1(manifest, path, targets, checkpoint)
    if manifest.get("format") != FORMAT or manifest["version"] != VERSION:
        raise UnusableInput(
            f"--manifest {path}: version {manifest['version']} of {manifest.get('format')!r} is not known; "
            f"versions 1 and {VERSION} are"
        )
    return _describe_v2(manifest, path, targets)


def _describe_v2(manifest: dict[str, Any], path: Path, targets: tuple[str, ...] | None) -> StoreDescription:
    try:
        named = tuple(str(target) for target in manifest["targets"])
        if manifest["dtype"] not in DTYPES:
            raise UnusableInput(f"--manifest {path}: dtype {manifest['dtype']!r} is not known; {', '.join(DTYPES)} are")
        config = ModelConfig.from_json(manifest["model"])
        plan = plan_store(config, DTYPES[manifest["dtype"]], len(named))
        checksums = {
            _group_of(entry, path): str(entry["checksum"]) for entry in [manifest["globals"], *manifest["groups"]]
        }
        if set(checksums) != set(plan.offsets):
            raise UnusableInput(f"--manifest {path} does not list each group of {config.n_layers} layers once")
        rebuilt = [_entry(plan, group, checksums[group]) for group in plan.offsets]
        _check_entries([manifest["globals"], *manifest["groups"]], rebuilt, path)
        sources = tuple(SourceFile(**source) for source in manifest["source"])
        store_id = str(manifest["store_id"])
        digest = manifest_digest(manifest)
        superblocks = tuple(Superblock(store_id, digest, number, len(named)) for number in range(len(named)))
        bytes.fromhex(store_id)
    except KeyError as error:
        raise UnusableInput(f"--manifest {path} is damaged: field {error} is missing; pack again") from error
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UnusableInput):
            raise
        raise UnusableInput(f"--manifest {path} is damaged: {error}; pack again") from error
    if targets is not None and len(targets) != len(named):
        raise UnusableInput(f"--raw-device names {len(targets)} devices, the store is striped over {len(named)}")
    groups = {
        group: StoredGroup(
            group, plan.layouts[group], stripes(plan.layouts[group].nbytes, offset, len(named)), checksums[group]
        )
        for group, offset in plan.offsets.items()
    }
    return StoreDescription(VERSION, path, targets or named, config, plan.dtype, groups, superblocks, sources)


def _group_of(entry: Mapping[str, Any], path: Path) -> GroupId | None:
    if entry["kind"] == "globals":
        return None
    if entry["kind"] not in KINDS:
        raise UnusableInput(f"--manifest {path}: kind {entry['kind']!r} of a group is not known")
    return GroupId(int(entry["layer"]), entry["kind"])


def _check_entries(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A version 2 store has one layout only, so an entry that differs from it in any field is damage."""
    for mine, theirs in zip(expected, found, strict=True):
        for key, value in mine.items():
            if theirs.get(key) != value:
                where = f"group L{mine['layer']}.{mine['kind']}" if mine["layer"] >= 0 else "globals"
                raise UnusableInput(
                    f"--manifest {path}: {where}: field {key} does not fit the model's shape and dtype; pack again"
                )


def with_warnings(description: StoreDescription, warnings: Sequence[str]) -> StoreDescription:
    """The same description with more warnings."""
    return replace(description, warnings=(*description.warnings, *warnings))
