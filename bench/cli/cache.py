"""The verb ``cache``: what lies in the cache directory, and clearing it. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bench.cli.confirm import confirmed
from bench.options.verb_flags import CacheOptions
from wsm.disk.atomic import locked
from wsm.disk.direct import lock as lock_target
from wsm.disk.files import read_json
from wsm.disk.targets import free_bytes
from wsm.errors import UnusableInput
from wsm.option import is_default

_PARTS = re.compile(r"(.+-[0-9a-f]{16}|ceilings\.[0-9a-f]{16})\.(?:json|wsm|lock)")
"""A packed store's files, and a machine's ceilings; those of older programs too."""
_BUILTIN = re.compile(r"builtin-v\d+")
_WHOLE = re.compile(rf"{_BUILTIN.pattern}|\..+\.[0-9a-f]{{32}}\.tmp|\.{_BUILTIN.pattern}-.+")
"""The built-in model, and what a killed process left half-written. What is of no such name is not this program's."""
_BEING_WRITTEN_S, _DAY_S = 600.0, 86400.0


@dataclass(frozen=True, slots=True)
class Entry:
    """What is listed and cleared as one; its lock, if it has one, is the last of ``paths``."""

    name: str
    paths: tuple[Path, ...]

    @property
    def made(self) -> float:
        """Unix time."""
        return self.paths[0].lstat().st_mtime

    @property
    def used(self) -> float:
        """Unix time of the last use: who takes a lock sets its time."""
        return max(path.lstat().st_mtime for path in self.paths)

    @property
    def nbytes(self) -> int:
        """What it takes on the drive."""
        inside = [path for top in self.paths for path in (top, *top.rglob("*"))]
        return sum(path.lstat().st_blocks * 512 for path in inside)

    @property
    def in_use(self) -> bool:
        """Whether a process reads or writes it now."""
        try:
            with self.taken():
                return False
        except UnusableInput:
            return True

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Hold it alone; UnusableInput where a process has it: a run its packed file, who packs the lock too."""
        busy = f"{self.name} is in use"
        with contextlib.ExitStack() as stack:
            if self.name.startswith(".") and time.time() - self.used < _BEING_WRITTEN_S:
                raise UnusableInput(busy)
            lock = self.paths[-1]
            if lock.suffix == ".lock":
                before = lock.stat()
                stack.enter_context(locked(lock, str(lock), busy=busy))
                os.utime(lock, ns=(before.st_atime_ns, before.st_mtime_ns))  # to look is no use
            for path in self.paths:
                if path.suffix == ".wsm":
                    lock_target(stack.enter_context(path.open("rb")).fileno(), fcntl.LOCK_EX, busy)
            yield

    def what(self) -> str:
        """In words, from the manifest where there is one."""
        kinds = {path.suffix: path for path in self.paths}
        if self.name.startswith("ceilings."):
            return "ceilings of a machine"
        if _BUILTIN.fullmatch(self.name):
            return "built-in model"
        if ".wsm" in kinds and ".json" in kinds:
            with contextlib.suppress(UnusableInput, KeyError, TypeError):
                manifest = read_json(kinds[".json"], self.name, "")
                ranks = f" for {manifest['tp']} ranks" if "tp" in manifest else ""
                return f"packed {manifest['model']['name']} in {manifest['dtype']}{ranks}"
        return "left over"

    def remove(self) -> None:
        """Raises UnusableInput where it is in use or cannot be removed."""
        try:
            with self.taken():
                for path in self.paths:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
        except OSError as error:
            raise UnusableInput(f"{self.name} cannot be removed: {error.strerror}") from error


def entries_of(folder: Path) -> list[Entry]:
    """What this program has put into a cache directory, the one used last first; other files are not told of."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise UnusableInput(f"--cache-dir {folder} cannot be read: {error.strerror}") from error
    grouped: dict[str, list[Path]] = {}
    for path in found:
        named = _PARTS.fullmatch(path.name)
        if named is not None and path.is_file():
            grouped.setdefault(named[1], []).append(path)
        elif _WHOLE.fullmatch(path.name):
            grouped[path.name] = [path]
    entries = [Entry(name, tuple(sorted(paths, key=lambda p: p.suffix == ".lock"))) for name, paths in grouped.items()]
    return sorted(entries, key=lambda entry: -entry.used)


def run_cache(options: CacheOptions) -> int:
    """List, or clear after a question; what runs use stays."""
    folder, names = options.cache_dir.expanduser(), options.words[1:]
    if not folder.exists():
        if not is_default(options, "cache_dir"):
            raise UnusableInput(f"--cache-dir {folder} does not exist: name the one that runs were given")
        print(f"[INFO] {folder} does not exist: no run has kept anything there yet")
        return 0
    entries = entries_of(folder)
    for name in names:
        if not any(fnmatchcase(entry.name, name) for entry in entries):
            raise UnusableInput(
                f"nothing in {folder} is called {name}: `bench_infer.py cache list` names what there is"
            )
    before = time.time() - (options.older_than or 0) * _DAY_S
    chosen = [
        entry
        for entry in entries
        if (not names or any(fnmatchcase(entry.name, name) for name in names)) and entry.used <= before
    ]
    if options.words[0] == "list":
        print(_table(folder, chosen))
        return 0
    in_use = [entry for entry in chosen if entry.in_use]
    for entry in in_use:
        print(f"[INFO] {entry.name} is in use and stays")
    chosen = [entry for entry in chosen if entry not in in_use]
    if not chosen:
        print(f"[INFO] nothing to clear in {folder}")
        return 0
    size = sum(entry.nbytes for entry in chosen)
    said = ", ".join(entry.name for entry in chosen)
    if not confirmed(f"This removes {size / 1e9:.2f} GB from {folder}: {said}. Go on?", options.yes):
        raise UnusableInput("not confirmed: nothing was removed; --yes confirms")
    for entry in chosen:
        entry.remove()
    print(f"[INFO] {len(chosen)} removed, {size / 1e9:.2f} GB")
    return 0


def _table(folder: Path, entries: Sequence[Entry]) -> str:
    rows = [("name", "what", "GB", "made", "last use", "")]
    for entry in entries:
        size, state = f"{entry.nbytes / 1e9:.2f}", "in use" if entry.in_use else ""
        rows.append((entry.name, entry.what(), size, _ago(entry.made), _ago(entry.used), state))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(entry.nbytes for entry in entries) / 1e9
    free = f", {free_bytes(folder) / 1e9:.2f} GB free" if folder.is_dir() else ""
    return "\n".join([*(lines if entries else []), f"{len(entries)} in {folder}: {total:.2f} GB{free}"])


def _ago(moment: float) -> str:
    """How long ago, in the largest unit of which there is one."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", _DAY_S), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
