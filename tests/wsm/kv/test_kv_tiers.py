"""KV below the device: the same tokens whatever lies where, each byte moved once, nothing used before it is there."""

from __future__ import annotations

import contextlib
import dis
import linecache
import math
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import wsm.kv.tiers
from llama.batch import Segment, TokenBatch, decode_batch, prefill_batch
from llama.checkpoint import open_checkpoint
from llama.generation import GenerationOptions, generate
from llama.inputs import choose_device
from llama.kv import cache as kv_cache
from llama.kv.cache import KVCache, Rows
from llama.kv.format import kv_format
from llama.model import Transformer
from llama.weights import TensorWeights
from tests.async_device import AsyncDevice
from tests.tiny import hf_directory, hf_model
from wsm.engine.device import Device, Link, open_device
from wsm.engine.telemetry import Telemetry
from wsm.errors import StoreError, UnusableInput
from wsm.kv import disk as kv_disk
from wsm.kv import schedule as kv_schedule
from wsm.kv.target import kv_superblock
from wsm.kv.tiers import KVTiers
from wsm.layout import kv as kv_layout
from wsm.layout.groups import BLOCK
from wsm.layout.kv import KVLayout, KVPlacement, Run, Unit
from wsm.plan.kv import kv_cpu_lines
from wsm.plan.memory import total
from wsm.settings import Settings

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(0, 256, (n,), generator=GENERATOR).tolist() for n in (300, 5, 40, 260, 1)]
NEW = 8

Where = Callable[[int], bool]
EVERYWHERE: Where = lambda place: True  # noqa: E731
EVERY_OTHER: Where = lambda place: place % 2 == 0  # noqa: E731


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


HOW_COPIED = pytest.mark.parametrize(
    "heads_as_of_long_contexts", [0, kv_layout.COPY_BYTES], indirect=True, ids=["head by head", "whole rows"]
)


@pytest.fixture(autouse=True)
def heads_as_of_long_contexts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A head's tokens are copied by themselves, as where a head has a megabyte."""
    monkeypatch.setattr(kv_layout, "COPY_BYTES", getattr(request, "param", 0))


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    device = choose_device(request.param)
    checkpoint = open_checkpoint(hf_directory(tmp_path_factory.mktemp("m"), hf_model(num_hidden_layers=3)))
    return Transformer(checkpoint.config, TensorWeights(checkpoint, device, torch.float32), device, 2048)


@contextmanager
def cache(
    model: Transformer,
    stretch_rows: int,
    below: Where,
    *,
    rows: int = len(PROMPTS),
    tokens: int = 512,
    topk: int = 0,
    dtype: str = "auto",
    settings: Settings | None = None,
    wanted: Callable[[], int] = lambda: 0,
    disk: Path | None = None,
) -> Iterator[tuple[KVCache, KVTiers]]:
    config, record = model.config, kv_format(dtype, torch.float32, model.config.head_dim)
    layout = KVLayout(config.n_layers, rows, stretch_rows, config.n_kv_heads, tokens, record.record_bytes)
    units = tuple(unit for place, unit in enumerate(layout.units()) if below(place))
    device = open_device(model.device)
    telemetry = Telemetry(device)
    placement = KVPlacement(layout, cpu=units)
    if disk is not None:
        placement = KVPlacement(layout, cpu=units[::3], disk=tuple(u for u in units if u not in units[::3]))
    where = None if disk is None else (str(disk), ())
    with KVTiers(placement, device, settings or Settings(), telemetry, Link(), wanted, where) as tiers:
        how: dict[str, Any] = {"record": record, "stretch_rows": stretch_rows, "tier": tiers, "topk": topk}
        yield KVCache(config, rows, tokens, model.device, torch.float32, **how), tiers


def options(new: int = NEW, chunk: int = 64, wave: int = 5, stop: frozenset[int] = frozenset()) -> GenerationOptions:
    return GenerationOptions(new, 0.0, 1.0, 0, stop, not stop, chunk, wave)


@pytest.fixture(scope="module")
def on_device(model: Transformer) -> list[list[int]]:
    return generate(model, KVCache(model.config, 5, 512, model.device, torch.float32), PROMPTS, options()).tokens


@HOW_COPIED
@pytest.mark.parametrize(
    ("stretch_rows", "below", "chunk", "wave"),
    [
        (1, EVERYWHERE, 64, 5),
        (2, EVERY_OTHER, 3, 5),
        (3, EVERYWHERE, 2048, 3),
        (5, EVERYWHERE, 64, 5),
        (2, EVERYWHERE, 64, 2),
    ],
)
def test_kv_below_the_device_gives_the_tokens_of_kv_on_it(
    stretch_rows: int, below: Where, chunk: int, wave: int, model: Transformer, on_device: list[list[int]]
) -> None:
    """Ragged prompts, one of them of a single token; and again, in the same memory."""
    with cache(model, stretch_rows, below) as (kv, _):
        for _ in range(2):
            assert generate(model, kv, PROMPTS, options(chunk=chunk, wave=wave)).tokens == on_device


@HOW_COPIED
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_logits_are_bit_equal_wherever_kv_lies(dtype: str, model: Transformer) -> None:
    found = []
    for below in (EVERYWHERE, EVERY_OTHER, lambda place: place == 0):
        with cache(model, 2, below, dtype=dtype) as (kv, _):
            batch = prefill_batch(PROMPTS, range(5), model.device)
            logits = model.forward(batch, kv, chunk_tokens=64)
            decoded = model.forward(
                decode_batch(logits.argmax(-1), batch.positions[batch.last] + 1, kv.lengths), kv, chunk_tokens=64
            )
            found.append(torch.cat((logits, decoded)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_generation_that_was_broken_off_leaves_a_sound_cache(model: Transformer, on_device: list[list[int]]) -> None:
    """Ctrl-C between two layers, with a window in use and others on their way."""

    def interrupt(mark: str) -> None:
        if mark == "token":
            raise KeyboardInterrupt

    with cache(model, 2, EVERYWHERE) as (kv, _):
        with pytest.raises(KeyboardInterrupt):
            generate(model, kv, PROMPTS, options(), interrupt)
        assert generate(model, kv, PROMPTS, options()).tokens == on_device


@pytest.mark.parametrize("on_disk", [False, True])
def test_ctrl_c_between_any_two_lines_leaves_a_sound_cache(on_disk: bool, model: Transformer, tmp_path: Path) -> None:
    """Every 41st line that the computation's thread runs in the KV code; what comes after neither waits nor differs."""
    prompts = [PROMPTS[2], PROMPTS[1], PROMPTS[4]]
    short = options(new=4, wave=2)
    expected = generate(model, KVCache(model.config, 3, 256, model.device, torch.float32), prompts, short).tokens
    with cache(model, 2, EVERYWHERE, rows=3, tokens=256, disk=tmp_path / "kv" if on_disk else None) as (kv, _):
        place, interrupted = 3, True
        while interrupted:
            with interrupting(place) as interrupted_now, contextlib.suppress(KeyboardInterrupt):
                generate(model, kv, prompts, short)
            interrupted = bool(interrupted_now)
            assert in_time(lambda: generate(model, kv, prompts, short).tokens) == expected, place
            place += 41
    assert place > 500


KV_CODE = {module.__file__ for module in (kv_cache, wsm.kv.tiers, kv_schedule, kv_disk)}


@contextmanager
def interrupting(line: int) -> Iterator[list[str]]:
    """Ctrl-C before the so-many-th line that this thread runs in the KV code; yields where it came.

    Left out are lines with ``with``, at which the tracer stops on the way out of a block, where no signal is served.
    Left out too are the jumps of loops: since Python 3.12 a tracer's exception at those of a comprehension passes over
    ``__exit__``; one of a signal does not.
    """
    left, came = line, list[str]()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in KV_CODE:
            return None
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        looping = dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("FOR_ITER", "JUMP_BACKWARD")
        if event == "line" and not came and not source.startswith("with ") and not looping:
            left -= 1
            if left == 0:
                came.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield came
    finally:
        sys.settrace(before)


def in_time(work: Callable[[], list[list[int]]]) -> list[list[int]]:
    """What ``work`` gives or raises; a failure, not a hang, where it never comes back."""
    found: Future[list[list[int]]] = Future()

    def call() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return found.result(timeout=60)


@HOW_COPIED
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_prompt_whose_values_overflow_spoils_no_other(
    on_disk: bool, model: Transformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in float16: keys that are not finite lie behind a shorter row's end, where a mask alone does not hide them."""
    # The first row passes 80 % of its room on the way: then it is moved whole.
    prompts = [torch.randint(0, 256, (404,), generator=torch.Generator().manual_seed(4)).tolist(), *PROMPTS[1:]]
    embed, whole = model.embed, KVCache(model.config, 5, 512, model.device, torch.float32)
    expected = generate(model, whole, prompts, options()).tokens

    def overflowing(tokens: torch.Tensor) -> torch.Tensor:
        return embed(tokens) * torch.where(tokens == 298, math.inf, 1.0).unsqueeze(-1)

    monkeypatch.setattr(model, "embed", overflowing)
    with cache(model, 2, EVERYWHERE, disk=tmp_path / "kv" if on_disk else None) as (kv, _):
        for each in (kv, whole):
            with pytest.raises(UnusableInput, match="not finite"):
                generate(model, each, [[298] * 480] * 5, options())
            assert generate(model, each, prompts, options()).tokens == expected


def test_a_unit_that_was_entered_and_never_left_is_given_back(model: Transformer, on_device: list[list[int]]) -> None:
    with cache(model, 2, EVERYWHERE) as (kv, _):
        kv.begin(prefill_batch(PROMPTS, range(5), model.device).segments)
        kv.enter(0, 0)
        assert generate(model, kv, PROMPTS, options()).tokens == on_device


def test_a_decode_pass_brings_what_the_rows_hold_and_writes_one_token_a_row(model: Transformer) -> None:
    with cache(model, 2, EVERYWHERE) as (kv, tiers):
        generate(model, kv, PROMPTS, options(new=3))
        tiers.stop()
        moved = tiers.telemetry.kv()
        layout = tiers.layout
        token = layout.n_kv_heads * layout.token_bytes
        assert sum(t.nbytes for t in moved if t.tier == "kv_d2h" and t.pass_no == 0) == 3 * sum(
            run.nbytes for s in range(3) for run in layout.runs([len(PROMPTS[row]) for row in layout.rows_of(s)])
        )
        assert [sum(t.nbytes for t in moved if t.tier == "kv_d2h" and t.pass_no == p) for p in (1, 2)] == [
            15 * token
        ] * 2
        assert sum(t.nbytes for t in moved if t.tier == "kv_h2d" and t.pass_no == 0) == 0
        for number in (1, 2):
            lengths = [len(prompt) + number - 1 for prompt in PROMPTS]
            assert sum(t.nbytes for t in moved if t.tier == "kv_h2d" and t.pass_no == number) == 3 * sum(
                run.nbytes for s in range(3) for run in layout.runs([lengths[row] for row in layout.rows_of(s)])
            )
        writes = [t for t in moved if t.tier == "kv_d2h" and t.pass_no == 1]
        assert len(writes) == len(layout.units())  # one copy a layer and stretch
        assert tiers.fraction_fetched == 1.0


def test_rows_that_have_ended_stop_costing_traffic(model: Transformer, on_device: list[list[int]]) -> None:
    stops = frozenset({on_device[0][1], on_device[3][1]})  # the two long rows end early

    def traffic(stop: frozenset[int]) -> int:
        with cache(model, 1, EVERYWHERE) as (kv, tiers):
            tokens = generate(model, kv, PROMPTS, options(stop=stop)).tokens
            assert all(row == full[: len(row)] for row, full in zip(tokens, on_device, strict=True))
            tiers.stop()
            last = max(t.pass_no for t in tiers.telemetry.kv())
            return sum(t.nbytes for t in tiers.telemetry.kv() if t.tier == "kv_h2d" and t.pass_no == last)

    free, ended = traffic(frozenset({-1})), traffic(stops)
    assert ended < free / 4


# -- on a device of its own


@HOW_COPIED
@pytest.mark.parametrize("stretch_rows", [1, 2, 5])
def test_kv_on_a_disk_gives_the_tokens_of_kv_on_the_device(
    stretch_rows: int, model: Transformer, on_device: list[list[int]], tmp_path: Path
) -> None:
    """Row 3 fills its block of 256 on the way: 260 tokens lie in two blocks, row 0's 300 too; then again."""
    prompts = [*PROMPTS[:3], PROMPTS[3][:253], *PROMPTS[4:]]
    whole = KVCache(model.config, 5, 512, model.device, torch.float32)
    expected = generate(model, whole, prompts, options()).tokens
    with cache(model, stretch_rows, EVERYWHERE, disk=tmp_path / "kv") as (kv, tiers):
        assert generate(model, kv, PROMPTS, options()).tokens == on_device
        assert generate(model, kv, prompts, options()).tokens == expected
        assert generate(model, kv, PROMPTS, options(wave=stretch_rows)).tokens == on_device
        tiers.stop()
        moved = tiers.telemetry.kv()
        assert {t.tier for t in moved} == {"kv_h2d", "kv_d2h", "kv_read", "kv_write"}
    assert not (tmp_path / "kv").exists()


def test_a_broken_off_generation_leaves_a_sound_disk(
    model: Transformer, on_device: list[list[int]], tmp_path: Path
) -> None:
    def interrupt(mark: str) -> None:
        if mark == "token":
            raise KeyboardInterrupt

    with cache(model, 1, EVERYWHERE, disk=tmp_path / "kv") as (kv, _):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                generate(model, kv, PROMPTS, options(), interrupt)
            assert generate(model, kv, PROMPTS, options()).tokens == on_device


def test_a_read_that_fails_when_nobody_wants_it_any_more_is_no_failure(
    model: Transformer, on_device: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, pending, tokens = threading.Event(), list[Future[None]](), list[str]()

    def interrupt(mark: str) -> None:
        tokens.extend([mark] * (mark == "token"))
        if len(tokens) == 2:
            assert asked.wait(20)
            raise KeyboardInterrupt

    with cache(model, 1, EVERYWHERE, disk=tmp_path / "kv") as (kv, tiers):
        assert tiers.disk is not None

        def read(fetch: kv_schedule.Fetch, at_once: Callable[[kv_schedule.Fetch], Future[None]]) -> Future[None]:
            if fetch.pass_no < 2 or len(tokens) > 2:
                return at_once(fetch)
            pending.append(Future())
            asked.set()
            return pending[-1]

        monkeypatch.setattr(tiers.disk, "read", partial(read, at_once=tiers.disk.read))
        with pytest.raises(KeyboardInterrupt):
            generate(model, kv, PROMPTS, options(), interrupt)
        tiers.schedule.reset()
        tokens.append("the end of the first generation")
        for each in pending:
            each.set_exception(StoreError("the drive is gone"))
        assert generate(model, kv, PROMPTS, options()).tokens == on_device
    assert pending


@pytest.mark.parametrize("on_disk", [False, True])
def test_chosen_blocks_of_a_row_that_has_ended_are_not_moved(on_disk: bool, model: Transformer, tmp_path: Path) -> None:
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1000, 1010)]

    def last_pass(stop: frozenset[int]) -> tuple[list[list[int]], int]:
        disk = tmp_path / "kv" if on_disk else None
        with cache(model, 2, EVERYWHERE, rows=2, tokens=1280, topk=2, disk=disk) as (kv, tiers):
            tokens = generate(model, kv, prompts, options(stop=stop)).tokens
            last = tiers.schedule.passes - 1
            tiers.stop()
            moved = [t for t in tiers.telemetry.kv() if t.tier == "kv_h2d" and t.pass_no == last]
            return tokens, sum(t.nbytes for t in moved)

    full, both = last_pass(frozenset({-1}))
    ended, one = last_pass(frozenset({full[0][1]}))
    assert (len(ended[0]), ended[1]) == (2, full[1])
    assert one == both / 2


@pytest.mark.parametrize(("tokens", "fraction"), [(508, 1.0), (509, 1.0), (513, 2 / 3)])
def test_only_blocks_of_passes_that_were_made_are_counted(tokens: int, fraction: float, model: Transformer) -> None:
    """Two blocks a step: three passes from 509 tokens on attend two blocks, a fourth would have had three."""
    with cache(model, 1, EVERYWHERE, rows=1, tokens=768, topk=2) as (kv, tiers):
        generate(model, kv, [[7] * tokens], options(4))
        tiers.stop()
        assert tiers.fraction_fetched == pytest.approx(fraction)


def test_a_pass_of_fewer_rows_than_the_one_before_is_another_kind_of_pass(model: Transformer) -> None:
    """One row decodes on by itself; the other's KV stays as it is."""
    prompts = [PROMPTS[2], PROMPTS[3]]

    @torch.inference_mode()
    def logits(kv: KVCache) -> list[Tensor]:
        batch = prefill_batch(prompts, range(2), model.device)
        found = [model.forward(batch, kv, chunk_tokens=64)]
        positions = batch.positions[batch.last] + 1
        found.append(model.forward(decode_batch(found[0].argmax(-1), positions, kv.lengths), kv, chunk_tokens=64))
        for step in range(1, 3):
            token = found[-1].argmax(-1)[-1:]
            alone = (Segment(1, kv.lengths[1], 1, 0),)
            one = TokenBatch(token, positions[-1:] + step, torch.arange(1, device=model.device), alone)
            found.append(model.forward(one, kv, chunk_tokens=64))
        return found

    expected = logits(KVCache(model.config, 2, 512, model.device, torch.float32))
    with cache(model, 2, EVERYWHERE, rows=2) as (kv, _):
        assert all(map(torch.equal, logits(kv), expected))


def test_chosen_blocks_from_a_disk_are_those_from_memory(model: Transformer, tmp_path: Path) -> None:
    """Two ragged rows of 6 and 4 blocks, 3 a step; the longer one begins a block on the way."""
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1530, 1000)]
    found = []
    for disk in (None, tmp_path / "kv"):
        with cache(model, 2, EVERYWHERE, rows=2, tokens=1792, topk=3, disk=disk) as (kv, tiers):
            tokens = generate(model, kv, prompts, options(10, 2048)).tokens
            found.append((tokens, tiers.fraction_fetched))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]


def test_an_error_of_the_disk_is_no_wrong_token(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cache(model, 2, EVERYWHERE, disk=tmp_path / "kv") as (kv, tiers):
        assert tiers._disk is not None

        def broken(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(tiers._disk.device, "_pread", broken)
        with pytest.raises(StoreError, match="in offloaded KV: read error: Input/output error; check the drive"):
            generate(model, kv, PROMPTS, options())


def test_what_others_left_on_a_device_is_never_read(model: Transformer, tmp_path: Path) -> None:
    """A file of a killed run, full of NaN; the row fills its fourth block of five on the way, the fifth is empty."""
    prompt = [torch.randint(0, 256, (1020,), generator=torch.Generator().manual_seed(3)).tolist()]
    whole = KVCache(model.config, 1, 1280, model.device, torch.float32)
    expected = generate(model, whole, prompt, options()).tokens
    left = tmp_path / "kv"
    left.write_bytes(kv_superblock(b"a run that died.") + b"\xff" * (4 << 20))
    with cache(model, 1, EVERYWHERE, rows=1, tokens=1280, disk=left) as (kv, _):
        assert generate(model, kv, prompt, options()).tokens == expected


# -- what is chosen


class ByMask(Transformer):
    """Decode over all KV on the device, all but the chosen blocks masked: the same sums by another road.

    The blocks are chosen here anew, from the whole keys: :mod:`llama.kv.select` has a reference of its own.
    """

    k = 2

    def __init__(self, of: Transformer) -> None:
        super().__init__(of.config, of.weights, of.device, of.max_tokens)
        self.queries: dict[int, Tensor] = {}
        self.chosen: list[set[int]] = []
        self._layer = 0

    def _attend_segments(self, q: Tensor, new: Tensor, part, chunk, kv: KVCache, layer: int, window: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        last = q[-1:].clone()
        out = super()._attend_segments(q, new, part, chunk, kv, layer, window)
        self.queries[layer] = last
        return out

    def _attend_rows(self, q: Tensor, rows: Rows, kv: KVCache, window: Tensor) -> Tensor:
        layer = self._layer = (self._layer + 1) % self.config.n_layers if self.queries_seen else 0
        self.queries_seen = True
        before = self.queries[layer]
        keys, _ = kv.record.read(window, rows.tokens)
        position = int(rows.positions[0])
        newest = position // 256
        grouped = before[0].unflatten(0, (self.config.n_kv_heads, -1))
        mask = torch.full((1, self.config.n_kv_heads, 1, rows.tokens), -torch.inf, device=self.device)
        for head in range(self.config.n_kv_heads):
            blocks = keys[0, head, : newest * 256].unflatten(0, (newest, 256))
            low, high = blocks.amin(1), blocks.amax(1)
            bound = torch.maximum(grouped[head][:, None] * low, grouped[head][:, None] * high).sum(-1).sum(0)
            middle = sorted(range(1, newest), key=lambda block: -float(bound[block]))[: self.k - 2]
            kept = {0, newest, *middle}
            self.chosen.append(kept)
            for block in kept:
                mask[0, head, 0, block * 256 : (block + 1) * 256] = 0
        mask[..., position + 1 :] = -torch.inf
        self.queries[layer] = q.clone()
        return super()._attend_rows(q, rows._replace(mask=mask), kv, window)

    queries_seen = False


@pytest.mark.parametrize("k", [2, 4])
def test_a_step_attends_over_the_first_the_newest_and_the_best_blocks(k: int, model: Transformer) -> None:
    """1 530 tokens and 12 new ones: 6 blocks, then 7, one row; the newest block is begun on the way."""
    prompt = [torch.randint(0, 256, (1530,), generator=torch.Generator().manual_seed(1)).tolist()]
    by_mask = ByMask(model)
    by_mask.k = k
    expected = generate(
        by_mask, KVCache(model.config, 1, 1792, model.device, torch.float32), prompt, options(12, 2048)
    ).tokens
    with cache(model, 1, EVERYWHERE, rows=1, tokens=1792, topk=k) as (kv, tiers):
        found = generate(model, kv, prompt, options(12, 2048)).tokens
        fraction = tiers.fraction_fetched
    assert found == expected
    assert len({frozenset(kept) for kept in by_mask.chosen}) > (
        1 if k == 2 else 3
    )  # a real choice, not always the same
    assert fraction is not None
    assert k / 7 - 0.02 <= fraction <= k / 6 + 0.02


def test_8_blocks_are_exact_at_2048_tokens_and_a_quarter_of_the_traffic_at_8192(model: Transformer) -> None:
    wide = Transformer(model.config, model.weights, model.device, 8192)
    for length, share in ((2040, 1.0), (8100, 0.25)):
        prompt = [torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(2)).tolist()]
        tokens = -(-(length + 4) // 256) * 256
        whole = {}
        for topk in (8, 0):
            with cache(wide, 1, EVERYWHERE, rows=1, tokens=tokens, topk=topk) as (kv, tiers):
                found = generate(wide, kv, prompt, options(4, 2048)).tokens
                assert tiers.fraction_fetched == pytest.approx(share if topk else 1.0)
                tiers.stop()
                moves = [t for t in tiers.telemetry.kv() if t.tier == "kv_h2d" and t.pass_no == 2]
                whole[topk] = (found, sum(t.nbytes for t in moves))
        assert whole[8][1] == pytest.approx(share * whole[0][1], rel=0.01)
        if share == 1.0:
            assert whole[8] == whole[0]


@pytest.mark.parametrize(("lengths", "chunk"), [((3, 900), 2), ((1, 1, 1, 900), 4)])
def test_a_chunk_that_ends_one_token_into_a_row_chooses_for_that_row(
    lengths: tuple[int, ...], chunk: int, model: Transformer
) -> None:
    """The row's first token is computed with rows of one token, the rest of it by itself."""
    prompts = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    rows, found = len(lengths), []
    for size in (chunk, 2048):
        with cache(model, rows, EVERYWHERE, rows=rows, tokens=1024, topk=2) as (kv, _):
            found.append(generate(model, kv, prompts, options(4, size, rows)).tokens)
    assert found[0] == found[1]


# -- order


@given(
    layers=st.integers(1, 4),
    rows=st.integers(1, 5),
    stretch_rows=st.integers(1, 3),
    below=st.integers(1, 255),
    passes=st.integers(1, 5),
    on_disk=st.booleans(),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=30, deadline=None)
def test_nothing_is_read_before_it_is_there_nor_overwritten_while_it_is_read(
    layers: int, rows: int, stretch_rows: int, below: int, passes: int, on_disk: bool, seed: int
) -> None:
    """On a device whose copies and computations run late: each decode step finds all that was written before."""
    layout = KVLayout(layers, rows, min(rows, stretch_rows), 2, 512, 8)
    units = tuple(unit for place, unit in enumerate(layout.units()) if below >> (place % 8) & 1)
    if not units:
        return
    device = AsyncDevice(seed)
    wrong: list[str] = []
    lengths = [1 + (3 * row) % 5 + 250 * (row % 2) for row in range(rows)]
    placement = KVPlacement(layout, disk=units) if on_disk else KVPlacement(layout, cpu=units)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            KVTiers(
                placement,
                device,
                Settings(),
                Telemetry(device),
                Link(),
                lambda: 0,
                (f"{folder}/kv", ()) if on_disk else None,
            ) as tiers,
        ):
            for number in range(passes):
                before = [0] * rows if number == 0 else [length + number - 1 for length in lengths]
                after = [length + number for length in lengths]
                tiers.schedule.begin(range(layout.stretches), before, after, 0)
                for unit in (unit for unit in layout.units() if tiers.holds(*unit)):
                    window, _ = tiers.enter(*unit)
                    _step(device, tiers, unit, window, before, after, number, wrong)
            device.synchronize()
    finally:
        device.end()
    assert not wrong


def _step(
    device: AsyncDevice,
    tiers: KVTiers,
    unit: Unit,
    window: Tensor,
    before: Sequence[int],
    after: Sequence[int],
    number: int,
    wrong: list[str],
) -> None:
    """Check what earlier passes have put into a window, and put this one's tokens there."""
    rows = list(tiers.layout.rows_of(unit.stretch))
    fresh = torch.empty(len(rows), 2, 2, 8, dtype=torch.uint8)

    def work() -> None:
        for place, row in enumerate(rows):
            old = window[place, :, : before[row]]
            expected = [_mark(unit, row, position) for position in range(before[row])]
            if [int(value) for value in old[0, :, 0, 0]] != expected or not bool((old == old[:1, :, :1, :1]).all()):
                wrong.append(f"{unit} row {row} pass {number}: {old[0, :, 0, 0].tolist()} != {expected}")
            for position in range(before[row], after[row]):
                window[place, :, position] = _mark(unit, row, position)
            fresh[place] = _mark(unit, row, after[row] - 1)

    device.later(work)
    tiers.leave(*unit, fresh if number else None, None)


def _mark(unit: Unit, row: int, position: int) -> int:
    return (37 * unit.layer + 11 * row + 5 * position + 1) % 251


# -- failures, throttle


def test_a_failure_of_a_thread_reaches_the_model(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    with cache(model, 2, EVERYWHERE) as (kv, tiers):

        def fail(*_: object) -> int:
            raise StoreError("the drive is gone")

        monkeypatch.setattr(tiers, "_write_window", fail)
        with pytest.raises(StoreError, match="the drive is gone"):
            generate(model, kv, PROMPTS, options())


@pytest.mark.parametrize("tokens", [1, NEW])
def test_a_failure_behind_the_last_token_is_told_once_all_is_still(
    tokens: int, model: Transformer, on_device: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: not what the generation has ended with itself."""
    with cache(model, 5, EVERYWHERE) as (kv, tiers):
        write = tiers._write_window

        def fail(which: Any, stream: Any) -> int:
            if which.unit.layer == 2:
                raise StoreError("the drive is gone")
            return write(which, stream)

        monkeypatch.setattr(tiers, "_write_window", fail)
        if tokens == 1:
            assert generate(model, kv, PROMPTS, options(1)).tokens == [row[:1] for row in on_device]
        else:
            with pytest.raises(StoreError, match="the drive is gone"):
                generate(model, kv, PROMPTS, options(tokens))
        tiers.stop()
        with pytest.raises(StoreError, match="the drive is gone") if tokens == 1 else contextlib.nullcontext():
            tiers.raise_unheard()
        tiers.raise_unheard()


@pytest.mark.parametrize(("behind", "threshold", "pauses"), [(8, 8, True), (7, 8, False), (1, 1, True)])
def test_a_write_back_lets_the_weights_go_first_where_many_are_wanted(
    behind: int, threshold: int, pauses: bool, model: Transformer, on_device: list[list[int]]
) -> None:
    settings = Settings(kv_throttle_threshold=threshold, kv_throttle_ms=1.0)
    with cache(model, 5, EVERYWHERE, settings=settings, wanted=lambda: behind) as (kv, tiers):
        assert generate(model, kv, PROMPTS, options()).tokens == on_device
        tiers.stop()
        writes = sum(t.tier == "kv_d2h" for t in tiers.telemetry.kv())
        # What is left to write when it stops is written without a pause.
        assert 0 < tiers.pauses <= writes if pauses else tiers.pauses == 0


def test_closing_gives_the_memory_back_and_joins_the_threads(model: Transformer) -> None:
    with cache(model, 2, EVERYWHERE) as (_, tiers):
        threads = list(tiers.schedule.threads)
        assert tiers.page_locked_bytes > 0
    assert not any(thread.is_alive() for thread in threads)
    tiers.schedule.begin([0], [0] * 5, [1] * 5, 0)
    with pytest.raises(RuntimeError, match="closed"):
        tiers.enter(0, 0)


def test_threads_that_cannot_start_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, before = threading.Thread.start, set(threading.enumerate())

    def refused(thread: threading.Thread) -> None:
        if thread.name == "wsm-kv-read":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    placement = KVPlacement(layout := KVLayout(2, 1, 1, 1, 256, 8), disk=tuple(layout.units()))
    where, device = (str(tmp_path / "kv"), ()), Device()
    with pytest.raises(RuntimeError, match="can't start"):
        KVTiers(placement, device, Settings(), Telemetry(device), Link(), lambda: 0, where)
    assert set(threading.enumerate()) <= before
    assert list(tmp_path.iterdir()) == []


def test_short_rows_are_moved_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of heads below a megabyte each would take longer to queue than all of it to move: 32 rows of 8 heads."""
    monkeypatch.undo()
    heads = {"n_layers": 1, "n_kv_heads": 8, "record_bytes": 256, "stretch_rows": 32}
    short = KVLayout(batch=32, tokens=256, **heads)
    lengths = [129, 1, *[200] * 29, 0]
    assert short.runs(lengths) == [Run(0, 31 * short.row_bytes)]
    long = KVLayout(batch=32, tokens=4096, **heads)
    assert len(long.runs(lengths)) == 31 * 8
    assert sum(run.nbytes for run in long.runs(lengths)) == sum(lengths) * 8 * long.token_bytes


def test_parts_that_do_not_end_on_a_page_have_room() -> None:
    layout = KVLayout(3, 2, 1, 1, 256, 12)
    device, placement = Device(), KVPlacement(layout, cpu=tuple(layout.units()))
    assert layout.unit_bytes(Unit(0, 0)) % BLOCK
    with KVTiers(placement, device, Settings(), Telemetry(device), Link(), lambda: 0) as tiers:
        assert tiers.page_locked_bytes == total(kv_cpu_lines(placement))
