"""The script as its user meets it: commands, printed lines, exit codes, sentences."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.result.types import FIXED_KEYS
from bench.run import ceilings
from bench_infer import command_line as main
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import all_tensors
from tests.tiny import hf_directory, hf_model, hf_tokenizer, meta_directory

SCRIPT = Path(__file__).resolve().parents[2] / "bench_infer.py"
SMALL = ["--max-new-tokens", "4", "--temperature", "0", "--ignore-eos", "--no-probe", "--device", "cpu"]
PLACES = ["--gpu-cached-layers", "1", "--cpu-cache-layers", "2", "--prefetch-distance", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model of 6 layers, as HF and as Meta shards, and its packed store."""
    home = tmp_path_factory.mktemp("home")
    hf_tokenizer(hf_directory(home / "hf", hf_model(num_hidden_layers=6)))
    shutil.copytree(home / "hf", home / "for-meta")
    meta = meta_directory(home / "meta", open_checkpoint(home / "hf"), 2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (home / "hf" / name).exists():
            shutil.copy(home / "hf" / name, meta)
    assert main(["pack", "--checkpoints", f"{home}/hf", "--to", f"{home}/s.wsm", "--manifest", f"{home}/s.json"]) == 0
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def sentence(err: str, *, lines: int = 1) -> str:
    """The one sentence on stderr; no traceback."""
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == lines, err
    return err


def result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_no_file_that_is_not_ours_is_replaced_by_a_result(
    home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """Neither of the run's own files nor of others: a store, weights, notes. A result is, and so is an empty file."""
    notes = tmp_path / "notes.md"
    notes.write_text("{\\rtf1 precious}")
    other, weights = tmp_path / "other.json", home / "hf" / "model.safetensors"
    other.write_text((home / "s.json").read_text())
    store = ["--manifest", home / "s.json", "--checkpoints", home / "hf", "--mode", "mixed", *PLACES, *SMALL]
    for flag in ("--out-json", "--trace"):
        elsewhere = ["--out-json", tmp_path / "r.json"] if flag == "--trace" else []
        for path in (home / "s.wsm", weights, notes, other, home / "s.json", home / "hf" / "config.json"):
            before = path.read_bytes()
            code, _, err = run(*store, "-p", 4, *elsewhere, flag, path)
            assert code == 2
            assert f"{path} is " in sentence(err)
            assert path.read_bytes() == before
    assert run("verify", "--manifest", home / "s.json")[0] == 0
    (tmp_path / "r.json").write_text("\n")
    assert [run(*store, "-p", 4, "--out-json", tmp_path / "r.json")[0] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(("widest", "kinds"), [(8 << 20, ["attn", "ffn"]), (1, ["attn"])])
def test_the_probe_reads_small_groups_as_a_pass_does(
    widest: int,
    kinds: list[str],
    home: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe_ssd, read = ceilings.probe_ssd, list[Any]()

    def seen(device: Any, source: Any, groups: Any, *more: Any) -> Any:
        read.extend(groups)
        return probe_ssd(device, source, groups, *more)

    monkeypatch.setattr(ceilings, "probe_ssd", seen)
    monkeypatch.setattr(ceilings, "LARGEST_CHUNK", widest)
    words = ["--checkpoints", home / "hf", "--manifest", home / "s.json", "--mode", "mixed", "--device", "cpu"]
    words += ["--gpu-cached-layers", 1, "--cpu-cache-layers", 4, "--prefetch-distance", 1, "-p", 4, "-n", 2]
    assert run(*words, "--out-json", tmp_path / "r.json", "--cache-dir", tmp_path)[0] == 0
    assert [group.kind for group in read] == kinds * (len(read) // len(kinds))
    assert result(tmp_path / "r.json")["ceilings"]["ssd"]["value"] > 0


def test_the_probe_of_the_drive_finds_room_where_only_small_groups_fit_three_times(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """The built-in model's FFN is three times its attention, and two CPU layers have room for two of it."""
    words = ["--mode", "mixed", "--device", "cpu", "--cache-dir", tmp_path, "-p", 4, "-n", 2, "--quiet"]
    places = ["--gpu-cached-layers", 1, "--cpu-cache-layers", 2, "--prefetch-distance", 1]
    assert run(*words, *places, "--out-json", tmp_path / "r.json")[0] == 0
    assert result(tmp_path / "r.json")["ceilings"]["ssd"]["value"] > 0


def guide(home: Path, device: Path | str, manifest: Path, out: Path) -> list[object]:
    """The quick-start guide's command, word for word but for its paths."""
    return [
        "--checkpoints", home / "hf", "--mode", "mixed", "--raw-device", device, "--manifest", manifest,
        "--prompts", home / "prompts.txt", "--batch-size", 1, "--max-new-tokens", 32, "--max-seq-len", 2048,
        "--temperature", 0.6, "--top-p", 0.9, "--warmup-rounds", 1, "--prefetch-distance", 6,
        "--group-prefetch-depth", 4, "--gpu-cached-layers", 4, "--cpu-cache-layers", 40, "--warmup-layers", 4,
        "--staging-mb", 64, "--topk-blk", 8, "--out-json", out, "--verbose",
    ]  # fmt: skip


def write_v1(home: Path, target: Path) -> Path:
    """A version 1 store of the HF model in ``target``, and its manifest."""
    checkpoint, offset, params = open_checkpoint(home / "hf"), 4194304, []
    with target.open("r+b" if target.exists() else "w+b") as file:
        for name, shape in all_tensors(checkpoint.config):
            tensor = torch.empty(shape, dtype=checkpoint.dtype)
            checkpoint.read_into(name, tensor)
            data = tensor.numpy().tobytes()
            file.seek(offset)
            file.write(data)
            layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
            stride = -(-len(data) // 512) * 512
            params.append(
                {
                    "name": name.replace("tok_embeddings", "embed_tokens"),
                    "layer": layer,
                    "dtype": str(checkpoint.dtype).removeprefix("torch."),
                    "shape": list(shape),
                    "offset": offset,
                    "nbytes": len(data),
                    "stride": stride,
                    "policy": "stream",
                }
            )
            offset += stride
        file.truncate(max(-(-offset // 4096) * 4096, target.stat().st_size))
    manifest = home / "v1.json"
    entry = {"version": 1, "raw_device": str(target), "block_size": 512, "header_reserve": 4194304, "params": params}
    manifest.write_text(json.dumps(entry))
    return manifest


def test_the_guides_command_runs_on_a_file_and_on_a_version_1_store_with_the_same_tokens(
    home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "prompts.txt").write_text("once upon a time there was a drive\n")
    hashes = []
    for device, manifest in (
        (home / "s.wsm", home / "s.json"),
        (tmp_path / "v1.bin", write_v1(home, tmp_path / "v1.bin")),
    ):
        code, out, err = run(*guide(home, device, manifest, tmp_path / "r.json"))
        assert (code, err) == (0, "")
        for line in (
            "[INFO] Global state tracker initialized",
            "[MODE-DECISION] called LLaMA.build(mode=mixed, load_model=False)",
            "=== Benchmark Summary ===",
            f"详细 JSON 已保存到: {tmp_path / 'r.json'}",
        ):
            assert line in out
        assert set(FIXED_KEYS) <= set(result(tmp_path / "r.json"))
        hashes.append(result(tmp_path / "r.json")["output"]["sha256"])
    assert hashes[0] == hashes[1]


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A block device made from a file."""
    if os.geteuid() != 0:
        pytest.skip("needs root for losetup")
    with (tmp_path / "disk.img").open("wb") as file:
        file.truncate(48 << 20)
    made = subprocess.run(
        ["losetup", "-f", "--show", tmp_path / "disk.img"], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"losetup is not possible here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=False)


@pytest.mark.root
def test_pack_verify_and_the_guides_command_on_a_block_device(
    home: Path, tmp_path: Path, loop_device: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    (home / "prompts.txt").write_text("once upon a time there was a drive\n")
    manifest = tmp_path / "d.json"
    pack = ["pack", "--checkpoints", home / "hf", "--to", loop_device, "--manifest", manifest]
    code, _, err = run(*pack)
    assert code == 2
    assert "--yes" in sentence(err)
    assert run(*pack, "--yes")[0] == 0
    code, out, _ = run("verify", "--manifest", manifest)
    assert code == 0
    assert "13 of 13 groups sound" in out
    code, out, _ = run(*guide(home, loop_device, manifest, tmp_path / "r.json"))
    assert code == 0
    settings = ["--gpu-cached-layers", 1, "--cpu-cache-layers", 2, "--prefetch-distance", 1]
    code, out, _ = run(*guide(home, loop_device, manifest, tmp_path / "r.json"), *settings)
    assert code == 0
    assert f"use_raw_ssd=True raw_device={loop_device}" in out
    assert result(tmp_path / "r.json")["phases"]["decode"]["bytes"]["ssd_read"] > 0


def test_every_mode_and_meta_shards_print_the_same_hash(
    home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    hashes = set()
    for directory in ("hf", "meta"):
        for mode in ("full", "preload", "stream", "mixed"):
            flags = ["--checkpoints", home / directory, "--mode", mode, "--prompt-len", 20, "--cache-dir", tmp_path]
            assert run(*flags, *SMALL, *PLACES, "--out-json", tmp_path / "r.json")[0] == 0
            hashes.add(result(tmp_path / "r.json")["output"]["sha256"])
    assert len(hashes) == 1


def damage(home: Path, name: str) -> list[object]:
    """Arguments of a run on a copy of the model with one thing wrong."""
    source = "meta" if name in ("truncated shard", "no dim") else "hf"
    copy = home / name.replace(" ", "-")
    shutil.copytree(home / source, copy)
    if name == "architecture":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "architectures": ["MistralForCausalLM"]}))
    elif name == "corrupt safetensors":
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
    elif name == "truncated shard":
        shard = copy / "consolidated.01.pth"
        shard.write_bytes(shard.read_bytes()[:-20000])
    elif name == "no dim":
        params = json.loads((copy / "params.json").read_text())
        params.pop("dim")
        (copy / "params.json").write_text(json.dumps(params))
    elif name == "tokenizer":
        hf_tokenizer(copy, size=600)
    else:
        tensors = load_file(copy / "model.safetensors")
        if name == "extra tensor":
            tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(24)
        else:
            tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], float("nan"))
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return ["--checkpoints", copy, "--mode", "full", "--prompt", "hello"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("architecture", "MistralForCausalLM"),
        ("corrupt safetensors", "model.safetensors"),
        ("truncated shard", "consolidated.01.pth"),
        ("no dim", "dim"),
        ("tokenizer", "600"),
        ("extra tensor", "q_norm"),
        ("nan", "not finite"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_exit_2_and_one_sentence(
    name: str, said: str, home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run(*damage(home, name), *SMALL, "--out-json", tmp_path / "r.json")
    assert code == 2
    assert said in sentence(err)
    assert not (tmp_path / "r.json").exists()


def on_store(home: Path, store: Path, *more: object) -> list[object]:
    named = ["--raw-device", store, "--manifest", home / "s.json"]
    return ["--checkpoints", home / "hf", *named, "--prompt-len", 8, *SMALL, *PLACES, *more]


@pytest.mark.parametrize("harm", ["flipped byte", "cut short", "another store", "overwritten"])
def test_a_store_that_is_not_what_was_packed_is_exit_4(
    harm: str, home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    store = tmp_path / "h.wsm"
    data = bytearray((home / "s.wsm").read_bytes())
    if harm == "another store":
        flags = ["--checkpoints", home / "hf", "--to", store, "--manifest", tmp_path / "other.json"]
        assert run("pack", *flags)[0] == 0
    else:
        if harm == "flipped byte":
            data[len(data) // 2] ^= 1
        elif harm == "overwritten":
            data[:8192] = os.urandom(8192)
        store.write_bytes(data[: len(data) // 2] if harm == "cut short" else data)
    code, _, err = run(*on_store(home, store, "--out-json", tmp_path / "r.json"))
    assert code == 4
    assert str(store) in sentence(err)
    assert run("verify", "--manifest", home / "s.json", "--raw-device", store)[0] == 4


def test_a_store_of_other_weights_of_the_same_shape_is_exit_4(
    home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(home / "hf", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    named = ["--raw-device", home / "s.wsm", "--manifest", home / "s.json", "--prompt-len", 8, *SMALL, *PLACES]
    code, _, err = run("--checkpoints", other, *named, "--out-json", tmp_path / "r.json")
    assert code == 4
    assert "checkpoint" in sentence(err)


def test_a_checkpoint_changed_after_it_was_packed_into_the_cache_is_packed_anew(
    home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(home / "hf", model)
    flags = ["--checkpoints", model, "--prompt-len", 20, *SMALL, *PLACES, "--cache-dir", tmp_path / "c"]
    hashes = []
    for scale in (1.0, 1.5):
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.3.mlp.up_proj.weight"] *= scale
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        for mode in ("mixed", "full"):
            assert run(*flags, "--mode", mode, "--out-json", tmp_path / "r.json")[0] == 0
            hashes.append(result(tmp_path / "r.json")["output"]["sha256"])
    assert hashes[0] == hashes[1]
    assert hashes[2] == hashes[3]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--checkpoints", "/nonexistent"], 2, "/nonexistent"),
        (["--prompts", "/nonexistent.txt"], 2, "no such file"),
        (["--max-new-tokens", "64", "--max-seq-len", "64"], 2, "--max-seq-len"),
        (["--out-json", "/nonexistent/r.json"], 2, "/nonexistent/r.json"),
        (["--out-json", "/dev/null"], 2, "no regular file"),
        (["--seed", "99999999999999999999999999"], 2, "--seed"),
        (["--gpu-mem-gb", "1e300"], 2, "--gpu-mem-gb"),
        (["--synthetic", "Llama-9"], 2, "Llama-9"),
        (["--raw-device", "/dev/nvme9n9"], 2, "--manifest"),
        (["verify", "--manifest", "/nonexistent.json"], 2, "/nonexistent.json"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(
    argv: list[str], code: int, said: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    got, _, err = run(*argv)
    assert got == code
    assert said in sentence(err)


def test_a_variable_that_cannot_be_used_is_exit_2(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv("WSM_GPU_MAX_GROUPS", "zero")
    code, _, err = run()
    assert code == 2
    assert "WSM_GPU_MAX_GROUPS=zero" in sentence(err)


def test_a_run_that_does_not_fit_is_exit_3_and_its_advice_fits(
    home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    flags = [
        "--prompt-len",
        8,
        *SMALL,
        "--gpu-mem-gb",
        0.009,
        "--cache-dir",
        tmp_path,
        "--out-json",
        tmp_path / "r.json",
    ]
    code, _, err = run(*flags)
    assert code == 3
    advice = err.splitlines()[0].split("it fits with ")[1].split()
    assert not (tmp_path / "r.json").exists()
    assert run(*flags, *advice)[0] == 0


def test_pack_never_writes_over_what_it_reads_or_over_a_file_that_is_no_manifest(
    home: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(home / "hf", model)
    os.link(model / "model.safetensors", tmp_path / "link.st")
    (tmp_path / "thesis.txt").write_text("precious")
    before = {path: path.read_bytes() for path in [*model.iterdir(), tmp_path / "thesis.txt"]}
    for target, manifest in (
        (tmp_path / "n.wsm", model / "config.json"),
        (model / "tokenizer.json", tmp_path / "n.json"),
        (tmp_path / "link.st", tmp_path / "n.json"),
        (tmp_path / "n.wsm", tmp_path / "thesis.txt"),
    ):
        code, _, err = run("pack", "--checkpoints", model, "--to", target, "--manifest", manifest, "--yes")
        assert code == 2, (target, manifest)
        sentence(err)
    assert before == {path: path.read_bytes() for path in before}


def interrupted(argv: list[str], after_s: float, until: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """The script, hit by Ctrl-C ``after_s`` after ``until`` is true."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not until() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def test_ctrl_c_in_a_pack_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "big.wsm"
    argv = ["pack", "--synthetic", "Llama-3.2-1B:layers=8", "--to", str(target), "--manifest", str(tmp_path / "m.json")]
    ended = interrupted(argv, 0.2, target.exists)
    assert ended.returncode == 130
    sentence(ended.stderr)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_run_saves_the_repeats_that_were_finished(home: Path, tmp_path: Path) -> None:
    argv = ["--checkpoints", f"{home}/hf", "--mode", "stream", "--prompt-len", "8", *SMALL, "--repeats", "100000"]
    argv.append("--quiet")  # a busy machine takes so long that progress is told
    mark = tmp_path / "r.json"
    for after_s in (12.0, 40.0, 90.0):  # on a busy machine the first round ends late
        ended = interrupted([*argv, "--out-json", str(mark), "--cache-dir", str(tmp_path / "c")], after_s, lambda: True)
        assert ended.returncode == 130
        sentence(ended.stderr)
        if mark.exists():
            break
    assert result(mark)["interrupted"] is True
    assert 0 < result(mark)["repeats"]["n"] < 100000


def test_chat_renders_the_checkpoint_s_own_template(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    hf_tokenizer(hf_directory(tmp_path / "m", hf_model(num_hidden_layers=2)))
    given = ["--checkpoints", tmp_path / "m", "--mode", "full", "--prompt", "ab", *SMALL, "--out-json", tmp_path / "o"]
    code, _, err = run(*given, "--chat")
    assert code == 2
    assert "base models and the built-in one have none" in sentence(err)
    template = "{{ bos_token }}[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    assert run(*given, "--chat")[0] == 0
    found = json.loads((tmp_path / "o").read_text())
    assert found["prompt_lens"] == [6]  # <s> once, four characters, and where the answer begins
    assert found["special_tokens"] == {"before": [], "after": []}
    assert found["config"]["resolved"]["chat"] is True
    assert run(*given)[0] == 0
    assert json.loads((tmp_path / "o").read_text())["prompt_lens"] == [2]


def test_chat_needs_messages_and_a_model_that_was_trained(run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run("--chat", "--prompt-len", "4")
    assert (code, "random ids are no message" in sentence(err)) == (2, True)
    code, _, err = run("--chat", "--synthetic", "Llama-3.2-1B:layers=1", "--prompt", "a", *SMALL)
    assert (code, "random weights have none" in sentence(err)) == (2, True)
