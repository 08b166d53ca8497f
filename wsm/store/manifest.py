"""The packed store's description: what lies where. Written and read as version 2; version 1 is in manifest_v1."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from wsm.errors import UnusableInput
from wsm.layout.groups import BLOCK, KINDS, GroupId
from wsm.layout.model import ReadShape, Shard, SourceFile, TensorSource
from wsm.store.description import DTYPE_NAMES, DTYPES, StoreDescription, StoredGroup
from wsm.store.extents import StorePlan, plan_store, stride_of
from wsm.store.manifest_v1 import describe_v1
from wsm.store.superblock import AGAIN, Superblock

FORMAT, VERSION = "wsm-packed-store", 2
STORE_ID_BYTES = 16
_CHECKSUM = re.compile("[0-9a-f]{32}")


def manifest_json(
    plan: StorePlan,
    *,
    store_id: str,
    created: str,
    targets: Sequence[str],
    sources: Sequence[SourceFile],
    checksums: Mapping[GroupId | None, Sequence[str]],
) -> dict[str, Any]:
    """The manifest of a store packed by ``plan``; ``checksums`` has one a rank."""
    entries = [_entry(plan, group, checksums[group]) for group in plan.offsets]
    return {
        "format": FORMAT,
        "version": VERSION,
        "store_id": store_id,
        "created": created,
        "targets": list(targets),
        "block_size": BLOCK,
        **({"tp": plan.tp} if plan.tp > 1 else {}),
        "dtype": DTYPE_NAMES[plan.dtype],
        "model": plan.config.to_json(),
        "source": [source._asdict() for source in sources],
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


def _content_digest(manifest: Mapping[str, Any]) -> str:
    """As :func:`manifest_digest`, of nothing that differs between two packings of the same weights."""
    packing = ("store_id", "created")
    return manifest_digest({key: value for key, value in manifest.items() if key not in packing})


def load_json(path: Path) -> dict[str, Any]:
    """The manifest's JSON object.

    Raises:
        UnusableInput: if it is missing, damaged, or no manifest.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"--manifest {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"--manifest {path} is damaged (no JSON: {error}); {AGAIN}") from error
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
    """The description of the store that ``path`` names, of version 2 or 1.

    Args:
        read_shape: makes the model's shape of what version 2 says of it.
        rank: whose share of the store is meant, where it was packed for several.
        raw_device: overrides the manifest's devices (comma-separated where it is striped).
        checkpoint: gives the model's shape to a version 1 manifest, which has none.

    Raises:
        UnusableInput: for a manifest that cannot be used, naming the field.
    """
    manifest = load_json(path)
    targets = tuple(raw_device.split(",")) if raw_device else None
    if targets is not None and not all(targets):
        raise UnusableInput(f"--raw-device {raw_device} names an empty device")
    if manifest["version"] == 1 and "format" not in manifest:
        return describe_v1(manifest, path, targets, checkpoint)
    if manifest.get("format") != FORMAT or manifest["version"] != VERSION:
        raise UnusableInput(
            f"--manifest {path}: version {manifest['version']!r} of format {manifest.get('format')!r} is not known; "
            f"versions 1 and {VERSION} are"
        )
    return _describe_v2(manifest, path, targets, rank, read_shape)


def _describe_v2(
    manifest: dict[str, Any], path: Path, targets: tuple[str, ...] | None, rank: int, read_shape: ReadShape
) -> StoreDescription:
    try:
        named = tuple(manifest["targets"])
        if (
            not named
            or isinstance(manifest["targets"], str)
            or not all(name and isinstance(name, str) for name in named)
        ):
            raise UnusableInput(f"--manifest {path}: field targets must list the devices, not {manifest['targets']!r}")
        plan, checksums = _checked_plan(manifest, path, len(named), read_shape)
        sources = tuple(SourceFile(**source) for source in manifest["source"])
        store_id, digest = manifest["store_id"], manifest_digest(manifest)
        if len(bytes.fromhex(store_id)) != STORE_ID_BYTES:
            raise UnusableInput(f"--manifest {path}: field store_id is not {STORE_ID_BYTES} bytes in hexadecimal")
    except KeyError as error:
        raise UnusableInput(f"--manifest {path} is damaged: field {error} is missing; {AGAIN}") from error
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UnusableInput):
            raise
        raise UnusableInput(f"--manifest {path} is damaged: {error}; {AGAIN}") from error
    if targets is not None and len(targets) != len(named):
        raise UnusableInput(f"--raw-device names {len(targets)} devices, the store is striped over {len(named)}")
    rank = min(rank, plan.tp - 1)  # a store of another number of ranks is refused by whoever wants to run it
    named_rank = rank if plan.tp > 1 else None
    groups = {
        group: StoredGroup(group, layout, plan.extents(group, rank), checksums[group][rank], named_rank)
        for group, layout in plan.layouts.items()
    }
    return StoreDescription(
        VERSION,
        path,
        targets or named,
        plan.config,
        plan.dtype,
        groups,
        tuple(Superblock(store_id, digest, number, len(named)) for number in range(len(named))),
        sources,
        shard=Shard(rank, plan.tp),
        content=_content_digest(manifest),
    )


def _checked_plan(
    manifest: Mapping[str, Any], path: Path, targets: int, read_shape: ReadShape
) -> tuple[StorePlan, dict[GroupId | None, tuple[str, ...]]]:
    """The one layout that a version 2 store of this model can have, and the checksums; anything else is damage."""
    if manifest["dtype"] not in DTYPES:
        raise UnusableInput(
            f"--manifest {path}: field dtype: {manifest['dtype']!r} is not known; {', '.join(DTYPES)} are"
        )
    if manifest["block_size"] != BLOCK:
        raise UnusableInput(f"--manifest {path}: field block_size is {manifest['block_size']!r}, not {BLOCK}; {AGAIN}")
    try:
        config = read_shape(manifest["model"])
    except UnusableInput as error:
        raise UnusableInput(f"--manifest {path}: field model: {error}") from error
    found = manifest["groups"]
    if not isinstance(found, list) or len(found) != len(KINDS) * config.n_layers:
        raise UnusableInput(f"--manifest {path}: field groups does not list the groups of {config.n_layers} layers")
    tp = manifest.get("tp", 1)
    if type(tp) is not int or tp < 1:
        raise UnusableInput(f"--manifest {path}: field tp must be a number of ranks, not {tp!r}; {AGAIN}")
    plan = plan_store(config, DTYPES[manifest["dtype"]], targets, tp)
    checksums: dict[GroupId | None, tuple[str, ...]] = {}
    for group, entry in zip(plan.offsets, [manifest["globals"], *found], strict=True):
        where = f"--manifest {path}: {'globals' if group is None else f'group {group}'}"
        if not isinstance(entry, dict):
            raise UnusableInput(f"{where} is no object; {AGAIN}")
        checksums[group] = _checksums(entry, tp, where)
        _check_same(entry, _entry(plan, group, checksums[group]), where)
    return plan, checksums


def _checksums(entry: Mapping[str, Any], tp: int, where: str) -> tuple[str, ...]:
    """One a rank."""
    if tp == 1:
        return (_checksum(entry.get("checksum"), where),)
    found = entry.get("checksums")
    if not isinstance(found, list) or len(found) != tp:
        raise UnusableInput(f"{where}: field checksums must have one for each of {tp} ranks; {AGAIN}")
    return tuple(_checksum(value, f"{where}: checksums[{rank}]") for rank, value in enumerate(found))


def _checksum(value: object, where: str) -> str:
    if not isinstance(value, str) or not _CHECKSUM.fullmatch(value):
        raise UnusableInput(f"{where}: field checksum must be 32 hexadecimal digits, not {value!r}; {AGAIN}")
    return value


def _check_same(found: Any, expected: Any, where: str) -> None:
    """Compare an entry with what it has to be, field by field, so that the sentence names the one that differs."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if missing := [key for key in expected if key not in found]:
            raise UnusableInput(f"{where}: field {missing[0]} is missing; {AGAIN}")
        for key, value in expected.items():
            _check_same(
                found[key], value, f"{where}: field {key}" if not isinstance(value, list) else f"{where}: {key}"
            )
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for number, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
            _check_same(theirs, mine, f"{where}[{number}]")
    elif found != expected or isinstance(found, bool):
        raise UnusableInput(f"{where} is {_brief(found)}; the model and its dtype ask for {_brief(expected)}; {AGAIN}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
