"""What a block device is and holds, asked before anything is written to it."""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import re
import shutil
import stat
import struct
import subprocess
from pathlib import Path

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
    return UnusableInput(
        f"no permission on {target}: it belongs to group {group}; run `sudo usermod -aG {group} $USER` and log in again"
    )


def related_devices(path: str, sys_dev: Path = Path("/sys/dev/block")) -> dict[str, str]:
    """major:minor -> name of what writing to a device would hurt: itself, its partitions, the disk that it is part of.

    The other partitions of that disk are not among them.
    """
    number = device_number(path)
    node = (sys_dev / number).resolve()
    relatives = {number: node.name}
    for partition in sorted(node.glob("*/partition")):
        relatives[(partition.parent / "dev").read_text().strip()] = partition.parent.name
    if (node / "partition").exists():
        relatives[(node.parent / "dev").read_text().strip()] = node.parent.name
    return relatives


def why_busy(path: str, *, root: Path = Path("/")) -> str | None:
    """Why a device is in use, itself, a partition of it or its disk; None if it is not. ``root`` has /proc and /sys."""
    sys_dev = root / "sys/dev/block"
    relatives = related_devices(path, sys_dev)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        number, where = fields.split()[2], _unescaped(fields.split()[4])
        # btrfs mounts under a number of its own, and only the source tells which device is behind it.
        source = _unescaped(rest.split()[1]) if len(rest.split()) > 1 else ""
        for mounted in (number, device_number(source) if is_block_device(source) else ""):
            if mounted in relatives:
                return f"{relatives[mounted]} is mounted on {where}"
    for line in (root / "proc/swaps").read_text().splitlines()[1:]:
        used = _unescaped(line.split()[0])
        if is_block_device(used) and device_number(used) in relatives:
            return f"{used} is in use as swap"
    for number, name in relatives.items():
        holders = sys_dev / number / "holders"
        if holders.is_dir() and (held := sorted(os.listdir(holders))):
            return f"{name} is held by {', '.join(held)} (LVM, RAID or encryption)"
    return None


def loop_device_over(file: Path, *, root: Path = Path("/")) -> str | None:
    """The loop device whose contents a file is, such as ``loop0``; None if there is none. ``root`` has /sys."""
    for backing in sorted(root.glob("sys/block/loop*/loop/backing_file")):
        try:
            if file.samefile(backing.read_text().strip()):
                return backing.parent.parent.name
        except OSError:  # detached just now, or its file has been deleted
            continue
    return None


def _unescaped(text: str) -> str:
    r"""The kernel writes a space in a path as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def signatures(path: str, *, mend: str = "give --force") -> list[str]:
    """What blkid finds on a device, by type: "a signature of type ext4", "a partition table of type gpt".

    Raises UnusableInput, with ``mend`` as what to do, if blkid (util-linux) is not there or cannot read the device.
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
        raise UnusableInput(f"blkid did not answer about {path} ({error}): clear the device, or {mend}") from error
    if answer.returncode == 8:
        return ["more than one signature"]
    # blkid answers 2 both for a bare device and for one that it cannot read.
    if answer.returncode not in (0, 2) or answer.stderr.strip():
        raise UnusableInput(
            f"blkid could not read {path} ({answer.stderr.strip() or answer.returncode}): nothing was written; "
            f"look at the device, or {mend}"
        )
    what = {"TYPE": "a signature of type", "PTTYPE": "a partition table of type"}
    entries = (line.partition("=") for line in answer.stdout.splitlines())
    return [f"{what[key]} {value}" for key, _, value in entries if key in what]


def check_writable(
    path: str,
    *,
    force: bool = False,
    label: str = "",
    instead: str = "give --force",
    mend: str = "--force overwrites it",
    root: Path = Path("/"),
) -> list[str]:
    """Raises UnusableInput for a device that is in use or, without ``force``, holds something; returns what it holds.

    The sentence names the device by ``label``, its path where that is empty. ``instead`` and ``mend`` say what the user
    may do where blkid cannot tell, and where there is a signature. ``root`` has /proc and /sys.
    """
    label = label or path
    if busy := why_busy(path, root=root):
        raise UnusableInput(f"{label} is in use ({busy}): nothing was written; choose a free device")
    try:
        found = signatures(path, mend=instead)
    except UnusableInput:
        if not force:
            raise
        return []
    if found and not force:
        raise UnusableInput(f"{label} bears {' and '.join(found)}: nothing was written; {mend}")
    return found
