"""Ceilings from run to run: one file a machine in the cache directory, which machines may share."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from wsm.disk.atomic import locked, write_atomically
from wsm.disk.files import read_json
from wsm.errors import UnusableInput
from wsm.plan.time import Ceiling

MOST_PROBES = 200
"""The ones probed longest ago go beyond that."""


class Probe(msgspec.Struct):
    """What was found at the last probe of a kind: ``of`` says in words of what, ``at`` when (ISO 8601)."""

    of: str
    at: str
    ceilings: dict[str, Ceiling]


class _File(msgspec.Struct, tag_field="format", tag="wsm-bench ceilings 4"):
    """Of version 1, ``matmul`` was what a card does from rest, which is ``matmul_burst`` now; of version 2, drives were
    read by more threads, which left the link less beside them; of version 3, small groups of one kind alone were read.
    All is measured anew."""

    machine: str
    probes: dict[str, Probe]


def recall(file: Path) -> dict[str, Probe]:
    """Each probe by its key; none where the file is missing or damaged: it is a cache."""
    try:
        return msgspec.convert(read_json(file, str(file), ""), _File).probes
    except (UnusableInput, msgspec.ValidationError):
        return {}


def remember(file: Path, machine: str, of: str, found: Mapping[str, Mapping[str, Ceiling]]) -> None:
    """Keep what was ``found`` under each key, over what was known of it; raises UnusableInput or OSError."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with locked(file.with_suffix(".lock"), str(file)):
        probes = recall(file)
        for key, ceilings in found.items():
            known = probes.pop(key).ceilings if key in probes else {}
            probes[key] = Probe(of, now, {**known, **ceilings})
        kept = dict(list(probes.items())[-MOST_PROBES:])
        write_atomically(file, msgspec.json.format(msgspec.json.encode(_File(machine, kept)), indent=1).decode() + "\n")
