"""The packed file in the cache directory: what ``mixed`` streams from where no device is named."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

import torch

from wsm.disk.atomic import locked
from wsm.disk.targets import free_bytes
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.formats.mix import Formats
from wsm.layout.model import WHOLE, Shard, TensorSource
from wsm.store.description import DTYPE_NAMES, StoreDescription
from wsm.store.layout import FORMATTED, VERSION, plan_store
from wsm.store.manifest import read_manifest
from wsm.store.pack import PackRequest, Progress, pack
from wsm.store.packed_store import PackedStore

_SHOWN = 64
"""Characters of a model's and of a mix's name in a file's, which has room for 255; the digest knows all of them."""


def store_path(
    checkpoint: TensorSource,
    dtype: torch.dtype,
    cache_dir: Path,
    tp: int = 1,
    weight_format: Formats | None = None,
) -> Path:
    """Where a checkpoint's packed file is: one per dtype, weight format and number of ranks, named after its sources'
    content."""
    files = []
    for file in checkpoint.sources():
        # In ns: its digest is a sample, and must not be all that tells two files apart.
        written = (checkpoint.directory / file.name).stat().st_mtime_ns if checkpoint.directory is not None else None
        files.append([*astuple(file), written])
    content = [VERSION, DTYPE_NAMES[dtype], checkpoint.config.to_json(), files, *([tp] if tp > 1 else [])]
    form = ""
    if weight_format is not None:
        content, form = [*content, FORMATTED, weight_format.name], f"{weight_format.name[:_SHOWN]}-"
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    name = "".join(c if c.isalnum() or c in "-._" else "_" for c in checkpoint.config.name[:_SHOWN])
    return cache_dir / f"{name}-{DTYPE_NAMES[dtype]}-{form}{f'tp{tp}-' if tp > 1 else ''}{digest}.wsm"


def cached_store(
    checkpoint: TensorSource,
    dtype: torch.dtype,
    cache_dir: Path,
    *,
    say: Callable[[str], None],
    progress: Callable[[int], Progress],
    shard: Shard = WHOLE,
    weight_format: Formats | None = None,
) -> StoreDescription:
    """The checkpoint's packed file, packed now if it is not there or not whole; DoesNotFit if there is too little room.

    It is packed for ``shard.size`` ranks, and the part of ``shard`` described. ``say`` is called with the size and the
    free space before anything is written, ``progress`` with the bytes to come, and its answer with those of each group.
    """
    path = store_path(checkpoint, dtype, cache_dir, shard.size, weight_format)
    manifest = path.with_suffix(".json")
    label = f"--cache-dir {cache_dir}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnusableInput(f"{label} cannot be used: {error.strerror}") from error
    with locked(path.with_suffix(".lock"), label):  # two runs that start together pack once
        if found := _sound(checkpoint, manifest, path, shard.rank):
            return found
        try:  # what is damaged goes, and is nobody else's
            manifest.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UnusableInput(f"{label} cannot be used: {error.filename}: {error.strerror}") from error
        _remove_unfinished(cache_dir)
        plan = plan_store(checkpoint.config, dtype, 1, shard.size, weight_format)
        size = plan.target_bytes
        how = "" if weight_format is None else f" in {weight_format.name}"
        most = "at most " if plan.is_bound else ""
        free = free_bytes(cache_dir)
        say(f"packing the model once{how} into {path}: {most}{size / 1e9:.2f} GB, {free / 1e9:.2f} GB free")
        if free < size:
            raise DoesNotFit(
                f"{cache_dir} has {free / 1e9:.2f} GB free, the packed model takes {size / 1e9:.2f} GB: "
                "free some space, or name another --cache-dir"
            )
        request = PackRequest((str(path),), manifest, dtype, tp=shard.size, weight_format=weight_format)
        pack(checkpoint, request, confirm=lambda question: True, progress=progress(size))
        return read_manifest(manifest, checkpoint.config.from_json, rank=shard.rank)


def _sound(checkpoint: TensorSource, manifest: Path, path: Path, rank: int) -> StoreDescription | None:
    """The store, if its manifest and superblock are there and fit each other."""
    try:
        description = read_manifest(manifest, checkpoint.config.from_json, raw_device=str(path), rank=rank)
        PackedStore(description, staging_bytes=1 << 20).close()
    except (UnusableInput, StoreError):
        return None
    return description


def _remove_unfinished(cache_dir: Path) -> None:
    """Remove packed files whose packing was killed: with a lock of ours, no manifest, and nobody at work on them."""
    for path in cache_dir.glob("*.wsm"):
        with suppress(OSError), path.with_suffix(".lock").open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.with_suffix(".json").exists():
                path.unlink()
