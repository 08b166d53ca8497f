"""What LLaMA.build takes: the same declarations as the command line's, so the same values and the same sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.options.flags import parse
from llama import LLaMA
from llama.options import BuildOptions, build_options
from wsm.errors import UnusableInput
from wsm.option import options_of


def test_mode_config_holds_engine_and_build_options_with_paths_as_text() -> None:
    config = {"gpu_cached_layers": 2, "pair_ahead": 3, "manifest": "m.json", "cache_dir": "c", "kv_dtype": "int8"}
    options = build_options(config, mode="stream", checkpoints="dir")
    assert (options.mode, options.gpu_cached_layers, options.pair_ahead) == ("stream", 2, 3)
    assert (options.checkpoints, options.manifest, options.cache_dir) == (Path("dir"), Path("m.json"), Path("c"))
    assert options == BuildOptions(**{**config, "mode": "stream"} | {n: Path(p) for n, p in PATHS.items()})  # type: ignore[arg-type]


PATHS = {"checkpoints": "dir", "manifest": "m.json", "cache_dir": "c"}


@pytest.mark.parametrize("name", ["gpu_cached_layer", "checkpoints", "device", "load_model", "tp", "world"])
def test_what_mode_config_does_not_hold_is_named(name: str) -> None:
    with pytest.raises(UnusableInput, match=f"mode_config has unknown entries: {name}"):
        build_options({name: "x"})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"prefetch_distance": 0}, "--prefetch-distance must be a whole number of at least 1, not 0"),
        ({"topk_blk": 1}, r"--topk-blk must be 0 \(all blocks\) or at least 2, not 1"),
        ({"micro_batch": 0}, "--micro-batch must be a whole number of at least 1, not 0"),
        ({"kv_dtype": "fp8"}, "--kv-dtype must be auto or int8, not 'fp8'"),
        ({"dtype": "int4"}, "--dtype must be bfloat16, float16, float32 or auto, not 'int4'"),
        ({"mode": "hybrid"}, "--mode must be mixed, stream, preload or full, not 'hybrid'"),
        ({"cache_dir": None}, "--cache-dir must be a path, not None"),
    ],
)
def test_a_bad_value_is_refused_as_on_the_command_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnusableInput, match=f"^{said}$"):
        LLaMA.build(None, mode_config=config)


@pytest.mark.parametrize("mode", ["mixed", "stream"])
def test_a_streaming_mode_cannot_load_the_whole_model(mode: str) -> None:
    with pytest.raises(UnusableInput, match=f"--load-model=True contradicts --mode {mode}"):
        LLaMA.build(None, mode=mode, load_model=True)


@pytest.mark.parametrize("value", ["0", "1", "-1", "x"])
def test_flag_and_python_agree_on_every_least_number(value: str) -> None:
    """A rule is written once: what a flag refuses, LLaMA.build refuses."""
    for name, declared in options_of(BuildOptions).items():
        if declared.by_variable or not declared.kind.says.startswith("a whole number"):
            continue
        refused, beside = [], ["--draft=ngram"] if name == "draft_width" else []  # which says nothing alone
        for build in (
            lambda name=name: BuildOptions(**{name: int(value) if value != "x" else value}),
            lambda flag=declared.spelled, beside=beside: parse([*beside, f"{flag}={value}"]),
        ):
            try:
                build()
                refused.append(False)
            except UnusableInput:
                refused.append(True)
        assert refused[0] == refused[1], (name, value)
