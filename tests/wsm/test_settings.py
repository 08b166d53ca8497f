"""Flags and variables: what is allowed, what is said of what is not, and what the user sees of it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields

import pytest

from wsm.errors import UnusableInput
from wsm.option import options_of
from wsm.settings import (
    PRESETS,
    WSM_PRESETS,
    Ranks,
    Settings,
    environment_echo,
    preset_environment,
    read_ranks,
    read_variables,
    threads_of,
    unknown_variables,
)


def field_of(variable: str) -> str:
    return variable.removeprefix("WSM_").lower()


def test_settings_come_without_torch() -> None:
    """OMP_NUM_THREADS has to be set before torch is imported."""
    code = "import sys, wsm.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_flag_and_no_variable_give_the_guides_configuration() -> None:
    assert Settings(**read_variables({})) == Settings(**read_variables(PRESETS)) == Settings()
    assert unknown_variables(PRESETS) == []


def test_every_setting_is_declared_and_every_variable_sets_one() -> None:
    declared = options_of(Settings)
    assert list(declared) == [field.name for field in fields(Settings)]
    assert list(WSM_PRESETS) == [option.spelled for option in declared.values() if option.by_variable]
    assert {options_of(Settings)[field_of(variable)].spelled for variable in WSM_PRESETS} == set(WSM_PRESETS)


def test_every_default_is_allowed_and_every_declaration_says_what_it_does() -> None:
    for option in options_of(Settings).values():
        option.check(option.default)
        assert option.help


def test_presets_leave_alone_what_the_user_has_set() -> None:
    environ = {"WSM_CPU_EVICT": "fifo", "OMP_NUM_THREADS": "3", "HOME": "/"}
    before = preset_environment(environ)
    assert before == ("OMP_NUM_THREADS", "WSM_CPU_EVICT")
    assert environ["WSM_CPU_EVICT"] == "fifo"
    assert environ["OMP_NUM_THREADS"] == "3"
    assert environ["MALLOC_ARENA_MAX"] == "2"
    assert set(PRESETS) <= set(environ)


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"),
    [(1, 1, 1), (6, 1, 6), (16, 1, 8), (32, 2, 8), (16, 4, 4), (12, 8, 1), (4, 8, 1), (2, 2, 1)],
)
def test_a_rank_takes_its_share_of_the_cores_at_most_8_and_at_least_1(cores: int, ranks: int, threads: int) -> None:
    assert threads_of(cores, ranks) == threads


@pytest.mark.parametrize(("local_size", "threads"), [("1", "8"), ("2", "8"), ("4", "5"), ("0", "8"), ("many", "8")])
def test_ranks_without_a_value_share_the_cores_of_their_host(
    local_size: str, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsm.settings._CORES", 20)
    monkeypatch.setitem(PRESETS, "OMP_NUM_THREADS", "8")  # type: ignore[arg-type]
    environ = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": local_size}
    assert preset_environment(environ) == ()
    assert environ["OMP_NUM_THREADS"] == threads == environment_echo(environ)["OMP_NUM_THREADS"]


LAUNCHER = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does for several ranks
sys.exit(subprocess.call(sys.argv[1:], env={**os.environ, **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"), "TORCHELASTIC_RUN_ID": "a"}))
"""
"""What torchrun does to the environment of its ranks."""
RANK = """
import os
import wsm.settings
wsm.settings._CORES = 6
print(wsm.settings.preset_environment(os.environ), os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.parametrize("wrapper", [(), ("sh", "-c", '"$@"; exit $?', "sh")], ids=["direct", "by a script"])
@pytest.mark.parametrize(
    ("users", "said"), [(None, "() 3"), ("1", "('OMP_NUM_THREADS',) 1"), ("2", "('OMP_NUM_THREADS',) 2")]
)
def test_torchruns_own_1_gives_way_to_a_share_and_a_value_of_the_users_stays(
    users: str | None, said: str, wrapper: tuple[str, ...]
) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WSM_", "OMP_", "MALLOC_"))}
    environ |= {} if users is None else {"OMP_NUM_THREADS": users}
    command = [sys.executable, "-c", LAUNCHER, *wrapper, sys.executable, "-c", RANK]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said


def test_a_1_without_torchrun_is_the_users() -> None:
    environ = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    assert preset_environment(environ) == ("OMP_NUM_THREADS",)
    assert environ["OMP_NUM_THREADS"] == "1"


def test_the_echo_names_every_variable_and_nothing_else() -> None:
    echo = environment_echo({"WSM_PAIR_AHEAD": "7", "SECRET": "x"})
    assert set(echo) == {*PRESETS, "CUDA_VISIBLE_DEVICES"}
    assert echo["CUDA_VISIBLE_DEVICES"] is None
    assert environment_echo({"CUDA_VISIBLE_DEVICES": "1,0"})["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert echo["WSM_PAIR_AHEAD"] == "7"
    assert echo["WSM_KV_THROTTLE_MS"] == "16"


OTHER_VALUES = {
    "WSM_CPU_ROLLING_MODE": ("0", False),
    "WSM_CPU_EVICT": ("fifo", "fifo"),
    "WSM_CPU_WRAP_AROUND": ("0", False),
    "WSM_CPU_ROLL_SYNC": ("0", False),
    "WSM_AGGRESSIVE_GPU_PREFETCH": ("0", 0),
    "WSM_GPU_MAX_GROUPS": ("2", 2),
    "WSM_SKIP_PRELOAD_WAIT": ("0", False),
    "WSM_EVICT_FINISHED": ("0", False),
    "WSM_KV_THROTTLE_THRESHOLD": ("1", 1),
    "WSM_KV_THROTTLE_MS": ("2.5", 2.5),
    "WSM_BALANCE_PREFETCH": ("0", False),
    "WSM_BALANCE_TOL": ("0", 0),
    "WSM_PAIR_AHEAD": ("0", 0),
    "WSM_KIND_AHEAD_CAP": ("5", 5),
}


@pytest.mark.parametrize("variable", WSM_PRESETS)
def test_each_variable_is_read(variable: str) -> None:
    text, value = OTHER_VALUES[variable]
    settings = Settings(**read_variables({variable: text}))
    assert getattr(settings, field_of(variable)) == value != getattr(Settings(), field_of(variable))


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("WSM_GPU_MAX_GROUPS", "zero", "a whole number of at least 2"),
        ("WSM_GPU_MAX_GROUPS", "1", "a whole number of at least 2"),
        ("WSM_CPU_EVICT", "lru", "belady or fifo"),
        ("WSM_CPU_EVICT", "", "belady or fifo"),
        ("WSM_CPU_ROLLING_MODE", "yes", "0 or 1"),
        ("WSM_PAIR_AHEAD", "-1", "a whole number of at least 0"),
        ("WSM_PAIR_AHEAD", "1.5", "a whole number of at least 0"),
        ("WSM_KV_THROTTLE_MS", "nan", "0 to 1000 milliseconds"),
        ("WSM_KV_THROTTLE_MS", "1001", "0 to 1000 milliseconds"),
        ("WSM_KV_THROTTLE_THRESHOLD", "0", "a whole number of at least 1"),
        ("OMP_NUM_THREADS", "many", "a whole number of at least 1"),
        ("MALLOC_ARENA_MAX", "0", "a whole number of at least 1"),
    ],
)
def test_a_bad_variable_is_named_with_its_value_and_what_is_allowed(variable: str, text: str, allowed: str) -> None:
    with pytest.raises(UnusableInput) as raised:
        read_variables({variable: text})
    assert str(raised.value) == f"{variable}={text} cannot be used: it must be {allowed}"


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("mode", "turbo", "--mode"),
        ("gpu_cached_layers", -1, "--gpu-cached-layers"),
        ("cpu_cache_layers", 1.5, "--cpu-cache-layers"),
        ("prefetch_distance", True, "--prefetch-distance"),
        ("prefetch_distance", 0, "--prefetch-distance"),
        ("prefetch_distance", 1 << 63, "--prefetch-distance"),
        ("cpu_mem_gb", 1e7, "--cpu-mem-gb"),
        ("embedding", "disk", "--embedding"),
        ("mode", None, "--mode"),
        ("staging_mb", 0, "--staging-mb"),
        ("gpu_mem_gb", 0, "--gpu-mem-gb"),
        ("cpu_mem_gb", float("nan"), "--cpu-mem-gb"),
        ("cpu_mem_gb", 10**400, "--cpu-mem-gb"),
        ("pair_ahead", -2, "WSM_PAIR_AHEAD"),
    ],
)
def test_a_bad_flag_is_named_with_its_value(field: str, value: object, flag: str) -> None:
    with pytest.raises(UnusableInput, match=f"^{flag} must be .*, not {value!r}$"):
        Settings(**{field: value})  # type: ignore[arg-type]


def test_an_unknown_variable_warns_with_the_name_that_was_meant() -> None:
    assert unknown_variables({"WSM_GPU_MAX_GROUP": "4", "WSM_QQQQ": "1", "OTHER": "2"}) == [
        "the variable WSM_GPU_MAX_GROUP is not known and has no effect; did you mean WSM_GPU_MAX_GROUPS?",
        "the variable WSM_QQQQ is not known and has no effect",
    ]


def test_fields_are_spelled_as_the_user_spells_them() -> None:
    assert options_of(Settings)["gpu_cached_layers"].spelled == "--gpu-cached-layers"
    assert options_of(Settings)["cpu_evict"].spelled == "WSM_CPU_EVICT"


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_ranks_are_torchruns_and_one_without_it() -> None:
    assert read_ranks({}) == Ranks() == read_ranks({"WORLD_SIZE": "1"})
    assert read_ranks(TORCHRUN) == Ranks(3, 4, 1, 2, 0, "host-a", 29500, keeps_store=False)
    by_hand = {name: value for name, value in TORCHRUN.items() if not name.startswith("TORCHELASTIC")}
    assert read_ranks({**by_hand, "RANK": "0", "LOCAL_RANK": "0"}).keeps_store
    assert not read_ranks(by_hand).keeps_store


@pytest.mark.parametrize(
    "change",
    [{"RANK": "4"}, {"LOCAL_RANK": "2"}, {"RANK": "x"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": ""}, {"RANK": "-1"}],
)
def test_variables_that_are_no_place_among_ranks_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(UnusableInput, match="torchrun"):
        read_ranks({**TORCHRUN, **change})
