"""The command that keeps what --auto chose."""

from __future__ import annotations

import shlex

import pytest

from bench.options.flags import kept_command, parse
from bench.options.program import called
from bench.options.run_flags import RunOptions

CHOSEN = ["--gpu-cached-layers 7", "--cpu-cache-layers 9"]


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["--auto", "--mode", "stream"], "--mode stream"),
        (["plan", "--auto", "--gpu-cached-layers", "3", "--seed", "1"], "--seed 1"),
        (["run", "--gpu-cached-layers=3", "--auto"], ""),
        (["--prompt", "two words", "--auto"], "--prompt 'two words'"),
        (["--gpu-mem-gb", "12", "--auto"], "--gpu-mem-gb 12"),
    ],
)
def test_the_choice_stands_in_place_of_auto_and_of_what_it_replaced(argv: list[str], kept: str) -> None:
    words = shlex.split(kept_command(argv, CHOSEN))
    expected = [*called(), *shlex.split(kept), *(word for pair in CHOSEN for word in pair.split())]
    assert words == expected


def test_the_command_asks_for_what_was_chosen() -> None:
    argv = ["--auto", "--gpu-cached-layers", "1", "--prompt", "it's; rm -rf /", "--batch-size=2"]
    verb, options = parse(shlex.split(kept_command(argv, CHOSEN))[2:])
    assert verb == "run"
    assert isinstance(options, RunOptions)
    assert (options.auto, options.prompt, options.batch_size) == (False, "it's; rm -rf /", 2)
    assert (options.gpu_cached_layers, options.cpu_cache_layers) == (7, 9)
