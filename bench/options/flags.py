"""The command line: verbs and flags, parsed once into frozen options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bench.options.sweep_flags import SweepOptions, add_sweep, sweep_options
from bench.options.types import boolean, names, number, path, topk, whole
from bench.options.verb_flags import CompareOptions, ReportOptions, add_compare, add_report
from llama.kv import KV_DTYPES
from llama.loading import DEFAULT_CACHE
from wsm.errors import UnusableInput

VERBS = ("run", "pack", "verify", "plan", "prompts", "sweep", "compare", "report")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Everything that ``run`` and ``plan`` take. ``engine`` holds the flags that are fields of ``Settings``."""

    checkpoints: Path | None
    synthetic: str | None
    raw_device: str | None
    manifest: Path | None
    prompts: Path | None
    prompt: str | None
    prompt_len: int | None
    batch_size: int
    max_new_tokens: int
    max_seq_len: int
    temperature: float
    top_p: float
    seed: int
    warmup_rounds: int
    repeats: int
    topk_blk: int
    kv_dtype: str
    kv_device: str | None
    prefill_chunk_tokens: int | None
    micro_batch: int | None
    device: str | None
    dtype: str | None
    tp: int | None
    load_model: bool | None
    no_probe: bool
    auto: bool
    trace: Path | None
    cache_dir: Path
    out_json: Path
    output: str | None
    print_text: bool
    ignore_eos: bool
    verbose: bool
    engine: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PackOptions:
    checkpoints: Path | None
    synthetic: str | None
    to: tuple[str, ...]
    manifest: Path
    dtype: str | None
    tp: int | None
    force: bool
    yes: bool
    cache_dir: Path
    verbose: bool


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    manifest: Path
    raw_device: str | None
    checkpoints: Path | None
    staging_mb: int
    verbose: bool


@dataclass(frozen=True, slots=True)
class PromptsOptions:
    out: Path
    count: int
    tokens: int
    checkpoints: Path | None
    seed: int
    cache_dir: Path
    verbose: bool


class _Parser(argparse.ArgumentParser):
    """Hands its complaints on as one sentence instead of printing usage and exiting; guesses no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UnusableInput(f"{message} (see {self.prog} --help)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoints", type=path, metavar="DIR", help="Meta or Hugging Face directory (built-in model)"
    )
    group.add_argument("--synthetic", metavar="NAME[:layers=N]", help="random weights in a real model's shape")
    group.add_argument("--dtype", metavar="TYPE", help="bfloat16, float16 or float32 (as stored)")
    group.add_argument("--tp", type=whole(1), metavar="N", help="ranks that share the model (a run: torchrun's)")
    group.add_argument(
        "--cache-dir",
        type=path,
        default=DEFAULT_CACHE,
        metavar="DIR",
        help=f"packed files and the built-in model ({DEFAULT_CACHE})",
    )
    parser.add_argument("--verbose", action="store_true", help="tell more, and give tracebacks")


def _add_paging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("paging")
    group.add_argument("--mode", choices=("mixed", "stream", "preload", "full"), default="mixed", help="(mixed)")
    group.add_argument("--raw-device", metavar="DEV[,DEV]", help="overrides the devices that the manifest names")
    group.add_argument("--manifest", type=path, metavar="FILE", help="of the packed store (a packed file in the cache)")
    for flag, default, least, text in (
        ("--prefetch-distance", 6, 1, "SSD layers read ahead: sizes the CPU pools"),
        ("--group-prefetch-depth", 4, 1, "groups of CPU to GPU look-ahead: sizes the GPU pools"),
        ("--gpu-cached-layers", 4, 0, "layers resident on the GPU"),
        ("--cpu-cache-layers", 40, 1, "layers of page-locked memory in all"),
        ("--warmup-layers", 4, 0, "layers staged on the GPU before the first pass"),
        ("--staging-mb", 64, 1, "SSD bytes in flight, in MB"),
    ):
        group.add_argument(flag, type=whole(least), default=default, metavar="N", help=f"{text} ({default})")
    group.add_argument(
        "--gpu-mem-gb", type=number(0, 1e6), metavar="GIB", help="GPU memory to use, context included (all free)"
    )
    group.add_argument("--cpu-mem-gb", type=number(0, 1e6), metavar="GIB", help="CPU memory to use (all free)")
    group.add_argument(
        "--embedding", choices=("gpu", "cpu"), default="gpu", help="where the token embedding lies (gpu)"
    )
    group.add_argument("--auto", action="store_true", help="choose layers and pools for the budgets")
    group.add_argument("--verify-weights", action="store_true", help="check a group's checksum at every read")
    group.add_argument("--topk-blk", type=topk, default=8, metavar="K", help="KV blocks from below the GPU a step (8)")
    group.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="how KV is stored (auto: as computed)")
    group.add_argument("--kv-device", metavar="PATH", help="file or block device for KV beyond CPU memory")
    group.add_argument("--prefill-chunk-tokens", type=whole(1), metavar="N", help="tokens a chunk (auto)")
    group.add_argument("--micro-batch", type=whole(1), metavar="ROWS", help="rows whose KV is moved together (auto)")
    group.add_argument("--device", metavar="DEV", help="cpu, cuda or cuda:N (auto)")
    group.add_argument(
        "--load-model", "--load_model", type=boolean, metavar="BOOL", help="whole model on the device (by mode)"
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument("--prompts", type=path, metavar="FILE", help="prompt file (the one in prompts/)")
    group.add_argument("--prompt", metavar="TEXT", help="one prompt")
    group.add_argument("--prompt-len", type=whole(1), metavar="N", help="N random ids a prompt, no tokenizer needed")
    group.add_argument("--batch-size", type=whole(1), default=1, metavar="N", help="rows (1)")
    group.add_argument("--max-new-tokens", type=whole(1), default=32, metavar="N", help="(32)")
    group.add_argument("--max-seq-len", type=whole(2), default=2048, metavar="N", help="(2048)")
    group.add_argument("--temperature", type=number(0, or_equal=True), default=0.6, help="0 is greedy (0.6)")
    group.add_argument("--top-p", type=number(0, 1), default=0.9, help="(0.9)")
    group.add_argument("--seed", type=whole(0), default=0, help="of random ids and sampling (0)")
    group.add_argument("--ignore-eos", action="store_true", help="go on after a stop token")
    group.add_argument("--warmup-rounds", type=whole(0), default=1, metavar="N", help="(1)")
    group.add_argument("--repeats", type=whole(1), default=1, metavar="N", help="timed rounds (1)")
    group.add_argument("--no-probe", action="store_true", help="take the ceilings from the cache")
    group.add_argument("--out-json", type=path, default=Path("bench_results.json"), metavar="FILE")
    group.add_argument("--trace", type=path, metavar="FILE", help="write a timeline (chrome://tracing, Perfetto)")
    group.add_argument("-o", "--output", choices=("md", "csv", "json"), help="print a row instead of the summary")
    group.add_argument("--print-text", action="store_true", help="print the generated texts, and keep them in the JSON")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; ``run`` is the default one, see :func:`parse`."""
    parser = _Parser(
        prog="bench_infer.py", description="Runs LLaMA models larger than the GPU and tells where the time went."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=_Parser)
    run = verbs.add_parser("run", help="run and measure (the default verb)")
    plan = verbs.add_parser("plan", help="what would lie where, in how much memory, bound by what")
    for verb in (run, plan):
        _add_model(verb)
        _add_paging(verb)
        _add_work(verb)
    pack = verbs.add_parser("pack", help="checkpoint to packed device or file")
    _add_model(pack)
    pack.add_argument(
        "--to", type=names, required=True, metavar="TARGET[,TARGET]", help="file or block device; several are striped"
    )
    pack.add_argument("--manifest", type=path, required=True, metavar="FILE")
    pack.add_argument("--force", action="store_true", help="overwrite a device that bears a filesystem or the like")
    pack.add_argument("--yes", action="store_true", help="do not ask")
    verify = verbs.add_parser("verify", help="read a packed store back and check it")
    verify.add_argument("--manifest", type=path, required=True, metavar="FILE")
    verify.add_argument("--raw-device", metavar="DEV[,DEV]")
    verify.add_argument("--checkpoints", type=path, metavar="DIR", help="for a manifest of version 1")
    verify.add_argument("--staging-mb", type=whole(1), default=64, metavar="N")
    verify.add_argument("--verbose", action="store_true")
    prompts = verbs.add_parser("prompts", help="make a prompt file of exactly N tokens a prompt")
    prompts.add_argument("--out", type=path, required=True, metavar="FILE")
    prompts.add_argument("--count", type=whole(1), default=512, metavar="N", help="(512)")
    prompts.add_argument("--tokens", type=whole(1), default=2048, metavar="N", help="(2048)")
    prompts.add_argument("--checkpoints", type=path, metavar="DIR", help="whose tokenizer counts (bytes)")
    prompts.add_argument("--seed", type=whole(0), default=0, help="(0)")
    prompts.add_argument("--cache-dir", type=path, default=DEFAULT_CACHE, metavar="DIR")
    prompts.add_argument("--verbose", action="store_true")
    add_sweep(verbs.add_parser("sweep", help="a run for every combination of listed values"), run)
    add_compare(verbs.add_parser("compare", help="results against the first one: table, ratio, verdict"))
    add_report(verbs.add_parser("report", help="results as one HTML page, and as PNG"))
    return parser


Options = RunOptions | PackOptions | VerifyOptions | PromptsOptions | SweepOptions | CompareOptions | ReportOptions
_ENGINE = (
    "mode",
    "prefetch_distance",
    "group_prefetch_depth",
    "gpu_cached_layers",
    "cpu_cache_layers",
    "warmup_layers",
    "staging_mb",
    "verify_weights",
    "embedding",
    "gpu_mem_gb",
    "cpu_mem_gb",
)


def parse(argv: Sequence[str]) -> tuple[str, Options]:
    """The verb (``run`` if the first argument is none) and its options.

    Raises:
        UnusableInput: for an argument that cannot be used, in one sentence.
    """
    if not argv or (argv[0] not in VERBS and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    values = vars(build_parser().parse_args(list(argv)))
    verb = str(values.pop("verb"))
    if verb in ("run", "plan"):
        engine = {name: values.pop(name) for name in _ENGINE}
        options = RunOptions(**values, engine=engine)
        _check_run(options)
        return verb, options
    if verb == "pack":
        return verb, PackOptions(**values)
    if verb == "verify":
        return verb, VerifyOptions(**values)
    if verb == "prompts":
        return verb, PromptsOptions(**values)
    if verb == "sweep":
        return verb, sweep_options(values)
    values["paths"] = tuple(values["paths"])
    return verb, CompareOptions(**values) if verb == "compare" else ReportOptions(**values)


def check_point(argv: Sequence[str]) -> None:
    """Whether a run takes these arguments and finds what they name.

    Raises:
        UnusableInput: naming the flag.
    """
    _, options = parse(["run", *argv])
    assert isinstance(options, RunOptions)
    for name in ("checkpoints", "prompts", "manifest"):
        named: Path | None = getattr(options, name)
        if named is not None and not named.exists():
            raise UnusableInput(f"--{name} {named} does not exist: nothing was run")


def _check_run(options: RunOptions) -> None:
    given = [
        flag
        for flag, value in (
            ("--prompts", options.prompts),
            ("--prompt", options.prompt),
            ("--prompt-len", options.prompt_len),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise UnusableInput(f"{' and '.join(given)} exclude each other: give one")
    if options.max_new_tokens >= options.max_seq_len:
        raise UnusableInput(
            f"--max-new-tokens {options.max_new_tokens} leaves no room for a prompt in --max-seq-len "
            f"{options.max_seq_len}: lower the first or raise the second"
        )
    if options.load_model and options.engine["mode"] in ("mixed", "stream"):
        raise UnusableInput(
            f"--load-model=True contradicts --mode {options.engine['mode']}, which never loads the whole model "
            "on the device: leave it out, or use --mode full"
        )
