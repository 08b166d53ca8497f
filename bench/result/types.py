"""The result of a run as one type: what is written, read back, compared and shown.

docs/JSON.md and docs/schema.json are made from these types. A key is added as a field; files of schema version 1 that
lack it are read with its default.
"""

from __future__ import annotations

from typing import Annotated, Generic, Literal, cast

from msgspec import UNSET, Meta
from msgspec.structs import force_setattr

from bench.result.fields import Above0, Amount, ByPhase, Count, FromOne, Later, Mode, Part, T, Texts, says
from bench.result.types_machine import (
    KV,
    Checks,
    Conditions,
    LoadRate,
    LoadSeconds,
    Memory,
    Planned,
    Provenance,
    Residency,
    Weights,
)
from bench.result.types_phases import Ceilings, Parallel, Phase
from bench.result.types_speculation import Speculation

SCHEMA_VERSION: Literal[1] = 1
MOST_TOKENS = 1 << 18
"""That a result keeps one by one; a file of them is some 10 MB."""
PrefillMs = Annotated[T, says("ms from the start to the last logits of the prompts")]
FirstTokenMs = Annotated[T, says("ms for sampling and reading back token 1, whose logits the prefill made")]
TtftMs = Annotated[T, says("ms to the first token: prefill_ms + first_token_decode_ms")]
DecodeMs = Annotated[T, says("ms from the end of the prefill to the last token; includes first_token_decode_ms")]
E2eMs = Annotated[T, says("ms in all: prefill_ms + decode_ms")]
Throughput = Annotated[
    T, says("tokens/s, as the guide has it: decode_tokens_total, token 1 without a pass included, / decode seconds")
]
EndToEnd = Annotated[T, says("tokens/s of the whole: decode_tokens_total / e2e seconds")]
Interval = Annotated[list[Annotated[Amount, says("an end, in the metric's unit")]], Meta(min_length=2, max_length=2)]
Tokens = Annotated[FromOne, says("tokens of a row's prompt")]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Setting = str | int | float | bool | None


class LinkRates(Part, frozen=True, kw_only=True):
    """bytes over the time that the copies were busy, both phases together"""

    weight_h2d_MBps: Annotated[Above0 | None, says("10^6 bytes/s of weights to the GPU; null where none moved")]
    kv_h2d_MBps: Annotated[Above0 | None, says("10^6 bytes/s of KV to the GPU; null where none moved")]
    kv_d2h_MBps: Annotated[Above0 | None, says("10^6 bytes/s of KV from the GPU; null where none moved")]


class GpuPeak(Part, frozen=True, kw_only=True):
    """peak of GPU memory"""

    allocated_GB: Annotated[Amount | None, says("GiB (2^30 bytes), most that torch had allocated; null on the CPU")]
    reserved_GB: Annotated[Amount | None, says("GiB (2^30 bytes), most that torch had reserved; null on the CPU")]


class Manager(Part, frozen=True, kw_only=True):
    """the weight streaming manager"""

    enabled: Annotated[bool, says("whether the weight streaming manager ran (all modes but full)")]
    ssd_enabled: Annotated[bool, says("whether some layers live on the SSD")]
    gpu_max_groups: Annotated[int, Meta(ge=2), says("most groups in the GPU pools, WSM_GPU_MAX_GROUPS")]


class Tpot(Part, frozen=True, kw_only=True):
    """time of a decode pass, from token to token; null without decode passes"""

    mean: Annotated[Amount, says("ms, arithmetic mean")]
    p50: Annotated[Amount, says("ms, half of the passes took no longer")]
    p90: Annotated[Amount, says("ms, nine tenths of the passes took no longer")]
    p99: Later[Annotated[Amount, says("ms, 99 of 100 passes took no longer; below 100 passes the slowest")]] = UNSET
    max: Annotated[Amount, says("ms, the slowest pass")]
    n: Annotated[FromOne, says("passes")]


class Config(Part, frozen=True, kw_only=True):
    """how the run was asked for"""

    argv: Annotated[Texts, says("the command line, an argument each")]
    resolved: Annotated[dict[str, Setting], says("values in force: flags, then variables, after defaults")]
    environment: Annotated[dict[str, str | None], says("the variables in force")]
    environment_set_by_user: Annotated[Texts, says("those that were set before the script started")]

    def __post_init__(self) -> None:
        if not isinstance(self.resolved.get("model"), str):
            raise ValueError("resolved.model is missing")


class SpecialTokens(Part, frozen=True, kw_only=True):
    """what the model's tokenizer puts around each text; nothing for the random ids of --prompt-len and with --chat"""

    before: Annotated[list[Annotated[Count, says("a token id")]], says("ids in front of a text, such as BOS")]
    after: Annotated[list[Annotated[Count, says("a token id")]], says("ids behind it")]


class Output(Part, frozen=True, kw_only=True):
    """what was generated, in the median round"""

    sha256: Annotated[Sha256, says("of all rows' token ids as JSON: equal outputs have equal digests")]
    sampler: Later[
        Annotated[FromOne, says("how tokens are drawn at a temperature above 0: 1 (where it is absent), or 2")]
    ] = UNSET
    texts: Annotated[Texts | None, says("each row's text; null without --print-text")]
    tokens: Later[
        Annotated[
            list[Annotated[list[Annotated[Count, says("a token id")]], says("a row's new tokens")]] | None,
            says("each row's new tokens; null where they are more than 262144 in all"),
        ]
    ] = UNSET
    margins: Later[
        Annotated[
            list[Annotated[list[Annotated[Amount, says("of a new token")]], says("those of a row")]] | None,
            says(
                "how far each new token's logit was above the largest other; null with --verify-rows 1, at a "
                "temperature above 0, and without tokens"
            ),
        ]
    ] = UNSET

    def __post_init__(self) -> None:
        lengths = list(map(len, self.tokens or ()))
        if self.margins and list(map(len, self.margins)) != lengths:
            raise ValueError("margins and tokens are not as many")


class PerMetric(Part, Generic[T], frozen=True, kw_only=True):
    prefill_ms: PrefillMs[T]
    first_token_decode_ms: FirstTokenMs[T]
    ttft_ms: TtftMs[T]
    decode_ms: DecodeMs[T]
    e2e_ms: E2eMs[T]
    throughput_tok_s: Throughput[T]
    end_to_end_tok_s: EndToEnd[T]


class Statistic(Part, frozen=True, kw_only=True):
    n: Annotated[FromOne, says("rounds")]
    median: Annotated[Amount, says("middle value, in the metric's unit")]
    median_ci95: Annotated[
        Interval | None,
        says("95 % bootstrap interval of the median (of 2000 seeded resamples), its ends; null below three rounds"),
    ] = None
    mean: Annotated[Amount, says("arithmetic mean, in the metric's unit")]
    stdev: Annotated[Amount | None, says("sample standard deviation, in the metric's unit; null for one round")]
    min: Annotated[Amount, says("least, in the metric's unit")]
    max: Annotated[Amount, says("most, in the metric's unit")]


Metrics = PerMetric[Above0]
Statistics = PerMetric[Statistic]


class Repeats(Part, frozen=True, kw_only=True):
    """every timed round; the figures at the top level come whole from the round of median e2e_ms (of an even number,
    the faster of the middle two)
    """

    n: Annotated[FromOne, says("timed rounds finished")]
    raw: Annotated[
        list[Annotated[Metrics, says("a round's figures")]], Meta(min_length=1), says("each round, in order")
    ]
    statistics: Annotated[Statistics, says("spread of each figure over the rounds")]


class Result(Part, frozen=True, kw_only=True):
    """One run of bench_infer.py.

    Numbers keep six significant digits. A figure that was not measured is null, never 0.
    """

    batch_size: Annotated[FromOne, says("rows")]
    max_new_tokens: Annotated[FromOne, says("most new tokens per row")]
    prompt_lens: Annotated[list[Tokens], Meta(min_length=1), says("tokens of each row's prompt, special ones included")]
    prefill_tokens_total: Annotated[FromOne, says("prompt tokens of all rows")]
    decode_tokens_total: Annotated[
        FromOne, says("new tokens of all rows, token 1 and stop tokens included, none after those")
    ]
    prefill_ms: PrefillMs[Above0]
    first_token_decode_ms: FirstTokenMs[Above0]
    ttft_ms: TtftMs[Above0]
    decode_ms: DecodeMs[Above0]
    e2e_ms: E2eMs[Above0]
    throughput_tok_s: Throughput[Above0]
    end_to_end_tok_s: EndToEnd[Above0]
    io_bw_MBps: LinkRates
    gpu_mem_GB: GpuPeak
    mode: Annotated[Mode, says("where the weights live, see the README")]
    device: Annotated[str, says("the compute device, such as cuda:0")]
    wsm: Manager
    total_tok_s: Annotated[Above0, says("tokens/s, prompt and new ones: both totals / e2e seconds")]
    schema_version: Annotated[Literal[1], says("version of this description")]
    interrupted: Annotated[bool, says("whether the run was broken off, and only the rounds finished by then are here")]
    decode_forward_passes: Annotated[Count, says("passes of the decode; token 1 takes none")]
    special_tokens: Later[SpecialTokens] = UNSET
    tpot_ms: Tpot | None
    decode_tok_s: Annotated[
        Above0 | None,
        says("tokens/s of the decode: tokens after each row's first / seconds of its passes; null without"),
    ] = None
    phases: Annotated[
        ByPhase[Phase], says("what moved, how long each tier worked and waited, how far that is from the floor")
    ]
    ceilings: Ceilings
    weights: Later[Weights] = UNSET
    residency: Residency
    plan: Planned
    memory: Memory
    load_s: LoadSeconds
    load: Later[LoadRate] = UNSET
    checks: Later[Checks | None] = UNSET
    kv: Later[KV] = UNSET
    speculation: Later[Speculation | None] = UNSET
    config: Config
    provenance: Provenance
    conditions: Later[Conditions] = UNSET
    output: Output
    repeats: Repeats
    parallel: Parallel | None = None
    warnings: Annotated[Texts, says("what could not be had, and what makes figures doubtful")]

    def __post_init__(self) -> None:
        """``decode_tok_s`` follows from the rest, so files of before it was written have it too."""
        if self.decode_tok_s is None and self.tpot_ms is not None:
            force_setattr(self, "decode_tok_s", self._decode_tok_s(self.tpot_ms.mean * self.tpot_ms.n))

    def _decode_tok_s(self, passes_ms: float) -> float | None:
        tokens = self.decode_tokens_total - self.batch_size
        return tokens / passes_ms * 1e3 if tokens > 0 and passes_ms > _NO_TIME_MS else None

    @property
    def sampler(self) -> int | None:
        """Version of the draw; None at temperature 0, where nothing is drawn."""
        drawn = self.config.resolved.get("temperature") != 0
        return (1 if self.output.sampler is UNSET else self.output.sampler) if drawn else None

    def rounds(self, figure: str) -> list[float]:
        """One of :data:`PASS_FIGURES` or :data:`METRICS` of every round; of rounds without passes, no pass's."""
        if figure not in PASS_FIGURES:
            return [getattr(timed, figure) for timed in self.repeats.raw]
        passes_ms = [timed.decode_ms - timed.first_token_decode_ms for timed in self.repeats.raw]
        if figure == "tpot_ms":
            return [ms / self.decode_forward_passes for ms in passes_ms if self.decode_forward_passes and ms > 0]
        return [rate for rate in map(self._decode_tok_s, passes_ms) if rate is not None]

    def whole(self, figure: str) -> float | None:
        """One of the same figures as it is at the top level."""
        if figure == "tpot_ms":
            return None if self.tpot_ms is None else self.tpot_ms.mean
        return cast("float | None", getattr(self, figure))


_NO_TIME_MS = 1e-6
METRICS = PerMetric.__struct_fields__
PASS_FIGURES = ("tpot_ms", "decode_tok_s")
"""Of decode passes alone, and shown first: the guide's throughput also counts token 1, which takes no pass."""
FIXED_KEYS = Result.__struct_fields__[: Result.__struct_fields__.index("wsm") + 1]
"""The quick-start guide's keys, which stay as they are."""
