"""checkpoint -> packed store: sequential writes, and a manifest only when everything is on the drive."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.checkpoint.names import GroupId, full_name
from llama.config import UnusableInput
from wsm.atomic import sync_directory, write_atomically
from wsm.blockdev import check_writable, device_size, is_block_device, logical_block
from wsm.errors import DoesNotFit, StoreError
from wsm.groups import BLOCK, views
from wsm.manifest import StorePlan, manifest_digest, manifest_json, plan_store, stripes
from wsm.store import unusable_target
from wsm.superblock import Superblock

WRITE_BYTES = 8 << 20
READERS = 4

Progress = Callable[[int], None]
Confirm = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class PackRequest:
    """What to pack and where; ``targets`` are files or block devices, striped if there are several."""

    targets: tuple[str, ...]
    manifest: Path
    dtype: torch.dtype
    force: bool = False


def pack(
    checkpoint: Checkpoint, request: PackRequest, *, confirm: Confirm, progress: Progress = lambda nbytes: None
) -> None:
    """Write ``checkpoint`` to the targets and the manifest last.

    Each tensor of the checkpoint is read once. Broken off at any point, it leaves no manifest, no valid superblock,
    and no file that was not there before.

    Args:
        confirm: asked with a sentence before anything that exists is overwritten.
        progress: called with the bytes of each group written.

    Raises:
        UnusableInput: for a target that must not be written.
        DoesNotFit: if a target is too small.
    """
    plan = plan_store(checkpoint.config, request.dtype, len(request.targets))
    _check_targets(request, plan, confirm)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(target)) for target in request.targets]
        with contextlib.suppress(FileNotFoundError):
            request.manifest.unlink()
        empty = memoryview(mmap.mmap(-1, BLOCK))
        for file in files:
            _write(file, empty, 0)
            os.fsync(file)
        checksums = _write_groups(checkpoint, plan, files, progress)
        for file in files:
            os.fsync(file)
        manifest = manifest_json(
            plan,
            store_id=uuid.uuid4().hex,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            targets=[os.path.abspath(target) for target in request.targets],
            sources=checkpoint.sources(),
            checksums=checksums,
        )
        _write_superblocks(files, manifest["store_id"], manifest_digest(manifest))
        write_atomically(request.manifest, json.dumps(manifest, indent=1) + "\n")


def _check_targets(request: PackRequest, plan: StorePlan, confirm: Confirm) -> None:
    """In the order of DESIGN section 7: in use, bears a signature, too small; then ask."""
    if len({os.path.realpath(target) for target in request.targets}) != len(request.targets):
        raise UnusableInput("--to names one target twice")
    overwritten = []
    for target in request.targets:
        try:
            if is_block_device(target):
                check_writable(target, force=request.force)
        except PermissionError as error:
            raise unusable_target(target, error) from error
        _check_size(target, plan.target_bytes)
        if os.path.exists(target):
            overwritten.append(target)
    if not request.manifest.parent.is_dir():
        raise UnusableInput(f"--manifest {request.manifest}: its directory does not exist")
    if overwritten and not confirm(
        f"This overwrites {plan.target_bytes / 1e9:.2f} GB at the start of {', '.join(overwritten)}. Go on?"
    ):
        raise UnusableInput("not confirmed: nothing was written; --yes confirms")


def _check_size(target: str, needed: int) -> None:
    if is_block_device(target):
        try:
            file = os.open(target, os.O_RDONLY)
        except OSError as error:
            raise unusable_target(target, error) from error
        try:
            room, block = device_size(file), logical_block(file)
        finally:
            os.close(file)
        if block > BLOCK:
            raise UnusableInput(f"{target} has logical blocks of {block} bytes; up to {BLOCK} are supported")
        have = "it has"
    else:
        path = Path(target)
        if path.exists() and not path.is_file():
            raise UnusableInput(f"--to {target} is neither a file nor a block device")
        if not path.absolute().parent.is_dir():
            raise UnusableInput(f"--to {target}: its directory does not exist")
        usage = os.statvfs(path.absolute().parent)
        room = usage.f_bavail * usage.f_frsize + (path.stat().st_blocks * 512 if path.exists() else 0)
        have = "its filesystem has"
    if room < needed:
        raise DoesNotFit(
            f"{target} is too small: the store takes {needed / 1e9:.3f} GB, {have} {room / 1e9:.3f} GB; "
            "nothing was written"
        )


@contextlib.contextmanager
def _opened(target: str) -> Iterator[int]:
    """The target, open for writing, O_EXCL; a file that this made goes again if packing fails."""
    device = is_block_device(target)
    new = not os.path.exists(target)
    flags = os.O_RDWR | (os.O_EXCL if device else os.O_CREAT)
    try:
        try:
            file = os.open(target, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file = os.open(target, flags, 0o644)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UnusableInput(f"{target} is in use: nothing was written; choose a free device") from error
        raise unusable_target(target, error) from error
    try:
        yield file
    except BaseException:
        if new and not device:
            os.unlink(target)
        raise
    finally:
        os.close(file)
    if new and not device:
        sync_directory(Path(target).absolute().parent)


def _write_groups(
    checkpoint: Checkpoint, plan: StorePlan, files: Sequence[int], progress: Progress
) -> dict[GroupId | None, str]:
    """Groups in order, one being read while the one before it is written; their checksums."""
    groups = list(plan.layouts)
    largest = max(layout.nbytes for layout in plan.layouts.values())
    buffers = [torch.frombuffer(mmap.mmap(-1, largest), dtype=torch.uint8) for _ in range(2)]
    checksums: dict[GroupId | None, str] = {}
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(READERS) as readers:
        coming = ahead.submit(_make_image, checkpoint, plan, groups[0], buffers[0], readers)
        for number, group in enumerate(groups):
            image = memoryview(coming.result().numpy().data)
            if number + 1 < len(groups):
                coming = ahead.submit(
                    _make_image, checkpoint, plan, groups[number + 1], buffers[(number + 1) % 2], readers
                )
            checksums[group] = xxhash.xxh3_128_hexdigest(image)
            for extent in stripes(len(image), plan.offsets[group], plan.targets):
                part = image[extent.slot_offset : extent.slot_offset + extent.nbytes]
                _write(files[extent.target], part, extent.offset)
            progress(len(image))
    return checksums


def _make_image(
    checkpoint: Checkpoint, plan: StorePlan, group: GroupId | None, buffer: Tensor, readers: ThreadPoolExecutor
) -> Tensor:
    layout = plan.layouts[group]
    image = buffer[: layout.nbytes]
    tensors = views(image, layout)
    end = 0
    for tensor in layout.tensors:
        image[end : tensor.offset].zero_()
        end = tensor.offset + tensor.nbytes
    image[end:].zero_()
    list(readers.map(lambda item: checkpoint.read_into(full_name(group, item[0]), item[1]), tensors.items()))
    return image


def _write_superblocks(files: Sequence[int], store_id: str, digest: str) -> None:
    for number, file in enumerate(files):
        block = memoryview(mmap.mmap(-1, BLOCK))
        block[:] = Superblock(store_id, digest, number, len(files)).to_bytes()
        _write(file, block, 0)
        os.fsync(file)


def _write(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(file, data[done : done + WRITE_BYTES], offset + done)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DoesNotFit(f"the target is full after {offset + done} bytes; the store is void") from error
            raise StoreError(f"write error at byte {offset + done}: {error.strerror}; the store is void") from error
