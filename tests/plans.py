"""Inputs of the planner, for its tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from llama.config import PRESETS, ModelConfig
from wsm.layout.groups import GroupId, GroupLayout, image_layout, pass_order
from wsm.plan.hardware import GIB, Hardware
from wsm.plan.inputs import PlanInputs, RunShape
from wsm.settings import Settings

H70B = PRESETS["Llama-3.1-70B"]
TINY = ModelConfig("tiny", 64, 8, 4, 2, 16, 160, 300)
ROOMY = Hardware("cuda:0", 192 * GIB, 192 * GIB, GIB // 2, 512 * GIB)


def layouts_of(config: ModelConfig, dtype: torch.dtype) -> dict[GroupId | None, GroupLayout]:
    layouts: dict[GroupId | None, GroupLayout] = {None: image_layout(config.specs(None), dtype)}
    layouts.update({group: image_layout(config.specs(group.kind), dtype) for group in pass_order(config.n_layers)})
    return layouts


def inputs_for(
    config: ModelConfig = H70B,
    settings: Settings | None = None,
    shape: RunShape | None = None,
    hardware: Hardware = ROOMY,
    **more: Any,
) -> PlanInputs:
    dtype = torch.bfloat16
    shape = shape or RunShape(1, 2016, 32, 2016)
    return PlanInputs(config, dtype, layouts_of(config, dtype), settings or Settings(), shape, hardware, **more)


placements = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["mixed", "stream", "preload", "full"]),
        "gpu_cached_layers": st.integers(0, 40),
        "cpu_cache_layers": st.integers(1, 40),
        "prefetch_distance": st.integers(1, 12),
        "group_prefetch_depth": st.integers(1, 14),
        "warmup_layers": st.integers(0, 40),
        "cpu_evict": st.sampled_from(["belady", "fifo"]),
        "aggressive_gpu_prefetch": st.integers(0, 6),
        "gpu_max_groups": st.integers(2, 12),
    }
)
"""Every flag and variable that decides what lies where."""
