"""The file or block device that KV is offloaded to: what must not be written, how it is taken and given back."""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from collections.abc import Sequence

from wsm.disk.atomic import NO_ROOM
from wsm.disk.blockdev import device_number, is_block_device, target_size
from wsm.disk.direct import aligned_block, is_buffered
from wsm.disk.safety import check_writable, related_devices
from wsm.disk.targets import check_blocks, check_place, free_bytes, open_target, reading, sealed, take, unsealed
from wsm.errors import DoesNotFit, KVDeviceError, UnusableInput
from wsm.layout.groups import BLOCK
from wsm.store.layout import MAGIC as STORE_MAGIC

MAGIC = b"WSMKV\0\0\0"
VERSION = 1
_LOOKED_AT = 64 << 20
_FIELDS = struct.Struct("<8sII16s")


def kv_superblock(run: bytes, *, made: bool = False) -> bytes:
    """The first 4096 bytes of a target that the run of that id (16 bytes) has taken; ``made``: a file of its own."""
    return sealed(_FIELDS.pack(MAGIC, VERSION, made, run))


def _fields_of(block: bytes) -> tuple[bytes, bool] | None:
    fields = unsealed(block, _FIELDS.size) if block.startswith(MAGIC) else None
    if fields is None:
        return None
    _, _, made, run = _FIELDS.unpack(fields)
    return run, bool(made)


def run_of(block: bytes) -> bytes | None:
    """The id of the run that a target was last taken by; None if ``block`` is no KV superblock."""
    fields = _fields_of(block)
    return fields[0] if fields is not None else None


def _told(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB ({nbytes} bytes)"


class KVTarget:
    """A file or block device, open past the page cache, ours alone, its superblock written and its space reserved.

    It takes ``nbytes`` of KV behind the superblock; ``weights`` are the files and devices of this run's weights. Raises
    UnusableInput for what must not be written, before anything is, DoesNotFit if it is too small, and KVDeviceError if
    it cannot be read or written.
    """

    def __init__(self, path: str, nbytes: int, weights: Sequence[str]) -> None:
        self.path = path
        self._run = uuid.uuid4().bytes
        self._is_device = is_block_device(path)
        _check_apart(path, weights)
        if self._is_device:
            _check_device(path)
        else:
            check_place(path, f"--kv-device {path}")
        self.file, self._made = open_target(path)
        self.buffered = is_buffered(self.file)
        self._taken = False
        try:
            self._check_content()
            take(self.file, path)
            self._check_content()  # again: from here on nobody else changes it
            left = _fields_of(_head(self.file, path))
            self._made = self._made or (left is not None and left[1])  # a killed run's own: it goes with this one
            self._taken = True
            self._fill(BLOCK + nbytes)
        except BaseException:
            with contextlib.suppress(KVDeviceError):
                self.give_back()
            raise

    def _check_content(self) -> None:
        head = _head(self.file, self.path)
        if not self._is_device and target_size(self.file) and run_of(head) is None:
            raise UnusableInput(
                f"--kv-device {self.path} holds something that is no offloaded KV: nothing was written; "
                "name a file that does not exist yet, or move this one away"
            )

    def _fill(self, nbytes: int) -> None:
        """Write the superblock and reserve the rest of ``nbytes``."""
        self._check_room(nbytes)
        try:
            # First: a file that a killed run leaves behind is then known for ours.
            os.pwritev(self.file, [aligned_block(kv_superblock(self._run, made=self._made))], 0)
            if not self._is_device:
                # Through a descriptor without O_DIRECT: where there is no such call, libc writes.
                with open(f"/proc/self/fd/{self.file}", "rb+", buffering=0) as file:
                    os.posix_fallocate(file.fileno(), 0, nbytes)
            if self._made:
                os.fchmod(self.file, 0o600)  # it tells what the prompts were
        except OSError as error:
            if error.errno in NO_ROOM:
                raise self._too_small(nbytes, f"the filesystem has no room for it ({error.strerror})") from error
            raise KVDeviceError(
                f"--kv-device {self.path} cannot be written: {error.strerror}; check the drive, or name another place"
            ) from error
        if run_of(_head(self.file, self.path)) != self._run:
            raise KVDeviceError(f"--kv-device {self.path} does not keep what is written to it; check the drive")

    def _check_room(self, nbytes: int) -> None:
        if self._is_device:
            room, told = target_size(self.file), "the device has {}"
        elif os.statvfs(self.file).f_blocks == 0:  # a filesystem that does not say
            return
        else:
            room = free_bytes(self.file) + os.fstat(self.file).st_blocks * 512
            told = "the filesystem has {} free"
        if room < nbytes:
            raise self._too_small(nbytes, told.format(_told(room)))

    def _too_small(self, nbytes: int, room: str) -> DoesNotFit:
        return DoesNotFit(
            f"--kv-device {self.path} is too small: the KV takes {_told(nbytes)} there, {room}; "
            "name a larger one, or lower --batch-size"
        )

    def give_back(self) -> None:
        """Close it; remove a file that this run made, empty one that was there, leave a device its superblock.

        What another run has taken since, on a filesystem without locks, is left to it. Raises KVDeviceError where the
        file cannot be removed or emptied; it is known as ours to the next run.
        """
        try:
            if self._taken and not self._is_device and self._is_ours():
                if self._made:
                    os.unlink(os.path.realpath(self.path))
                else:
                    os.ftruncate(self.file, 0)
        except OSError as error:
            done = "removed" if self._made else "emptied"
            raise KVDeviceError(f"--kv-device {self.path} cannot be {done} ({error.strerror}): remove it") from error
        finally:
            os.close(self.file)

    def _is_ours(self) -> bool:
        """Whether the file is still where it was, and nobody else's."""
        with contextlib.suppress(OSError, KVDeviceError, UnusableInput):
            if not os.path.samestat(os.stat(self.path), os.fstat(self.file)):
                return False
            head = _head(self.file, self.path)
            return run_of(head) == self._run or not any(head)  # none yet: it had no room
        return False


def _check_apart(path: str, weights: Sequence[str]) -> None:
    """Refuse the weights' store itself, and a device that shares bytes with it: a partition of it, or its disk."""
    related = related_devices(path) if is_block_device(path) else {}
    for weight in weights:
        with contextlib.suppress(OSError):  # what is not there is not the same
            same = os.path.realpath(weight) == os.path.realpath(path) or os.path.samefile(weight, path)
            if same or (is_block_device(weight) and device_number(weight) in related):
                raise UnusableInput(
                    f"--kv-device {path} is where the weights of this run lie ({weight}): nothing was written; "
                    "name another file or device"
                )


def _check_device(path: str) -> None:
    """Refuse a device that holds weights, is in use, or holds anything else; nobody is asked, nothing is forced."""
    label = f"--kv-device {path}"
    with reading(path) as file:
        head = _head(file, path)
        check_writable(
            path,
            label=label,
            instead="name a file",
            mend=f"if nobody needs that, `wipefs -a {path}` clears it, or name a file",
        )
        # A store of version 1 begins at 4 MiB, without a signature.
        if run_of(head) is None and any(
            os.pread(file, 1 << 20, offset).strip(b"\0") for offset in range(0, _LOOKED_AT, 1 << 20)
        ):
            raise UnusableInput(
                f"{label} is not empty and bears no KV, but perhaps an older packed store: nothing was written; "
                f"if nobody needs it, `blkdiscard -z {path}` clears it, or name a file"
            )
        check_blocks(file, label, "KV is")


def _head(file: int, path: str) -> bytes:
    """The first 4096 bytes, or as many as there are; refused where they are a packed store's."""
    block = aligned_block()
    try:
        head = block[: os.preadv(file, [block], 0)]
    except OSError as error:
        raise KVDeviceError(
            f"--kv-device {path} at byte 0: read error: {error.strerror}; check the drive, or name another place"
        ) from error
    if head.startswith(STORE_MAGIC):
        raise UnusableInput(
            f"--kv-device {path} bears a packed store of weights: nothing was written; name another file or device"
        )
    return head
