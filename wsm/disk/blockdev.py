"""What a block device is, and what it or a file bears."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import shutil
import stat
import struct
import subprocess

from wsm.errors import UnusableInput

_BLKSSZGET = 0x1268
_TOOL_PATH = f"{os.defpath}:/usr/sbin:/sbin"
"""blkid is in /usr/sbin, which is not on every user's PATH."""
_BLKID_TIMEOUT_S = 60


def is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def logical_block(file: int) -> int:
    """The unit of I/O of an open block device in bytes."""
    return int(struct.unpack("I", fcntl.ioctl(file, _BLKSSZGET, b"\0" * 4))[0])


def target_size(file: int) -> int:
    """Bytes of an open file or block device."""
    return os.lseek(file, 0, os.SEEK_END)


def device_number(path: str) -> str:
    """major:minor of a block device, as /proc and /sys write it."""
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def unusable_target(target: str, error: OSError) -> UnusableInput:
    """The sentence for a target that cannot be opened; for a refused device it names the group that has it."""
    if error.errno == errno.EBUSY:
        return UnusableInput(f"{target} is in use: nothing was written; choose a free device")
    if error.errno not in (errno.EACCES, errno.EPERM):
        return UnusableInput(f"{target} cannot be opened: {error.strerror}")
    if not is_block_device(target):
        return UnusableInput(f"no permission on {target}: change its mode or its owner, or name another place")
    status = os.stat(target)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    if status.st_gid == 0 or os.geteuid() == 0:  # nobody joins root's group for a drive, and root gains nothing by any
        return UnusableInput(
            f"no permission on {target}: it is for root outside a container; run with sudo there, or name another place"
        )
    return UnusableInput(
        f"no permission on {target}: it belongs to group {group}; run `sudo usermod -aG {group} $USER` and log in again"
    )


def signatures(path: str, *, mend: str = "give --force") -> list[str]:
    """What blkid finds on a device or in a file, by type: "a signature of type ext4", "a partition table of type gpt".

    Raises UnusableInput, with ``mend`` as what to do, if blkid (util-linux) is not there or cannot read it.
    """
    if (blkid := shutil.which("blkid", path=_TOOL_PATH)) is None:
        raise UnusableInput(
            f"blkid, which tells whether {path} bears a filesystem, is not installed: nothing was written; "
            f"install util-linux, or {mend}"
        )
    command = [blkid, "-p", "-o", "export", path]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_BLKID_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnusableInput(f"blkid did not answer about {path} ({error}): clear it, or {mend}") from error
    if answer.returncode == 8:
        return ["more than one signature"]
    # blkid answers 2 both for a bare device and for one that it cannot read.
    if answer.returncode not in (0, 2) or answer.stderr.strip():
        raise UnusableInput(
            f"blkid could not read {path} ({answer.stderr.strip() or answer.returncode}): nothing was written; "
            f"look at it, or {mend}"
        )
    what = {"TYPE": "a signature of type", "PTTYPE": "a partition table of type"}
    entries = (line.partition("=") for line in answer.stdout.splitlines())
    return [f"{what[key]} {value}" for key, _, value in entries if key in what]
