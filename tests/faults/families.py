"""The families of faults, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.faults.checkpoints import Checkpoints
from tests.faults.prompts import Prompts
from tests.faults.quantised import Quantised
from tests.faults.results import Results
from tests.faults.runner import Family
from tests.faults.stores import Stores
from tests.faults.streams import Streams

FAMILIES: Mapping[str, Callable[[Path], Family]] = {
    "stores": Stores,
    "checkpoints": Checkpoints,
    "quantised": Quantised,
    "results": Results,
    "prompts": Prompts,
    "streams": Streams,
}
