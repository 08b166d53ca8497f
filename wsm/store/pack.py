"""checkpoint -> packed store: sequential writes, and a manifest only when everything is on the drive."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wsm import stop
from wsm.disk.atomic import NO_ROOM, remove_left_behind, sync_directory, write_atomically
from wsm.disk.checksums import xxh3_128
from wsm.disk.direct import aligned_block
from wsm.disk.io_threads import IOThreads, transfer_fully
from wsm.disk.targets import check_place, check_targets, opened
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.formats.mix import Formats
from wsm.layout.groups import GroupId
from wsm.layout.model import Shard, SourceFile, TensorSource
from wsm.store.description import DTYPE_NAMES
from wsm.store.images import Moments, make_images
from wsm.store.layout import (
    FORMATTED,
    VERSION,
    Extent,
    StorePlan,
    Superblock,
    WrittenGroup,
    plan_store,
    stride_of,
    stripes,
)
from wsm.store.manifest import load_json, manifest_digest, new_manifest
from wsm.threads import ThreadsStuck

READERS = 4

Progress = Callable[[int], None]


class Calibration(NamedTuple):
    """What quantising looks at, on one rank, and what is ``told`` of it in the manifest."""

    moments: Moments
    told: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack, where and for how many ranks; ``targets`` are files or block devices, striped if several.

    A ``weight_format`` of None: every tensor as it is, in ``dtype``.
    """

    targets: tuple[str, ...]
    manifest: Path
    dtype: torch.dtype
    force: bool = False
    tp: int = 1
    weight_format: Formats | None = None
    calibration: Calibration | None = None


def pack(
    checkpoint: TensorSource,
    request: PackRequest,
    *,
    confirm: Callable[[str], bool],
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write ``checkpoint`` to the targets, each tensor read once, and the manifest last.

    Broken off at any point, it leaves no manifest, no valid superblock, and no file that was not there before.
    ``confirm`` is asked with a sentence before anything that exists is overwritten; ``progress`` is called with the
    bytes of each group written. Raises UnusableInput for a target that must not be written or an answer of no,
    DoesNotFit for one that is too small, StoreError for one that cannot be written.
    """
    if request.dtype not in DTYPE_NAMES:
        raise UnusableInput(f"a store of {request.dtype} cannot be packed; {', '.join(DTYPE_NAMES.values())} can")
    plan = plan_store(checkpoint.config, request.dtype, len(request.targets), request.tp, request.weight_format)
    sources = checkpoint.sources()
    _check_places(checkpoint, request)
    remove_left_behind(request.manifest.resolve())
    lost = check_targets(request.targets, plan.target_bytes, force=request.force)
    if request.manifest.exists():
        lost.append(f"the manifest {request.manifest}")
    if lost and not confirm(f"This writes {plan.target_bytes / 1e9:.2f} GB over {', '.join(lost)}. Go on?"):
        raise UnusableInput("not confirmed: nothing was written; --yes confirms")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(opened(target)) for target in request.targets]
        _remove(request.manifest)
        try:
            _write_store(checkpoint, sources, request, plan, files, progress)
        except ThreadsStuck:  # no superblock is there yet; to write to a drive that answers no more would never end
            raise
        except BaseException:
            # It may come after the superblock, even after the manifest: take both back.
            with contextlib.suppress(OSError):
                request.manifest.unlink(missing_ok=True)
            with contextlib.suppress(OSError, StoreError, DoesNotFit):
                _write_first(files, [b""] * len(files))
            raise


def _write_store(
    checkpoint: TensorSource,
    sources: Sequence[SourceFile],
    request: PackRequest,
    plan: StorePlan,
    files: Sequence[int],
    progress: Progress,
) -> None:
    """Nothing that looks like a store exists until the end, and each step is on the drive before the next begins."""
    _write_first(files, [b""] * len(files))
    calibration = request.calibration
    written = _write_groups(checkpoint, plan, files, progress, calibration.moments if calibration else None)
    for file in files:
        _sync(file)
    manifest = new_manifest(plan, request.targets, sources, written)
    if calibration is not None:
        manifest["calibration"] = dict(calibration.told)
    store_id, digest = manifest["store_id"], manifest_digest(manifest)
    ids = store_id, digest
    version = VERSION if plan.weight_format is None else FORMATTED
    blocks = [Superblock(*ids, number, len(files), version).to_bytes() for number in range(len(files))]
    _write_first(files, blocks)
    try:
        write_atomically(request.manifest, json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        raise UnusableInput(
            f"--manifest {request.manifest} cannot be written: {error.strerror}; nothing was packed"
        ) from error


def _remove(manifest: Path) -> None:
    """The old manifest goes, for good, before what it names is touched."""
    try:
        manifest.unlink(missing_ok=True)
        sync_directory(manifest.absolute().parent)
    except OSError as error:
        raise UnusableInput(
            f"--manifest {manifest} cannot be replaced: {error.strerror}; the target was not written"
        ) from error


def _check_places(checkpoint: TensorSource, request: PackRequest) -> None:
    """The manifest can be written, and nothing that is written is also read."""
    manifest = Path(os.path.realpath(request.manifest))
    if manifest.exists() and not manifest.is_file():
        raise UnusableInput(f"--manifest {request.manifest} is no file: name one to be written")
    check_place(str(manifest), f"--manifest {request.manifest}")
    if not os.access(manifest.parent, os.W_OK):
        raise UnusableInput(f"--manifest {request.manifest}: no permission to write in its directory")
    if manifest.exists():
        load_json(manifest)  # raises where a file that is no manifest would be lost
    own = checkpoint.own_files()
    for target in map(Path, request.targets):
        if os.path.realpath(target) == str(manifest):
            raise UnusableInput(f"--to and --manifest both name {target}: the store and its manifest are two files")
        if target.exists() and any(target.samefile(path) for path in own):
            raise UnusableInput(f"--to {target} is a file of the checkpoint itself: name another place")
    if manifest.exists() and any(manifest.samefile(path) for path in own):
        raise UnusableInput(f"--manifest {manifest} is a file of the checkpoint itself: name another place")


def _write_groups(
    checkpoint: TensorSource,
    plan: StorePlan,
    files: Sequence[int],
    progress: Progress,
    moments: Moments | None,
) -> dict[GroupId | None, WrittenGroup]:
    """Groups in order, one group's images being made while those before are written; what is where then."""
    # Each group rank by rank: what the ranks share a page of is read from the drive once, whichever way it is cut.
    shares = [checkpoint.share(Shard(rank, plan.tp)) for rank in range(plan.tp)]
    groups, room = list(plan.layouts), max(layout.nbytes for layout in plan.layouts.values())
    # Mapped, so aligned as O_DIRECT asks, and only as much of it in memory as the groups that pass through it need.
    buffers = [[torch.frombuffer(mmap.mmap(-1, room), dtype=torch.uint8) for _ in shares] for _ in range(2)]
    written: dict[GroupId | None, WrittenGroup] = {}
    offset = plan.offsets[None]
    with IOThreads(READERS, "wsm-pack-in") as readers, IOThreads(len(files), "wsm-pack-out") as out:
        coming = make_images(shares, groups[0], plan, buffers[0], readers, moments)
        for number, group in enumerate(groups):
            layouts = stop.result(coming)
            nbytes, checksums = layouts[0].nbytes, []
            if number + 1 < len(groups):
                buffer_of_next = buffers[(number + 1) % 2]
                coming = make_images(shares, groups[number + 1], plan, buffer_of_next, readers, moments)
            for rank, buffer in enumerate(buffers[number % 2]):
                image = memoryview(buffer[:nbytes].numpy().data)
                extents = stripes(nbytes, offset + rank * stride_of(nbytes, plan.targets), plan.targets)
                moved = out.submit(partial(_write_extent, files, image, extent, out) for extent in extents)
                checksums.append(xxh3_128(image))
                stop.result(moved)
                progress(plan.layouts[group].nbytes)
            written[group] = WrittenGroup(offset, layouts, checksums)
            offset += plan.tp * stride_of(nbytes, plan.targets)
    return written


def _write_extent(files: Sequence[int], image: memoryview, extent: Extent, out: IOThreads) -> None:
    """It may be gigabytes: no more of it is begun once ``out`` is closed, as the target will be."""

    def write_some(file: int, data: Sequence[memoryview], offset: int) -> int:
        out.check()
        return os.pwritev(file, data, offset)

    part = image[extent.slot_offset : extent.slot_offset + extent.nbytes]
    transfer_fully(write_some, files[extent.target], [part], extent.offset, _write_error)


def _write_first(files: Sequence[int], contents: Sequence[bytes]) -> None:
    """The first 4096 bytes of every target, zeros behind the content, on the drive when this returns."""
    for file, content in zip(files, contents, strict=True):
        _write(file, memoryview(aligned_block(content)), 0)
        _sync(file)


def _write(file: int, data: memoryview, offset: int) -> None:
    transfer_fully(os.pwritev, file, [data], offset, _write_error)


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:
        raise _write_error(0, error) from error


def _write_error(offset: int, error: OSError | int) -> Exception:
    if isinstance(error, int):
        return StoreError(f"the target took {error} bytes at byte {offset} and no more; nothing was packed")
    if error.errno in NO_ROOM:
        return DoesNotFit(f"the target is full after {offset / 1e9:.3f} GB; nothing was packed: make room, then again")
    return StoreError(f"write error at byte {offset} of the target: {error.strerror}; nothing was packed")
