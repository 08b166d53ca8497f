"""What must not be written: a device or file that is in use, or that bears something."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from wsm.disk.blockdev import device_number, is_block_device, signatures
from wsm.errors import UnusableInput


def related_devices(path: str, sys_dev: Path = Path("/sys/dev/block")) -> dict[str, str]:
    """major:minor -> name of what writing to a device would hurt: itself, its partitions, the disk that it is part of.

    The other partitions of that disk are not among them.
    """
    return _relatives(device_number(path), sys_dev)


def _relatives(number: str, sys_dev: Path) -> dict[str, str]:
    node = (sys_dev / number).resolve()
    relatives = {number: node.name}
    for partition in sorted(node.glob("*/partition")):
        relatives[(partition.parent / "dev").read_text().strip()] = partition.parent.name
    if (node / "partition").exists():
        relatives[(node.parent / "dev").read_text().strip()] = node.parent.name
    return relatives


def why_busy(path: str, *, root: Path = Path("/")) -> str | None:
    """Why a device is in use: itself, a partition of it, its disk, or what lies above or beneath; None if it is not.

    ``root`` has /proc and /sys.
    """
    return _why_busy(device_number(path), root)


def _why_busy(number: str, root: Path, apart_from: str = "", *, held: bool = False) -> str | None:
    """``apart_from`` is the loop device over it from which one comes; ``held``: by the volume from which one comes."""
    sys_dev = root / "sys/dev/block"
    relatives = _relatives(number, sys_dev)
    if used := _used(relatives, root):
        return used
    for number, name in relatives.items():
        holders = sys_dev / number / "holders"
        if not held and holders.is_dir() and (holding := sorted(os.listdir(holders))):
            return f"{name} is held by {', '.join(holding)} (LVM, RAID or encryption)"
        # A loop device is no holder, and takes nothing for itself alone.
        for loop, backing in _loop_devices(root):
            if loop == name and (used := why_file_busy(backing, root=root, apart_from=loop)):
                return f"{name} is over {backing}, and {used}"
            if loop != apart_from and is_block_device(backing) and device_number(backing) == number:
                return f"{loop} is a loop device over {name}"
        for slave in sorted((sys_dev / number / "slaves").glob("*")):
            if used := _why_busy((slave / "dev").read_text().strip(), root, held=True):
                return f"{name} lies on {slave.name}, and {used}"
    return None


def why_file_busy(path: str, *, root: Path = Path("/"), apart_from: str = "") -> str | None:
    """Why the contents of a file are in use, as :func:`why_busy` tells it of a device, which ``path`` may name too.

    ``apart_from`` is the loop device from which one comes.
    """
    if is_block_device(path):
        return _why_busy(device_number(path), root, apart_from)
    for loop, backing in _loop_devices(root):
        if loop != apart_from and _same_file(path, backing):
            too = " too" if apart_from else ""
            return f"it is the contents of {loop}{too}; `losetup -d /dev/{loop}` detaches that"
    return next((f"{used} is in use as swap" for used in _swaps(root) if _same_file(path, used)), None)


def _used(numbers: dict[str, str], root: Path) -> str | None:
    """Which of the devices (names by number) is mounted or in use as swap, and where."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        number, where = fields.split()[2], _unescaped(fields.split()[4])
        # btrfs mounts under a number of its own, and only the source tells which device is behind it.
        source = _unescaped(rest.split()[1]) if len(rest.split()) > 1 else ""
        for mounted in (number, device_number(source) if is_block_device(source) else ""):
            if mounted in numbers:
                return f"{numbers[mounted]} is mounted on {where}"
    swaps = (used for used in _swaps(root) if is_block_device(used) and device_number(used) in numbers)
    return next((f"{used} is in use as swap" for used in swaps), None)


def _swaps(root: Path) -> Iterator[str]:
    if not (root / "proc/swaps").exists():  # a kernel without swap
        return
    for line in (root / "proc/swaps").read_text().splitlines()[1:]:
        yield _unescaped(line.split()[0])


def _loop_devices(root: Path) -> Iterator[tuple[str, str]]:
    """Each attached loop device, and the path of what it is over, ``(deleted)`` behind it where that is so."""
    for backing in sorted(root.glob("sys/block/loop*/loop/backing_file")):
        try:
            yield backing.parent.parent.name, backing.read_text().strip("\n")
        except OSError:  # detached just now
            continue


def _same_file(path: str, other: str) -> bool:
    """Whether two paths name one file, by device and inode; a deleted one by its text."""
    try:
        return path == other or os.path.samefile(path, other)
    except OSError:
        return False


def _unescaped(text: str) -> str:
    r"""The kernel writes a space in a path as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def check_writable(
    path: str,
    *,
    force: bool = False,
    label: str = "",
    instead: str = "give --force",
    mend: str = "--force overwrites it",
    root: Path = Path("/"),
) -> list[str]:
    """Raises UnusableInput for what is in use or, without ``force``, holds something; returns what it holds.

    It is a device, or a file that is there. The sentence names it by ``label``, its path where that is empty.
    ``instead`` and ``mend`` say what the user may do where blkid cannot tell, and where there is a signature. ``root``
    has /proc and /sys.
    """
    label = label or path
    if busy := why_file_busy(path, root=root):
        raise UnusableInput(f"{label} is in use ({busy}): nothing was written; name a free device or another file")
    try:
        found = signatures(path, mend=instead)
    except UnusableInput:
        if not force:
            raise
        return []
    if found and not force:
        raise UnusableInput(f"{label} bears {' and '.join(found)}: nothing was written; {mend}")
    return found


def refuse_in_dev(path: str | Path, label: str) -> None:
    """Refuse (UnusableInput) a file or directory among the device nodes, where a mistyped name would fill memory.

    /dev/shm and the like pass: they are filesystems of their own.
    """
    whole, nodes = Path(os.path.realpath(path)), Path("/dev")
    there = next(parent for parent in (whole, *whole.parents) if parent.exists())
    if there.is_relative_to(nodes) and there.stat().st_dev == nodes.stat().st_dev:
        raise UnusableInput(
            f"{label} is no block device, and a file in {nodes} would lie in memory: name one of those that `lsblk` "
            "lists, or a place elsewhere"
        )
