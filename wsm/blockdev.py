"""What a block device is and bears, asked before anything is written to it."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import subprocess
from pathlib import Path

from llama.config import UnusableInput

_BLKGETSIZE64, _BLKSSZGET = 0x80081272, 0x1268


def is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def device_size(file: int) -> int:
    """Bytes of an open block device."""
    return int(struct.unpack("Q", fcntl.ioctl(file, _BLKGETSIZE64, b"\0" * 8))[0])


def logical_block(file: int) -> int:
    """The device's unit of I/O in bytes."""
    return int(struct.unpack("I", fcntl.ioctl(file, _BLKSSZGET, b"\0" * 4))[0])


def _number(path: str) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def _family(path: str, sys_block: Path) -> dict[str, str]:
    """The device and, where it is a whole disk, its partitions: major:minor -> name."""
    name = Path(os.path.realpath(path)).name
    family = {_number(path): name}
    for entry in sorted((sys_block / name).glob(f"{name}*/dev")):
        family[entry.read_text().strip()] = entry.parent.name
    return family


def why_busy(path: str, *, mountinfo: Path, swaps: Path, sys_dev: Path, sys_block: Path) -> str | None:
    """Why a device is in use, itself or one of its partitions; None if it is not.

    The paths are those of /proc/self/mountinfo, /proc/swaps, /sys/dev/block and /sys/block.
    """
    family = _family(path, sys_block)
    for line in mountinfo.read_text().splitlines():
        fields = line.split()
        if fields[2] in family:
            return f"{family[fields[2]]} is mounted on {fields[4]}"
    for line in swaps.read_text().splitlines()[1:]:
        used = line.split()[0]
        if os.path.exists(used) and is_block_device(used) and _number(used) in family:
            return f"{used} is in use as swap"
    for number, name in family.items():
        holders = sys_dev / number / "holders"
        if holders.is_dir() and (held := sorted(os.listdir(holders))):
            return f"{name} is held by {', '.join(held)} (LVM, RAID or encryption)"
    return None


def signatures(path: str) -> list[str]:
    """What blkid finds on a device: filesystem, partition table, LVM or RAID member, by type.

    Raises:
        UnusableInput: if blkid (util-linux) is not installed or cannot tell.
    """
    found: list[str] = []
    for probe in (["-u", "filesystem,raid,crypto,other"], []):
        try:
            answer = subprocess.run(
                ["blkid", "-p", *probe, "-o", "export", path], capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnusableInput(
                f"blkid (of util-linux) is needed to see whether {path} bears a filesystem: {error}; "
                "install it, or give --force"
            ) from error
        if answer.returncode == 8:
            raise UnusableInput(f"blkid finds several signatures on {path}: clear it with wipefs, or give --force")
        if answer.returncode not in (0, 2):
            raise UnusableInput(
                f"blkid could not read {path}: {answer.stderr.strip()}; clear the device, or give --force"
            )
        for line in answer.stdout.splitlines():
            key, _, value = line.partition("=")
            if key in ("TYPE", "PTTYPE"):
                kind = "partition table" if key == "PTTYPE" else "signature"
                if f"{value} {kind}" not in found:
                    found.append(f"{value} {kind}")
    return found


def check_writable(path: str, *, force: bool, root: Path = Path("/")) -> None:
    """Refuse a device that is in use or that bears something.

    Args:
        force: write although it bears a signature; never although it is in use.
        root: where /proc and /sys lie.

    Raises:
        UnusableInput: with what was found.
    """
    busy = why_busy(
        path,
        mountinfo=root / "proc/self/mountinfo",
        swaps=root / "proc/swaps",
        sys_dev=root / "sys/dev/block",
        sys_block=root / "sys/block",
    )
    if busy is not None:
        raise UnusableInput(f"{path} is in use ({busy}): nothing was written; choose a free device")
    if not force and (found := signatures(path)):
        raise UnusableInput(f"{path} bears a {' and a '.join(found)}: nothing was written; --force overwrites it")
