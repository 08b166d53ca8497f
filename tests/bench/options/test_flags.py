"""The command line: the guide's words are understood, and what is not is refused with the flag's name."""

from __future__ import annotations

import dataclasses
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from bench import __version__
from bench.options.flags import parse
from bench.options.run_flags import RunOptions
from bench.options.verb_flags import (
    VERBS,
    CompareOptions,
    PackOptions,
    PromptsOptions,
    ReportOptions,
    SweepOptions,
    VerifyOptions,
)
from bench_infer import command_line as main
from llama.config import PRESETS
from llama.options import BuildOptions
from wsm.errors import UnusableInput
from wsm.option import options_of as flags_of
from wsm.settings import Settings

GUIDE = """
  --checkpoints /home/roger/.llama/checkpoints/Llama3.1-70B
  --mode mixed
  --raw-device /dev/nvme0n1p4
  --manifest /data1/70b-fixed.runtime_manifest.json
  --prompts /home/roger/llama3-inference/prompts/prompts_batch512_len2048.txt
  --batch-size 1
  --max-new-tokens 32
  --max-seq-len 2048
  --temperature 0.6
  --top-p 0.9
  --warmup-rounds 1
  --prefetch-distance 6
  --group-prefetch-depth 4
  --gpu-cached-layers 4
  --cpu-cache-layers 40
  --warmup-layers 4
  --staging-mb 64
  --topk-blk 8
  --out-json bench_70B_results.json
  --verbose
"""
"""The quick-start guide's one-line configuration, word for word."""
BUILT = [field.name for field in dataclasses.fields(BuildOptions)]
PLACES = {"checkpoints", "raw_device", "manifest", "prompts", "out_json", "verbose"}
"""What the guide's command says of one user's machine; the rest are the defaults."""


def options_of(*argv: str) -> RunOptions:
    verb, options = parse(argv)
    assert verb == "run"
    assert isinstance(options, RunOptions)
    return options


def values_of(options: RunOptions) -> dict[str, Any]:
    return dataclasses.asdict(options)


def refusal(*argv: str) -> str:
    with pytest.raises(UnusableInput) as caught:
        parse(argv)
    return str(caught.value)


# -- the guide


def test_the_guides_command_line_is_understood_word_for_word() -> None:
    options = options_of(*shlex.split(GUIDE))
    assert options.checkpoints == Path("/home/roger/.llama/checkpoints/Llama3.1-70B")
    assert options.raw_device == "/dev/nvme0n1p4"
    assert options.manifest == Path("/data1/70b-fixed.runtime_manifest.json")
    assert options.prompts == Path("/home/roger/llama3-inference/prompts/prompts_batch512_len2048.txt")
    assert options.out_json == Path("bench_70B_results.json")
    assert options.verbose
    assert (options.temperature, options.top_p) == (0.6, 0.9)


def test_the_defaults_are_the_guides_configuration() -> None:
    guide, default = values_of(options_of(*shlex.split(GUIDE))), values_of(options_of())
    assert {name for name in guide if guide[name] != default[name]} == PLACES


def test_flags_and_settings_have_the_same_defaults() -> None:
    settings = dataclasses.asdict(Settings())
    assert values_of(options_of()).items() >= settings.items()


def test_the_result_goes_to_bench_results_json_unless_told_otherwise() -> None:
    assert options_of().out_json == Path("bench_results.json")


def test_a_flag_beats_its_variable_and_an_absent_flag_does_not() -> None:
    variables = {"WSM_GPU_MAX_GROUPS": "6", "WSM_PAIR_AHEAD": "3"}
    _, options = parse(["--gpu-cached-layers", "3"], variables)
    assert isinstance(options, RunOptions)
    assert (options.gpu_max_groups, options.pair_ahead, options.gpu_cached_layers) == (6, 3, 3)
    assert dataclasses.replace(options, gpu_max_groups=4).gpu_max_groups == 4


def test_a_variable_that_cannot_be_used_is_refused_by_run_and_plan_alone() -> None:
    variables = {"WSM_PAIR_AHEAD": "x"}
    for verb in ("run", "plan"):
        with pytest.raises(UnusableInput, match=r"^WSM_PAIR_AHEAD=x cannot be used"):
            parse([verb], variables)
    assert parse(["compare", "a"], variables)[0] == "compare"


def test_one_object_goes_from_the_command_line_to_the_engine() -> None:
    assert isinstance(options_of(), BuildOptions)
    assert isinstance(options_of(), Settings)


# -- spellings


@pytest.mark.parametrize("argv", [["--load_model=False"], ["--load-model", "False"], ["--load-model=0"]])
def test_load_model_is_taken_in_both_spellings(argv: list[str]) -> None:
    assert options_of(*argv).load_model is False


def test_load_model_true_goes_with_the_modes_that_load_it() -> None:
    assert options_of("--load_model", "True", "--mode", "full").load_model is True
    assert options_of("--load_model", "True", "--mode", "preload").load_model is True
    assert options_of().load_model is None


def test_temperature_zero_topk_zero_and_no_warm_up_are_allowed() -> None:
    options = options_of("--temperature", "0", "--topk-blk", "0", "--warmup-rounds", "0", "--gpu-cached-layers", "0")
    assert (options.temperature, options.topk_blk, options.warmup_rounds) == (0, 0, 0)
    assert options.gpu_cached_layers == 0


# -- refusals


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch-size", "0"),
        ("--batch-size", "-1"),
        ("--batch-size", "two"),
        ("--batch-size", "1.5"),
        ("--max-new-tokens", "0"),
        ("--max-seq-len", "1"),
        ("--prompt-len", "0"),
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--top-p", "nan"),
        ("--seed", "-1"),
        ("--warmup-rounds", "-1"),
        ("--repeats", "0"),
        ("--prefetch-distance", "0"),
        ("--group-prefetch-depth", "0"),
        ("--gpu-cached-layers", "-1"),
        ("--cpu-cache-layers", "0"),
        ("--warmup-layers", "-1"),
        ("--staging-mb", "0"),
        ("--topk-blk", "1"),
        ("--topk-blk", "-1"),
        ("--topk-blk", "all"),
        ("--prefill-chunk-tokens", "0"),
        ("--micro-batch", "0"),
        ("--gpu-mem-gb", "0"),
        ("--gpu-mem-gb", "inf"),
        ("--cpu-mem-gb", "-3"),
        ("--cpu-mem-gb", "nan"),
        ("--mode", "hybrid"),
        ("--load-model", "maybe"),
        ("--output", "xml"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_flags_name(flag: str, value: str) -> None:
    sentence = refusal(f"{flag}={value}")
    assert flag in sentence
    assert "\n" not in sentence


def test_a_flag_that_is_not_known_is_named() -> None:
    assert "--gpu-cached-layer5" in refusal("--gpu-cached-layer5", "4")


def test_a_flag_without_its_value_is_named() -> None:
    assert "--mode" in refusal("--mode")


@pytest.mark.parametrize("abbreviation", ["--prefetch", "--gpu-cached", "--batch", "--max-new", "--no-pro"])
def test_flags_are_not_guessed_from_their_beginning(abbreviation: str) -> None:
    assert abbreviation in refusal(abbreviation, "4")


def test_a_verb_behind_flags_is_told_to_come_first() -> None:
    sentence = refusal("--mode", "stream", "plan", "--auto")
    assert sentence.startswith("plan is a verb and comes first: ")
    assert "bench_infer.py plan --mode stream --auto (see" in sentence


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["a.json", "b.json"], "bench_infer.py compare a.json b.json"),
        (["model.gguf", "--mode", "full"], "bench_infer.py --checkpoints model.gguf --mode full"),
    ],
)
def test_a_file_for_a_verb_gets_the_command_that_takes_it(argv: list[str], meant: str) -> None:
    sentence = refusal(*argv)
    assert sentence.startswith(f"there is no verb {argv[0]}; did you mean ")
    assert meant in sentence


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        *(
            (flag, "path")
            for flag in ("--out-json", "--trace", "--prompts", "--checkpoints", "--manifest", "--cache-dir")
        ),
        *((flag, "name") for flag in ("--device", "--synthetic")),
        *((flag, "text") for flag in ("--kv-device", "--raw-device", "--draft", "--prompt")),
    ],
)
def test_an_empty_value_is_none(flag: str, kind: str) -> None:
    """As of a shell's variable that is not set; pathlib takes it for the folder that one is in."""
    assert refusal(f"{flag}=").startswith(f"argument {flag}: must be a {kind}, not empty")


@pytest.mark.parametrize(
    "pair",
    [
        ("--prompts=a.txt", "--prompt=b"),
        ("--prompts=a.txt", "--prompt-len=4"),
        ("--prompt=b", "--prompt-len=4"),
    ],
)
def test_two_sources_of_prompts_exclude_each_other(pair: tuple[str, str]) -> None:
    sentence = refusal(*pair)
    assert all(flag.partition("=")[0] in sentence for flag in pair)


def test_a_blank_prompt_still_counts_as_given() -> None:
    assert "--prompt-len" in refusal("--prompt", " ", "--prompt-len", "4")


def test_new_tokens_must_leave_room_for_a_prompt() -> None:
    sentence = refusal("--max-new-tokens", "2048")
    assert "--max-new-tokens" in sentence
    assert "--max-seq-len" in sentence
    assert options_of("--max-new-tokens", "2047").max_new_tokens == 2047


@pytest.mark.parametrize("mode", ["mixed", "stream"])
def test_a_streaming_mode_cannot_load_the_whole_model(mode: str) -> None:
    assert "--load-model" in refusal("--load_model=True", "--mode", mode)


@pytest.mark.parametrize("mode", ["full", "preload"])
def test_a_mode_that_loads_the_whole_model_cannot_do_without(mode: str) -> None:
    assert f"--load-model=False contradicts --mode {mode}" in refusal("--load_model=False", "--mode", mode)


def test_two_models_exclude_each_other(tmp_path: Path) -> None:
    argv = ["--checkpoints", str(tmp_path), "--synthetic", "Llama-3.1-8B", "--out-json", str(tmp_path / "o.json")]
    assert main(argv) == 2


# -- from the command line to the terminal


def test_a_bad_flag_gives_exit_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topk-blk", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "--topk-blk" in err


def test_verbose_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verbose", "--topk-blk", "1"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    assert verb in capsys.readouterr().out


# -- verbs


@pytest.mark.parametrize("argv", [[], ["--mode", "full"], ["run", "--mode", "full"]])
def test_run_is_the_default_verb(argv: list[str]) -> None:
    verb, options = parse(argv)
    assert verb == "run"
    assert isinstance(options, RunOptions)


def test_plan_takes_the_flags_of_a_run() -> None:
    verb, options = parse(["plan", *shlex.split(GUIDE)])
    assert verb == "plan"
    of_run = options_of(*shlex.split(GUIDE))
    assert [getattr(options, field.name) for field in dataclasses.fields(of_run)] == list(dataclasses.astuple(of_run))


def test_plan_checks_contradictions_too() -> None:
    assert "--load-model" in refusal("plan", "--load-model=True")


def test_pack_takes_several_targets() -> None:
    verb, options = parse(["pack", "--to", "/dev/a,/dev/b", "--manifest", "m.json", "--checkpoints", "c", "--force"])
    assert verb == "pack"
    assert isinstance(options, PackOptions)
    assert options.to == ("/dev/a", "/dev/b")
    assert (options.manifest, options.checkpoints) == (Path("m.json"), Path("c"))
    assert options.force
    assert not options.yes
    assert (options.synthetic, options.dtype) == (None, None)


@pytest.mark.parametrize("missing", ["--to", "--manifest"])
def test_pack_asks_for_target_and_manifest(missing: str) -> None:
    given = {"--to": "t", "--manifest": "m"}
    del given[missing]
    assert missing in refusal("pack", *(word for pair in given.items() for word in pair))


@pytest.mark.parametrize("targets", ["", "a,", ",a", "a,,b"])
def test_pack_refuses_a_target_without_a_name(targets: str) -> None:
    assert "--to" in refusal("pack", f"--to={targets}", "--manifest", "m")


def test_verify_takes_its_store() -> None:
    verb, options = parse(["verify", "--manifest", "m", "--raw-device", "/dev/a", "--staging-mb", "8"])
    assert verb == "verify"
    expected = VerifyOptions(manifest=Path("m"), raw_device="/dev/a", checkpoints=None, staging_mb=8, verbose=False)
    assert options == expected
    assert "--manifest" in refusal("verify")


def test_prompts_come_512_of_2048_tokens_as_in_the_guides_file() -> None:
    verb, options = parse(["prompts", "--out", "p.txt"])
    assert verb == "prompts"
    assert isinstance(options, PromptsOptions)
    assert (options.out, options.count, options.tokens, options.seed) == (Path("p.txt"), 512, 2048, 0)
    assert options.checkpoints is None
    assert "--out" in refusal("prompts")
    assert "--tokens" in refusal("prompts", "--out", "p", "--tokens", "0")


def test_compare_takes_results_a_threshold_and_a_form() -> None:
    verb, options = parse(["compare", "a.json", "b", "--threshold", "3", "-o", "csv"])
    assert verb == "compare"
    assert options == CompareOptions(paths=(Path("a.json"), Path("b")), threshold=3.0, output="csv", verbose=False)
    assert "RESULT" in refusal("compare")
    assert "--threshold" in refusal("compare", "a", "b", "--threshold", "-1")


def test_report_takes_results_and_where_to_write() -> None:
    verb, options = parse(["report", "a.json", "--png", "plots"])
    assert verb == "report"
    assert options == ReportOptions(paths=(Path("a.json"),), out=Path("report.html"), png=Path("plots"), verbose=False)
    assert "RESULT" in refusal("report")


def test_a_flag_of_another_verb_is_refused() -> None:
    assert "--to" in refusal("run", "--to", "x")
    assert "--batch-size" in refusal("pack", "--to", "x", "--manifest", "m", "--batch-size", "2")


def test_a_verb_that_is_not_known_is_named() -> None:
    assert "pakc" in refusal("pakc", "--force")


def test_another_seed_is_of_the_same_synthetic_weights() -> None:
    """So another draw of tokens packs nothing anew."""
    built = [
        {name: getattr(options_of("--synthetic", "Llama-3.2-1B:layers=1", "--seed", seed), name) for name in BUILT}
        for seed in ("1", "2")
    ]
    assert built[0] == built[1]
    assert "--seed" in refusal("pack", "--to", "t", "--manifest", "m", "--seed", "1")


# -- what to give


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pack", "--to", "x"], "pack needs --manifest FILE (where the store's description is written) ("),
        (["pack"], "pack needs --to TARGET[,TARGET] (file or block device; several are striped) and --manifest FILE ("),
        (["cache"], "cache needs ACTION (list, or clear, and "),
        (["compare"], "compare needs RESULT (a result's .json, "),
        (["compare", "a", "b", "--threshold"], "--threshold needs a value: --threshold PCT ("),
        (["-b"], "-b/--batch-size needs a value: --batch-size N ("),
        (["--auto=1"], "--auto takes no value: leave '1' out ("),
        (["run", "extra.json"], "run takes no argument extra.json, only flags and their values ("),
        (["compare", "a", "--threshold", "3", "b"], "b: compare takes every RESULT in one place, "),
    ],
)
def test_what_argparse_misses_is_said_with_what_to_give(argv: list[str], said: str) -> None:
    assert refusal(*argv).startswith(said)


# -- what was meant


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--gpu-cache-layers", "4"], "--gpu-cache-layers is no flag of run; did you mean --gpu-cached-layers?"),
        (["--batch_size=4"], "--batch_size is no flag of run; did you mean --batch-size?"),
        (["--Mode", "full"], "--Mode is no flag of run; did you mean --mode?"),
        (["plam"], "there is no verb plam; did you mean plan?"),
        (["pack", "--too", "x"], "--too is no flag of pack; did you mean --to?"),
        (["--mode", "Mixed"], "--mode: must be mixed, stream, preload or full, not Mixed; did you mean mixed?"),
        (["compare", "a", "-o", "cvs"], "not cvs; did you mean csv?"),
        (["--weight-format", "int3"], "not int3; did you mean int4?"),
        (["--weight-format", "int7"], "not int7; did you mean int8?"),
        (["--weight-format", "q3_K"], "not q3_K; did you mean q4_K?"),
        (["sweep", "--prefetch-distence", "4,6"], "no flag of sweep; did you mean --prefetch-distance?"),
        (["sweep", "--out-json", "a"], "--out-json is no flag of sweep, but of run and plan"),
        (["-x"], "-x is no flag of run"),
    ],
)
def test_what_was_most_likely_meant_is_said(argv: list[str], said: str) -> None:
    assert said in refusal(*argv)


def test_a_value_of_a_variable_and_of_the_programming_interface_is_guessed_too() -> None:
    with pytest.raises(UnusableInput, match=r"not 'streem'; did you mean stream\?"):
        Settings(mode="streem")
    with pytest.raises(UnusableInput, match=r"WSM_CPU_EVICT=beladi .* did you mean belady\?"):
        parse([], {"WSM_CPU_EVICT": "beladi"})


@pytest.mark.parametrize("argv", [["--prompt", "--no flag, with spaces"], ["--prompt=--x"], ["--prompt", "-1"]])
def test_a_prompt_that_looks_like_a_flag_is_none(argv: list[str]) -> None:
    assert options_of(*argv).prompt == argv[-1].removeprefix("--prompt=")


@pytest.mark.parametrize("argv", [["--nonsense"], ["plan", "--mode", "x"], ["pakc"], ["pack"]])
def test_the_help_that_an_error_points_to_has_the_flags_of_its_verb(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = refusal(*argv).rpartition("(see bench_infer.py ")[2].rstrip(")").split()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    verb = words[0] if len(words) > 1 else "run"
    assert [d.spelled for d in flags_of(VERBS[verb][0]).values() if not d.by_variable and d.spelled not in shown] == []


# -- short forms, and what is only answered


def test_short_forms_are_those_of_llama_bench() -> None:
    options = options_of("-p", "512", "-n", "128", "-b", "4", "-r", "5")
    assert (options.prompt_len, options.max_new_tokens, options.batch_size, options.repeats) == (512, 128, 4, 5)
    _, swept = parse(["sweep", "-p", "512,1024", "-r", "3"])
    assert isinstance(swept, SweepOptions)
    assert (swept.sweep.axes, swept.repeats) == ({"--prompt-len": ("512", "1024")}, 3)


def test_the_version_is_told_with_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(
        f"bench_infer.py {__version__}, torch {metadata.version('torch')}, Python "
    )


def test_the_models_are_listed_with_the_sizes_that_their_checkpoints_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--list-models"])
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines())}
    assert rows.keys() - {"model"} == set(PRESETS)
    assert rows["Llama-3.1-70B"] == ["80", "70.55", "141.11", "1.711"]  # 70 553 706 496 parameters
    assert rows["Llama-3.2-1B"] == ["16", "1.24", "2.47", "0.122"]  # its head is its embedding


# -- stop tokens


@pytest.mark.parametrize(
    ("argv", "goes_on"),
    [
        ([], True),
        (["--prompt", "a"], True),
        (["--synthetic", "Llama-3.2-1B", "--prompt", "a"], True),
        (["--checkpoints", "d", "--prompt-len", "8"], True),
        (["--checkpoints", "d", "--prompt", "a"], False),
        (["--checkpoints", "d"], False),
        (["--checkpoints", "d", "--ignore-eos"], True),
        (["--no-ignore-eos"], False),
        (["--prompt-len", "8", "--no-ignore-eos"], False),
    ],
)
def test_random_prompts_and_weights_go_on_to_the_full_length(argv: list[str], goes_on: bool) -> None:
    options = options_of(*argv)
    assert options.goes_on is goes_on
    assert options.to_json()["ignore_eos"] is goes_on


def test_a_sweep_turns_a_switch_of_two_sides_off_in_words() -> None:
    _, options = parse(["sweep", "--ignore-eos", "on,off"])
    assert isinstance(options, SweepOptions)
    assert [list(point.argv) for point in options.sweep.points] == [["--ignore-eos"], ["--no-ignore-eos"]]
