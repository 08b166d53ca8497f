"""The packed store's description: what is where. Version 2 is here; 1 and 3 are in manifest_v1 and manifest_v3."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash
from msgspec import Meta

from wsm.disk.files import read_json
from wsm.errors import UnusableInput
from wsm.formats.mix import Mix
from wsm.layout.groups import BLOCK, KINDS, GroupId
from wsm.layout.model import ReadShape, Shard, SourceFile, TensorSource
from wsm.store.description import DTYPE_NAMES, DTYPES, Name, StoreDescription, StoredGroup, typed
from wsm.store.layout import AGAIN, FORMATTED, VERSION, StorePlan, Superblock, WrittenGroup, plan_store, stride_of
from wsm.store.manifest_v1 import describe_v1
from wsm.store.manifest_v3 import describe_v3, entry_v3
from wsm.words import counted

FORMAT = "wsm-packed-store"

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{32}$", max_length=32)]


class _Checksums(msgspec.Struct):
    """What of a group's entry does not follow from the model; ``checksums`` of a store for several ranks."""

    checksum: Digest | None = None
    checksums: list[Digest] = []


class _Manifest(msgspec.Struct):
    """What of a version 2 manifest does not follow from the model and its dtype: the rest is computed and compared."""

    store_id: Digest
    targets: Annotated[tuple[Name, ...], Meta(min_length=1)]
    block_size: int
    dtype: str
    model: dict[str, Any]
    source: tuple[SourceFile, ...]
    globals: _Checksums
    groups: list[_Checksums]
    tp: Annotated[int, Meta(ge=1)] = 1


def new_manifest(
    plan: StorePlan,
    targets: Sequence[str],
    sources: Sequence[SourceFile],
    written: Mapping[GroupId | None, WrittenGroup],
) -> dict[str, Any]:
    """The manifest of a store just packed by ``plan``, with an id of its own; version 3 in a weight format, else 2."""
    if plan.weight_format is None:
        entries = [_entry(plan, group, written[group].checksums) for group in plan.offsets]
    else:
        entries = [entry_v3(group, written[group], plan.targets) for group in plan.offsets]
    return {
        "format": FORMAT,
        "version": VERSION if plan.weight_format is None else FORMATTED,
        "store_id": uuid.uuid4().hex,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "targets": [os.path.abspath(target) for target in targets],
        "block_size": BLOCK,
        **({"tp": plan.tp} if plan.tp > 1 else {}),
        "dtype": DTYPE_NAMES[plan.dtype],
        **({"weight_format": plan.weight_format.name} if plan.weight_format is not None else {}),
        **({"native": True} if isinstance(plan.weight_format, Mix) else {}),
        "model": plan.config.to_json(),
        "source": msgspec.to_builtins(sources),
        "globals": entries[0],
        "groups": entries[1:],
    }


def _entry(plan: StorePlan, group: GroupId | None, checksums: Sequence[str]) -> dict[str, Any]:
    layout = plan.layouts[group]
    return {
        "layer": group.layer if group is not None else -1,
        "kind": group.kind if group is not None else "globals",
        "offset": plan.offsets[group],
        "nbytes": layout.nbytes,
        "stride": stride_of(layout.nbytes, plan.targets),
        **({"checksum": checksums[0]} if plan.tp == 1 else {"checksums": list(checksums)}),
        "tensors": [
            {
                "name": t.name,
                "dtype": DTYPE_NAMES[t.dtype],
                "shape": list(t.shape),
                "offset": t.offset,
                "nbytes": t.nbytes,
            }
            for t in layout.tensors
        ],
    }


def manifest_digest(manifest: Mapping[str, Any], without: Sequence[str] = ("targets",)) -> str:
    """xxh3-128 of the manifest without its device names, which may change from boot to boot."""
    content = {key: value for key, value in manifest.items() if key not in without}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def load_json(path: Path) -> dict[str, Any]:
    """The manifest's JSON object; raises UnusableInput if it is missing, damaged, or no manifest."""
    try:
        content = read_json(path, f"--manifest {path}", AGAIN)
    except UnusableInput as error:
        if path.exists():
            raise
        made = f"`pack --checkpoints PATH --to TARGET --manifest {path}` makes it"
        raise UnusableInput(f"{error}; {made}") from error
    if not isinstance(content, dict) or "version" not in content:
        raise UnusableInput(f"--manifest {path} is no manifest of a packed store: it has no field version")
    return content


def read_manifest(
    path: Path,
    read_shape: ReadShape,
    *,
    raw_device: str | None = None,
    checkpoint: TensorSource | None = None,
    rank: int = 0,
) -> StoreDescription:
    """The store that ``path`` names, of version 1 to 3; raises UnusableInput, naming the field, if it cannot be used.

    ``read_shape`` makes the model's shape of what versions 2 and 3 say of it; ``checkpoint`` gives it to a version 1
    manifest, which has none. ``raw_device`` overrides the manifest's devices (comma-separated where it is striped).
    ``rank``: whose share of the store is meant, where it was packed for several.
    """
    content = load_json(path)
    targets = tuple(raw_device.split(",")) if raw_device else None
    if targets is not None and not all(targets):
        raise UnusableInput(f"--raw-device {raw_device} names an empty device")
    if content["version"] == 1 and "format" not in content:
        return describe_v1(content, path, targets, checkpoint)
    if content.get("format") != FORMAT or content["version"] not in (VERSION, FORMATTED):
        raise UnusableInput(
            f"--manifest {path}: version {content['version']!r} of format {content.get('format')!r} is not known; "
            f"versions 1, {VERSION} and {FORMATTED} are"
        )
    if content["version"] == FORMATTED:
        return describe_v3(content, path, targets, rank, read_shape, manifest_digest)
    return _describe_v2(content, path, targets, rank, read_shape)


def _describe_v2(
    content: dict[str, Any], path: Path, targets: tuple[str, ...] | None, rank: int, read_shape: ReadShape
) -> StoreDescription:
    manifest = typed(content, _Manifest, f"--manifest {path}", AGAIN)
    plan, checksums = _checked_plan(manifest, content, path, read_shape)
    count = len(manifest.targets)
    if targets is not None and len(targets) != count:
        raise UnusableInput(f"--raw-device names {counted(len(targets), 'device')}, the store is striped over {count}")
    rank = min(rank, plan.tp - 1)  # a store of another number of ranks is refused by whoever wants to run it
    named_rank = rank if plan.tp > 1 else None
    groups = {
        group: StoredGroup(group, layout, plan.extents(group, rank), checksums[group][rank], named_rank)
        for group, layout in plan.layouts.items()
    }
    digest = manifest_digest(content)
    return StoreDescription(
        VERSION,
        path,
        targets or manifest.targets,
        plan.config,
        plan.dtype,
        groups,
        tuple(Superblock(manifest.store_id, digest, number, count) for number in range(count)),
        manifest.source,
        shard=Shard(rank, plan.tp),
        content=manifest_digest(content, ("targets", "store_id", "created")),
    )


def _checked_plan(
    manifest: _Manifest, content: Mapping[str, Any], path: Path, read_shape: ReadShape
) -> tuple[StorePlan, dict[GroupId | None, list[str]]]:
    """The one layout that a version 2 store of this model can have, and the checksums; anything else is damage."""
    if manifest.block_size != BLOCK:
        raise UnusableInput(f"--manifest {path}: field block_size is {manifest.block_size}, not {BLOCK}; {AGAIN}")
    if manifest.dtype not in DTYPES:
        raise UnusableInput(f"--manifest {path}: field dtype: {manifest.dtype!r} is not known; {', '.join(DTYPES)} are")
    try:
        config = read_shape(manifest.model)
    except UnusableInput as error:
        raise UnusableInput(f"--manifest {path}: field model: {error}") from error
    if len(manifest.groups) != len(KINDS) * config.n_layers:
        raise UnusableInput(f"--manifest {path}: field groups does not list the groups of {config.n_layers} layers")
    tp = manifest.tp
    plan = plan_store(config, DTYPES[manifest.dtype], len(manifest.targets), tp)
    checksums: dict[GroupId | None, list[str]] = {}
    entries = [(manifest.globals, content["globals"]), *zip(manifest.groups, content["groups"], strict=True)]
    for group, (read, found) in zip(plan.offsets, entries, strict=True):
        where = f"--manifest {path}: {'globals' if group is None else f'group {group}'}"
        checksums[group] = read.checksums if tp > 1 else [read.checksum] if read.checksum else []
        if len(checksums[group]) != tp:
            wrong = "checksum is missing" if tp == 1 else f"checksums must have one for each of {tp} ranks"
            raise UnusableInput(f"{where}: field {wrong}; {AGAIN}")
        _check_same(found, _entry(plan, group, checksums[group]), where)
    return plan, checksums


def _check_same(found: Any, expected: Any, where: str) -> None:
    """Compare an entry with what it has to be, field by field: the sentence names the one that differs."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if missing := [key for key in expected if key not in found]:
            raise UnusableInput(f"{where}: field {missing[0]} is missing; {AGAIN}")
        for key, value in expected.items():
            _check_same(found[key], value, f"{where}: field {key}")
    elif isinstance(expected, list | tuple) and isinstance(found, list) and len(found) == len(expected):
        for number, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
            _check_same(theirs, mine, f"{where}[{number}]")
    elif found != expected or isinstance(found, bool):
        expected = list(expected) if isinstance(expected, tuple) else expected
        raise UnusableInput(f"{where} is {found!r:.60}; the model and its dtype ask for {expected!r:.60}; {AGAIN}")
