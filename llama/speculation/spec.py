"""What ``--draft`` says. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wsm.errors import UnusableInput

_FORMS = "ngram, a checkpoint, a packed store's manifest, or synthetic:NAME[:layers=N][:agree=P,second=Q]"


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """Where a draft comes from: one of ``checkpoints``, ``manifest`` and ``synthetic``; from nowhere: ``ngram``.

    ``synthetic`` is as ``--synthetic`` has it. With ``agree`` it is one of a pair of known agreement: its first choice
    is the target's with that probability, and its second, where the first is not, with probability ``second`` of all.
    """

    text: str
    checkpoints: Path | None = None
    manifest: Path | None = None
    synthetic: str | None = None
    agree: float | None = None
    second: float = 0.0

    @property
    def is_model(self) -> bool:
        return self.text != "ngram"


def parse_draft(text: str) -> DraftSpec:
    """The draft that ``--draft`` names; UnusableInput for what is none."""
    if text == "ngram":
        return DraftSpec(text)
    if text.startswith("synthetic:"):
        return _synthetic(text)
    path = Path(text).expanduser()
    if not path.exists():
        raise UnusableInput(f"--draft {text}: there is no such file or directory; a draft is {_FORMS}")
    if path.is_file() and path.suffix == ".json":
        return DraftSpec(text, manifest=path)
    return DraftSpec(text, checkpoints=path)


def _synthetic(text: str) -> DraftSpec:
    name, *options = text.removeprefix("synthetic:").split(":")
    pair: dict[str, float] = {}
    if options and not options[-1].startswith("layers="):
        for part in options.pop().split(","):
            key, _, value = part.partition("=")
            if key not in ("agree", "second") or key in pair:
                raise UnusableInput(f"--draft {text}: {part!r} is not understood; a draft is {_FORMS}")
            pair[key] = _probability(text, key, value)
    if pair and "agree" not in pair:
        raise UnusableInput(f"--draft {text}: second needs agree=P before it")
    if sum(pair.values()) > 1:
        raise UnusableInput(f"--draft {text}: agree and second are shares of all tokens, together at most 1")
    return DraftSpec(text, synthetic=":".join([name, *options]), **pair)


def _probability(text: str, key: str, value: str) -> float:
    try:
        probability = float(value)
    except ValueError:
        probability = -1.0
    if not 0 <= probability <= 1:
        raise UnusableInput(f"--draft {text}: {key} must be a number from 0 to 1, not {value!r}")
    return probability
