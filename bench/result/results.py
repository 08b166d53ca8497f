"""The result's file: one JSON, described by schema.json, read back for tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsm.errors import UnusableInput

SCHEMA_VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("schema.json")
METRICS = (
    "prefill_ms",
    "first_token_decode_ms",
    "ttft_ms",
    "decode_ms",
    "e2e_ms",
    "throughput_tok_s",
    "end_to_end_tok_s",
)
FIXED_KEYS = (
    "batch_size",
    "max_new_tokens",
    "prompt_lens",
    "prefill_tokens_total",
    "decode_tokens_total",
    *METRICS,
    "io_bw_MBps",
    "gpu_mem_GB",
    "mode",
    "device",
    "wsm",
)
SIGNIFICANT_DIGITS = 6


def significant(value: Any) -> Any:
    """Floats anywhere in ``value`` rounded to six significant digits; what is not finite becomes None."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): significant(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [significant(item) for item in value]
    return value


def read_result(path: Path) -> dict[str, Any]:
    """A result from its file.

    Raises:
        UnusableInput: if it is missing, damaged, no result, or of another schema.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnusableInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnusableInput(f"{path} is no JSON ({error}): was the run broken off?") from error
    return checked(result, str(path))


def checked(result: Any, where: str) -> dict[str, Any]:
    """``result``, read from ``where``, if this program wrote it.

    Raises:
        UnusableInput: if it is no result, or one of another schema.
    """
    version = result.get("schema_version") if isinstance(result, dict) else None
    if type(version) is not int:
        raise UnusableInput(f"{where} is no result of bench_infer.py")
    if version != SCHEMA_VERSION:
        age = "a newer" if version > SCHEMA_VERSION else "an older"
        raise UnusableInput(
            f"{where} is of schema {version}, from {age} bench_infer.py; this one reads {SCHEMA_VERSION}"
        )
    if missing := [key for key in FIXED_KEYS if key not in result]:
        raise UnusableInput(f"{where} is no result of bench_infer.py: {missing[0]} is missing")
    return dict(result)


def dump(result: Mapping[str, Any]) -> str:
    """The JSON text of a result: fixed keys first, six significant digits."""
    ordered = {key: result[key] for key in (*FIXED_KEYS, *[key for key in result if key not in FIXED_KEYS])}
    text = json.dumps(significant(ordered), indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")  # arguments may hold bytes of no text
