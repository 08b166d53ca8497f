"""Whether two results are of the same work: what forbids comparing, and why tokens differ, in a user's words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from msgspec import UNSET

from bench.compare.sides import Side, device_of
from bench.options.run_flags import RunOptions
from bench.result.types import Result
from bench.result.types_machine import KV, Weights
from bench.result.types_speculation import Speculation
from wsm.option import options_of
from wsm.words import counted

_FLAGS = options_of(RunOptions)
_QUALITY = "`bench_infer.py quality` says how much"


class _Fact(NamedTuple):
    """What has to be equal, the settings that it follows from, and the mend where none of those differs."""

    name: str
    of: Callable[[Result], object]
    settings: tuple[str, ...]
    mend: str


_FACTS = (
    _Fact("model", lambda r: r.config.resolved["model"], ("checkpoints", "synthetic"), "run the same model"),
    _Fact(
        "model digest",
        lambda r: r.provenance.model_digest,
        ("checkpoints", "synthetic", "manifest"),
        "the checkpoint's files are not the same: run both from the same ones",
    ),
    _Fact("batch_size", lambda r: r.batch_size, ("batch_size",), "run as many rows"),
    _Fact(
        "prompt tokens",
        lambda r: r.prompt_lens,
        ("prompts", "prompt", "prompt_len", "chat", "max_seq_len"),
        "the prompts are not the same: run both with the same ones",
    ),
    _Fact(
        "new tokens",
        lambda r: r.decode_tokens_total,
        ("max_new_tokens", "ignore_eos"),
        "rows ended at a stop token: run both with --ignore-eos",
    ),
)


def obstacles(base: Side, side: Side) -> Iterator[str]:
    """What forbids comparing two sides, a sentence each."""
    for one in (base, side):
        if one.typical is None:
            yield f"{one.name} gave no result ({'; '.join(map(str, one.failures))})"
            continue
        if len(devices := dict.fromkeys(device_of(result) for result in one.results)) > 1:
            yield f"{one.name} mixes compute devices: {', '.join(map(short, devices))}"
        if len(hashes := {result.output.sha256 for result in one.results}) > 1:
            yield f"{one.name} gave {len(hashes)} different outputs from the same settings"
    if base.typical is not None and side.typical is not None:
        yield from _unlike(base.typical, side.typical)


def _unlike(base: Result, side: Result) -> Iterator[str]:
    """What has to be equal for a time to mean the same; what follows from one that is told is not told as well."""
    both, told, named = (base, side), 0, set[str]()
    for fact in _FACTS:
        before, now = map(fact.of, both)
        flags = differing_flags(both, fact.settings)
        if before != now and (not told or not named.issuperset(flags)):
            told += 1
            named.update(flags)
            yield f"{fact.name}: {short(before)} against {short(now)}: {_give(flags) or fact.mend}"
    before, now = map(device_of, both)
    if before != now:
        flags = differing_flags(both, ("device",))
        yield f"compute device: {short(before)} against {short(now)}: {_give(flags) or 'run both on the same one'}"
    if not told:
        yield from _unlike_draws(base, side, same_device=before == now)


def _unlike_draws(base: Result, side: Result, *, same_device: bool) -> Iterator[str]:
    """How tokens were drawn, which is work too; and, where nothing else explains them, unequal outputs."""
    if base.sampler != side.sampler and None not in (base.sampler, side.sampler):
        yield (
            f"sampler: {base.sampler} against {side.sampler}: an older version drew other tokens at a temperature "
            "above 0; run both with one version, or with --temperature 0"
        )
    elif asked := _asked_otherwise(base, side):
        if base.sampler != side.sampler or base.output.sha256 != side.output.sha256:
            values = ", ".join(_against(name, base, side) for name in asked)
            yield f"{values}: {_give([spelled(name) for name in asked])}"
    elif same_device and base.output.sha256 != side.output.sha256 and not any(_rounded(base, side)):
        yield f"unequal outputs: {base.output.sha256[:12]} against {side.output.sha256[:12]}: {_fault(base, side)}"


def _fault(base: Result, side: Result) -> str:
    """What to do about outputs that should have been equal."""
    rows = nodes_of(base), nodes_of(side)
    if rows[0] != rows[1]:
        return f"passes of {rows[0]} and of {rows[1]} rows may round otherwise; give both --verify-rows {max(rows)}"
    prefills = [_prefill_of(result) for result in (base, side)]
    if prefills[0] != prefills[1]:
        shapes = " and of ".join(f"{counted(tokens, 'token')} of {counted(rows, 'row')}" for tokens, rows in prefills)
        chunk = min(tokens for tokens, _ in prefills)
        mend = f"--prefill-chunk-tokens {chunk}" if prefills[0][0] != prefills[1][0] else "the same memory"
        return f"prefills of {shapes} at a time may round otherwise; give both {mend}"
    if flags := differing_flags((base, side), ("tp",)):
        return f"sums over more ranks may round otherwise; {_give(flags)}"
    if not _format(base)[1] and (flags := differing_flags((base, side), ("manifest",))):
        return f"the packed stores may have been calibrated otherwise; {_give(flags)}"
    versions = [(r.provenance.git_commit, r.provenance.torch, r.provenance.cuda) for r in (base, side)]
    if versions[0] != versions[1]:
        return "the program or torch is another version; run both with the same"
    return "no setting that differs may change tokens, so it is an error of the program or the machine"


def _prefill_of(result: Result) -> tuple[int, int]:
    """The most prompt tokens, and the most rows, computed at a time; memory decides them where no flag does."""
    rows = min(result.plan.wave_rows, result.batch_size)
    return min(result.plan.chunk_tokens, rows * max(result.prompt_lens)), rows


def expected(base: Result | None, side: Result | None) -> str:
    """Why two outputs differ as they may; empty where they are equal, and where nothing in the settings says so."""
    if base is None or side is None or base.output.sha256 == side.output.sha256:
        return ""
    asked = [_against(name, base, side) for name in _asked_otherwise(base, side)]
    return "; ".join([*asked, *_rounded(base, side)])


def _asked_otherwise(base: Result, side: Result) -> list[str]:
    """The settings that choose the tokens and differ; what sampling alone reads counts where both sample."""
    both = [result.config.resolved for result in (base, side)]
    sampling = all(resolved.get("temperature") != 0 for resolved in both)
    names = ["prompts", "prompt", "prompt_len", "chat", "temperature", *(["top_p"] if sampling else [])]
    if sampling or any(resolved.get("prompt_len") is not None for resolved in both):
        names.append("seed")
    return [name for name in names if both[0].get(name) != both[1].get(name)]


def _rounded(base: Result, side: Result) -> Iterator[str]:
    """What of formats and KV makes other tokens of the same work: one of the two lossy, or of another dtype."""
    both = (base, side)
    formats = [_format(result) for result in both]
    if formats[0] != formats[1] and (lossy := {name: None for name, exact in formats if not exact}):
        yield f"{' and '.join(lossy)} round{'s' * (len(lossy) == 1)} the weights ({_QUALITY})"
    dtypes = [str(result.config.resolved.get("dtype")) for result in both]
    if dtypes[0] != dtypes[1]:
        yield f"{dtypes[0]} and {dtypes[1]} round otherwise"
    kept = [result.config.resolved.get("kv_dtype", "auto") for result in both]
    if kept[0] != kept[1] and "int8" in kept:
        yield "--kv-dtype int8 rounds the KV (docs/KV.md says how much)"
    left_out = [_blocks_left_out(result) for result in both]
    if left_out[0] != left_out[1]:
        blocks = sorted({found[0] for found in left_out if found})
        yield f"--topk-blk {' and '.join(map(str, blocks))} left KV blocks out (0 takes all)"


def _format(result: Result) -> tuple[str, bool]:
    """The weight format, and whether it is exact."""
    held = result.weights
    if not isinstance(held, Weights):
        return str(result.config.resolved.get("dtype")), True
    return held.weight_format, held.exact


def _blocks_left_out(result: Result) -> tuple[int, object] | None:
    """How many KV blocks a step takes, and of which KV: where it lies. None where every step saw the whole context.

    How much was fetched is no part of it: that is what a run did, and has to be the same where these are.
    """
    kv = _kv(result)
    return None if kv is None or kv.exact else (kv.topk_blk, (kv.stretch_rows, kv.gpu, kv.cpu, kv.disk))


def _kv(result: Result) -> KV | None:
    return None if result.kv is UNSET else result.kv


def nodes_of(result: Result) -> int:
    """Rows of a pass for each row of the batch."""
    if isinstance(result.speculation, Speculation):
        return result.speculation.nodes
    return int(result.config.resolved.get("verify_rows") or 1)


# -- words


def differing_flags(results: Iterable[Result], names: Iterable[str]) -> list[str]:
    """Those settings whose values are not all the same, as flags."""
    asked = [result.config.resolved for result in results]
    return [spelled(name) for name in names if any(one.get(name) != asked[0].get(name) for one in asked)]


def spelled(name: str) -> str:
    """A setting as people type it: ``-b``, ``--temperature``; of what no flag gives, a variable say, its name."""
    if name not in _FLAGS:
        return name
    return min([_FLAGS[name].spelled, *_FLAGS[name].flags], key=len)


def _give(flags: Iterable[str]) -> str:
    named = " and ".join(flags)
    return named and f"give both the same {named}"


def _against(name: str, base: Result, side: Result) -> str:
    values = [result.config.resolved.get(name) for result in (base, side)]
    before, now = ("none" if value is None else short(shown_setting(value)) for value in values)
    return f"{name} {before} against {now}"


def shown_setting(value: Any) -> str:
    """A flag's value as it is given, or on and off; two that differ look different."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return "-" if value is None else str(value)


def short(value: Any) -> str:
    """What a sentence has room for."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
