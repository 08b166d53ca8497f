"""Quantising that looks at the inputs, and what a weight format costs: against transformers, by plain formulas."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from bench_infer import command_line as main
from llama import LLaMA
from llama.calibration import Calibration
from tests.tiny import hf_directory, hf_model, hf_tokenizer
from wsm import stop
from wsm.errors import UnusableInput
from wsm.layout.groups import pass_order

WINDOW, WINDOWS = 64, 6
INPUTS = {"q_proj": "wq", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bfloat16, and texts beside it."""
    directory = hf_directory(tmp_path_factory.mktemp("models") / "tiny", hf_model(), dtype=torch.bfloat16)
    for name in ("text.txt", "other.txt"):
        words = [f"{name[:2]}{number * number} the cat {number}" for number in range(120)]
        (directory.parent / name).write_text("\n".join(words))
    return hf_tokenizer(directory)


def moments_of(model: LlamaForCausalLM, rows: Tensor) -> dict[str, Tensor]:
    """By transformers: ``L0.attn wq`` and so on, float64 ``[cols, cols]``."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].flatten(0, 1).double()
            found[name] = x.t() @ x / len(x)

        return see

    hooks = []
    for number, layer in enumerate(model.model.layers):
        for theirs, ours in INPUTS.items():
            part = layer.self_attn if ours in ("wq", "wv", "wo") else layer.mlp
            kind = "attn" if ours in ("wq", "wv", "wo") else "ffn"
            hooks.append(getattr(part, theirs).register_forward_hook(hook(f"L{number}.{kind} {ours}")))
    with torch.inference_mode():
        model(rows)
    for one in hooks:
        one.remove()
    return found


@pytest.mark.parametrize("mode", ["full", "mixed"])
@pytest.mark.parametrize("feedback", [True, False])
def test_the_moments_are_those_that_transformers_sees(feedback: bool, mode: str, home: Path) -> None:
    rows = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(3))
    wanted = moments_of(LlamaForCausalLM.from_pretrained(home, dtype=torch.float32), rows)
    settings = {"dtype": "float32", "gpu_cached_layers": 0, "cpu_cache_layers": 1, "cache_dir": str(home.parent / "c")}
    with (
        LLaMA.build(home, mode, settings, device="cpu", max_seq_len=24, max_batch_size=2) as llm,
        Calibration(llm, rows.tolist(), feedback=feedback) as calibration,
    ):
        for group in pass_order(llm.config.n_layers):
            for name, moments in calibration.moments(group).items():
                if f"{group} {name}" in wanted:
                    theirs = wanted.pop(f"{group} {name}")
                    wide = theirs if feedback else theirs.diagonal()
                    torch.testing.assert_close(moments.double(), wide, rtol=1e-4, atol=1e-5)
    assert not wanted


def test_moments_are_asked_for_in_pass_order_and_an_early_end_leaves_no_thread(home: Path) -> None:
    with LLaMA.build(home, "full", {}, device="cpu", max_seq_len=24, max_batch_size=1) as llm:
        first, second, *_ = pass_order(llm.config.n_layers)
        with Calibration(llm, [[1, 2, 3]], feedback=False) as calibration:
            calibration.moments(first)
        with Calibration(llm, [[1, 2, 3]], feedback=False) as calibration, pytest.raises(ValueError, match="come next"):
            calibration.moments(second)
        with (
            Calibration(llm, [[10**6]], feedback=False) as calibration,
            pytest.raises(UnusableInput, match="token ids"),
        ):
            calibration.moments(first)
        assert len(llm.generate([[1, 2, 3]], max_new_tokens=2, temperature=0).tokens[0]) == 2


def test_a_wish_to_stop_ends_a_prefill_that_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLaMA.build(home, "full", {}, device="cpu", max_seq_len=24, max_batch_size=1) as llm:
        first, *_ = pass_order(llm.config.n_layers)
        calibration = Calibration(llm, [[1, 2, 3]], feedback=True)

        def endless(*_: object, **__: object) -> None:
            while True:
                calibration.saw(first, ("wq",), torch.ones(1, 4))

        monkeypatch.setattr(llm, "generate", endless)
        stop.ask(2)
        with pytest.raises(stop.Stopped), calibration:
            calibration.moments(first)
    assert "wsm-calibrate" not in {thread.name for thread in threading.enumerate()}


def packed(home: Path, folder: Path, *more: str) -> Path:
    manifest = folder / "s.json"
    places = ["--to", str(folder / "s.wsm"), "--manifest", str(manifest), "--cache-dir", str(folder / "c")]
    assert main(["pack", "--checkpoints", str(home), "--weight-format", "int4-g32", *places, "--yes", *more]) == 0
    return manifest


def quality_of(home: Path, folder: Path, manifest: Path) -> dict[str, Any]:
    out = folder / "quality.json"
    text = ["--text", str(home.parent / "text.txt"), "--window", str(WINDOW), "--windows", str(WINDOWS)]
    places = ["--manifest", str(manifest), "--cache-dir", str(folder / "c"), "--out-json", str(out)]
    assert main(["quality", "--checkpoints", str(home), *places, *text, *CPU, "--batch-size", "2"]) == 0
    return dict(json.loads(out.read_text()))


def test_a_calibrated_store_says_so_runs_alike_in_all_modes_and_errs_less(home: Path, tmp_path: Path) -> None:
    calibrate = ["--calibrate", str(home.parent / "other.txt"), "--window", str(WINDOW), *CPU]
    (tmp_path / "plain").mkdir()
    plain = packed(home, tmp_path / "plain")
    manifest = packed(home, tmp_path, *calibrate)
    told = json.loads(manifest.read_text())["calibration"]
    assert (told["window"], told["error_feedback"]) == (WINDOW, True)
    assert told["tokens"] % WINDOW == 0
    hashes = set()
    for mode in ("mixed", "stream", "preload"):
        out = tmp_path / f"{mode}.json"
        run = ["--checkpoints", str(home), "--manifest", str(manifest), "--mode", mode, "--prompt-len", "9", *CPU]
        assert main([*run, "--max-new-tokens", "5", "--temperature", "0", "--no-probe", "--out-json", str(out)]) == 0
        hashes.add(json.loads(out.read_text())["output"]["sha256"])
    assert len(hashes) == 1
    assert (
        quality_of(home, tmp_path, manifest)["kl"]["value"] < quality_of(home, tmp_path / "plain", plain)["kl"]["value"]
    )


def test_what_quantising_takes_is_allowed_beside_the_plan(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[int] = []
    monkeypatch.setattr("llama.llm.limit_device_memory", noting(allowed))
    packed(home, tmp_path, "--calibrate", str(home.parent / "other.txt"), "--gpu-mem-gb", "1", *CPU)
    config = json.loads((home / "config.json").read_text())
    moments = 4 * config["intermediate_size"] ** 2
    assert 2**30 + 3 * moments < allowed[0] < 2**30 + 3 * moments + 2**23


def noting(allowed: list[int]) -> Callable[[object, int, int], Callable[[], None]]:
    def limit(device: object, nbytes: int, context: int) -> Callable[[], None]:
        allowed.append(nbytes)
        return lambda: None

    return limit


def test_both_models_of_quality_and_their_logits_are_allowed_what_was_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[int] = []
    monkeypatch.setattr("llama.llm.limit_device_memory", noting(allowed))
    text = ["--text", str(home.parent / "text.txt"), "--window", str(WINDOW), "--windows", "1", "--mode", "full"]
    assert main(["quality", "--checkpoints", str(home), *text, *CPU, "--gpu-mem-gb", "1"]) == 0
    logits = 4 * 512 * (2 * WINDOW + 3 * 128)  # of the CPU's memory here
    assert allowed == [pytest.approx(2**30 + logits, abs=2**20)] * 2


def test_quality_is_that_of_plain_formulas(home: Path, tmp_path: Path) -> None:
    manifest = packed(home, tmp_path)
    found = quality_of(home, tmp_path, manifest)
    shapes: dict[str, Any] = {"device": "cpu", "max_seq_len": WINDOW + 1, "max_batch_size": WINDOWS}
    with LLaMA.build(home, "full", {}, **shapes) as llm:
        ids = llm.tokenizer.encode((home.parent / "text.txt").read_text())
        prefix = list(llm.tokenizer.prefix)
        length = WINDOW - len(prefix)
        rows = [[*prefix, *ids[n * length : (n + 1) * length]] for n in range(WINDOWS)]
        reference = llm.logits(rows)[:, :-1].double()
    with LLaMA.build(home, "stream", {"manifest": str(manifest)}, **shapes) as llm:
        ours = llm.logits(rows)[:, :-1].double()
    p, q = F.log_softmax(reference, -1), F.log_softmax(ours, -1)
    following = torch.tensor(rows)[:, 1:]
    nll = -q.gather(-1, following.unsqueeze(-1)).mean()
    assert found["predicted_tokens"] == following.numel()
    assert found["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-3)
    assert found["kl"]["value"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert found["equal_argmax_pct"]["value"] == pytest.approx(
        100 * float((reference.argmax(-1) == ours.argmax(-1)).double().mean()), abs=0.5
    )


def test_a_model_is_no_distance_from_itself(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(home.parent / "text.txt"), "--window", str(WINDOW), "--windows", "2", "-o", "json"]
    assert main(["quality", "--checkpoints", str(home), *text, *CPU, "--cache-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"]["value"] == 0
    assert found["equal_argmax_pct"]["value"] == 100
    assert found["perplexity"] == found["reference_perplexity"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quality", "--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["quality", "--text", "{text}", "--out-json", "/nowhere/q.json"], "cannot be written: its directory"),
        (["quality", "--text", "{text}", "--out-json", "{text}"], "is read by this run"),
        (["quality", "--text", "{text}", "--window", "100000"], "fewer than a window of 100000"),
        (
            ["pack", "--calibrate", "{text}", "--weight-format", "exact"],
            "--calibrate has no use for --weight-format exact",
        ),
        (["pack", "--calibrate", "{text}"], "--calibrate has no use for --weight-format auto"),
        (["pack", "--calibrate", "{text}", "--weight-format", "int4", "--tp", "2"], "--calibrate packs for one rank"),
    ],
)
def test_what_cannot_be_compared_or_calibrated_is_exit_2(
    words: list[str], said: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [word.format(text=home.parent / "text.txt") for word in words]
    places = ["--checkpoints", str(home), "--cache-dir", str(tmp_path)]
    if words[0] == "pack":
        places += ["--to", str(tmp_path / "s.wsm"), "--manifest", str(tmp_path / "s.json"), "--yes"]
    assert main([*argv, *places]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()
