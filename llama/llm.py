"""LLaMA.build: where the model and the weight streaming manager meet."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.ambient import own_torch
from llama.batch import prefill_batch
from llama.drafting import Drafting, load_draft
from llama.generation import Generation, GenerationOptions, Observer, generate
from llama.graphs import DecodeGraphs
from llama.inputs import Inputs
from llama.kv.cache import KVCache
from llama.loading import LoadTimes, Reporter
from llama.model import Transformer
from llama.opening import open_inputs
from llama.options import build_options
from llama.parallel.world import ALONE, World
from llama.plans import plan_run
from llama.products import Scratch
from llama.sources import find_store, open_source
from llama.tokenizer import Tokenizer, encode_prompt
from llama.weights import ImageWeights, TensorWeights, WeightSource
from wsm.engine.device import Device, Link, open_device
from wsm.engine.stream import WeightStreamingManager
from wsm.engine.telemetry import Telemetry
from wsm.errors import KVDeviceError, UnusableInput
from wsm.kv.tiers import KVTiers
from wsm.plan.advice import check_fits
from wsm.plan.hardware import limit_device_memory
from wsm.plan.inputs import RunShape
from wsm.plan.plan import Plan
from wsm.settings import Settings


class LLaMA:
    """A model, ready to generate; a context manager, since it holds threads and page-locked memory.

    Made by :meth:`build`, or by :meth:`assemble` from inputs and a plan.
    """

    def __init__(self, inputs: Inputs, plan: Plan, device: Device, settings: Settings, measured: bool) -> None:
        self.inputs, self.plan, self.device, self.settings = inputs, plan, device, settings
        self.config = inputs.share.config
        self.telemetry = Telemetry(device, keep=measured)
        self.manager: WeightStreamingManager | None = None
        self.kv_tiers: KVTiers | None = None
        self.link = Link()
        self.graphs: DecodeGraphs | None = None
        self.load_times = LoadTimes()
        self.warnings = inputs.warnings
        self.model: Transformer
        self.kv: KVCache
        self.scratch: Scratch
        self.drafting: Drafting | None = None
        self._packed = True
        self._lift_limit: Callable[[], None] = lambda: None

    @classmethod
    @own_torch()
    def build(
        cls,
        checkpoints_dir: str | Path | None,
        mode: str = "mixed",
        mode_config: Mapping[str, Any] | None = None,
        load_model: bool = False,
        device: str | None = None,
        max_seq_len: int = 2048,
        max_batch_size: int = 1,
        topk_blk: int = 8,
        world: World = ALONE,
    ) -> LLaMA:
        """A model from a checkpoint directory (None: the built-in one).

        Args:
            mode: ``mixed``, ``stream``, ``preload`` or ``full``.
            mode_config: fields of ``Settings`` (``gpu_cached_layers``, ``cpu_cache_layers``, …) and of
                ``BuildOptions`` (``raw_device``, ``manifest``, ``cache_dir``, ``dtype``, ``synthetic``, …).
            load_model: whether the whole checkpoint may be loaded, which only ``full`` and ``preload`` do.
            device: ``cpu``, ``cuda`` or ``cuda:N``; None for the best there is.
            max_seq_len: the most tokens of a row, prompt and new ones together.
            max_batch_size: the most rows.
            topk_blk: KV blocks per row and layer that a decode step may fetch from below the GPU; 0 for all.
            world: the processes that run the model together.

        UnusableInput, DoesNotFit or StoreError for what cannot be used, does not fit, or is damaged.
        """
        places = {"checkpoints": checkpoints_dir, "device": device, "load_model": load_model or None}
        options = build_options(mode_config or {}, mode=mode, topk_blk=topk_blk, **places)
        inputs = open_inputs(options, world)
        shape = RunShape(max_batch_size, max_seq_len - 1, 1, max_batch_size * (max_seq_len - 1))
        find_store(options, inputs, shape, Reporter())
        return cls.assemble(inputs, plan_run(options, inputs, shape), Reporter(), measured=False)

    @classmethod
    @own_torch()
    def assemble(
        cls,
        inputs: Inputs,
        plan: Plan,
        reporter: Reporter,
        *,
        before_load: Callable[[LLaMA], None] = lambda llm: None,
        measured: bool = True,
        packed: bool = True,
        beside_bytes: int = 0,
    ) -> LLaMA:
        """Allocate what the plan says, load, and be ready; ``measured`` keeps a record of every transfer and wait.

        ``before_load`` is called when all memory is there and nothing is loaded yet (the benchmark's probe). Without
        ``packed`` layers that are in no memory are read from the checkpoint itself: for a pass or two. The caller may
        take ``beside_bytes`` of the device beyond the plan's budget.
        """
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(inputs.close)
            check_fits(plan)
            budget = None if plan.gpu_budget_bytes is None else plan.gpu_budget_bytes + beside_bytes
            llm = cls(inputs, plan, open_device(inputs.device), plan.inputs.settings, measured)
            on_failure.callback(llm.close)
            llm._lift_limit = limit_device_memory(inputs.device, budget, plan.inputs.hardware.gpu_context_bytes)
            llm._packed = packed
            with llm.device.current():
                llm._load(reporter, before_load)
            on_failure.pop_all()
        return llm

    def _load(self, reporter: Reporter, before_load: Callable[[LLaMA], None]) -> None:
        inputs, plan = self.inputs, self.plan
        with self.load_times.timed("kv_s"):
            self.kv = self._make_kv()
        self.scratch = Scratch(plan.scratch_bytes, inputs.device, self.telemetry)
        if inputs.draft is not None:  # before page-locked memory is taken: it passes through ordinary memory
            with self.load_times.timed("draft_s"):
                self.drafting = load_draft(inputs.draft, plan, self.kv, self.scratch, self.telemetry, reporter)
            self.warnings += self.drafting.warnings
        weights: WeightSource
        with reporter.bar(self.config.n_layers, "layer", "loading") as advance:
            progress = lambda group: advance(group.kind == "ffn")  # noqa: E731 - the second group of a layer
            if self.settings.mode == "full":
                before_load(self)
                with self.load_times.timed("residents_s"):
                    weights = self._load_all(reporter, progress)
            else:
                weights = self.manager = self._start_manager(reporter, before_load, progress)
        collective = inputs.world.collective(self.telemetry)
        self.model = Transformer(self.config, weights, inputs.device, plan.inputs.kv_tokens, collective, self.scratch)
        if inputs.device.type == "cuda" and weights.resident and self.kv.tier is None:
            self.graphs = self.model.graphs = DecodeGraphs(self.model.groups, self.kv, inputs.device)

    def _make_kv(self) -> KVCache:
        inputs, placement = self.inputs, self.plan.kv
        if placement.below:
            self.kv_tiers = KVTiers(
                placement,
                self.device,
                self.settings,
                self.telemetry,
                self.link,
                wanted=lambda: self.manager.tiers.wanted_groups() if self.manager is not None else 0,
                disk=inputs.kv_disk(self.plan) if placement.disk else None,
            )
            self.warnings += self.kv_tiers.warnings
        return KVCache(
            self.config,
            self.plan.shape.batch,
            self.plan.inputs.kv_tokens,
            inputs.device,
            inputs.dtype,
            record=inputs.kv_format,
            stretch_rows=placement.layout.stretch_rows,
            tier=self.kv_tiers,
            topk=self.plan.inputs.topk_blk,
        )

    def _load_all(self, reporter: Reporter, progress: Callable[[Any], None]) -> WeightSource:
        """Mode ``full``: no manager."""
        inputs = self.inputs
        if inputs.weight_format is None:
            return TensorWeights(inputs.share, inputs.device, inputs.dtype, on_loaded=progress)
        source, at_load = open_source(inputs, self.plan, reporter), self.plan.decoding.at_load
        self.warnings += source.warnings
        return ImageWeights(source, self.config.n_layers, inputs.device, decoded=at_load, on_loaded=progress)

    def _start_manager(
        self, reporter: Reporter, before_load: Callable[[LLaMA], None], progress: Callable[[Any], None]
    ) -> WeightStreamingManager:
        with self.load_times.timed("open_store_s"):
            source = open_source(self.inputs, self.plan, reporter, packed=self._packed)
        self.warnings += source.warnings
        try:
            with self.load_times.timed("allocate_s"), reporter.bar(None, "", "taking memory"):
                manager = WeightStreamingManager(
                    self.plan.placement,
                    source,
                    self.device,
                    self.settings,
                    self.telemetry,
                    self.link,
                    kept_on_cpu=self.config.embedding if self.plan.inputs.embedding_on_cpu else None,
                    on_layer=(lambda line: reporter.say(f"[WSM][groups] {line}")) if reporter.verbose else None,
                    on_loaded=progress,
                )
        except BaseException:
            source.close()
            raise
        self.manager = manager
        self.warnings += manager.memory.warnings
        self.load_times.parts["populate_s"] = manager.memory.populate_s
        self.load_times.parts["page_lock_s"] = manager.memory.page_lock_s if self.device.pinned else None
        before_load(self)
        manager.start()
        self.load_times.parts["globals_s"] = manager.globals_s
        if not self.settings.skip_preload_wait:
            manager.tiers.wait_loaded()
        with self.load_times.timed("stage_s"):
            manager.tiers.wait_staged()
        return manager

    @property
    def page_locked_bytes(self) -> int:
        """Page-locked CPU memory of weights and KV, held now."""
        kv = self.kv_tiers.page_locked_bytes if self.kv_tiers is not None else 0
        return kv + (self.manager.memory.page_locked_bytes if self.manager is not None else 0)

    @property
    def page_locked_peak_bytes(self) -> int:
        """The most of it so far, loading buffers included."""
        kv = self.kv_tiers.page_locked_bytes if self.kv_tiers is not None else 0
        return kv + (self.manager.memory.page_locked_peak_bytes if self.manager is not None else 0)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inputs.tokenizer

    @own_torch()
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 32,
        temperature: float = 0.6,
        top_p: float = 0.9,
        seed: int = 0,
        ignore_eos: bool = False,
        observer: Observer | None = None,
    ) -> Generation:
        """New tokens for every prompt (texts, or lists of token ids); ``.tokens`` and ``.texts``.

        A text gets the special ids that its tokenizer puts around it; token ids are taken as they are.
        """
        ids = [encode_prompt(self.tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
        stop_ids = self.inputs.stop_ids if not ignore_eos else frozenset[int]()
        chunk, wave = self.plan.chunk_tokens, self.plan.wave_rows
        nodes, draft = self.plan.inputs.verify_rows, self.drafting.draft if self.drafting is not None else None
        options = GenerationOptions(max_new_tokens, temperature, top_p, seed, stop_ids, ignore_eos, chunk, wave, nodes)
        with self.device.current():
            found = generate(self.model, self.kv, ids, options, observer or (lambda mark: None), draft)
        if not any(isinstance(prompt, str) for prompt in prompts):
            return found
        kept = [[token for token in row if token not in self.inputs.stop_ids] for row in found.tokens]
        return dataclasses.replace(found, texts=[self.tokenizer.decode(row) for row in kept])

    @own_torch()
    @torch.inference_mode()
    def logits(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """float32 ``[B, T, vocab]`` after every token of equally long rows."""
        lengths = {len(row) for row in tokens}
        if len(lengths) != 1 or not 0 < max(lengths) <= self.kv.tokens or not 0 < len(tokens) <= self.kv.batch:
            raise UnusableInput(
                f"logits take 1 to {self.kv.batch} rows of one length, 1 to {self.kv.tokens} tokens, "
                f"not {sorted(lengths)}"
            )
        with self.device.current():
            self.kv.reset()
            batch = prefill_batch(tokens, range(len(tokens)), self.inputs.device)
            logits = self.model.forward(batch, self.kv, chunk_tokens=self.plan.chunk_tokens, logits="all")
            self.kv.spoilt = not bool(logits.sum().isfinite())
        return logits.view(len(tokens), lengths.pop(), -1)

    def stop(self) -> None:
        """Fetch nothing more: after this the telemetry is complete, and nothing can be generated.

        What goes wrong here is raised, and so is what a drive failed with behind the last token; the telemetry is still
        as complete as it can be.
        """
        try:
            parts = [part for part in (self.manager, self.kv_tiers) if part is not None]
            for part in parts:
                part.stop()
            self.device.synchronize()
            for part in parts:
                part.raise_unheard()
        finally:
            self.telemetry.fold()

    def close(self) -> None:
        """Join every thread, free every page and the device's memory, close every file."""
        with contextlib.ExitStack() as parts:
            for undo in (self._lift_limit, self._forget, self.inputs.close):
                parts.callback(undo)
            for part in (self.kv_tiers, self.manager):
                if part is not None:
                    parts.callback(part.close)

    def _forget(self) -> None:
        """Let go of the memory on the device, also where somebody still holds this object."""
        self.graphs = self.drafting = None
        for part in ("model", "kv", "scratch"):
            vars(self).pop(part, None)

    def __enter__(self) -> LLaMA:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.inputs.world.abandon()
        try:
            self.close()
        except KVDeviceError:
            if kind is None:  # else what failed before says more
                raise
