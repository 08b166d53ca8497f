"""Mixes of formats: their names, layouts of images with several, and the cuts that ranks' shares allow."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama.checkpoint.base import all_tensors
from llama.config import ModelConfig
from wsm.errors import UnusableInput
from wsm.formats.mix import Mix, columns_together, format_of, formats_named
from wsm.formats.registry import get
from wsm.layout.groups import GroupId
from wsm.store.cuts import check_cuts
from wsm.store.layout import plan_store, planned_layouts

CONFIG = ModelConfig("m", 256, 2, 4, 4, 64, 512, 256)
MATRICES = [name for name, shape in all_tensors(CONFIG) if name.startswith("layers") and len(shape) == 2]


def mix(**by_ending: str) -> Mix:
    """``wo="q4_K"``: of that matrix in every layer."""
    ends = {f".{short}.weight": name for short, name in by_ending.items()}
    return Mix({name: ends[end] for name in MATRICES for end in ends if name.endswith(end)})


def test_a_mix_is_called_by_its_formats_each_once_in_one_order() -> None:
    assert mix(w2="q6_K", wq="q4_K", wk="q4_K").name == "q4_K+q6_K"
    assert list(formats_named("q4_K+q6_K")) == ["q4_K", "q6_K"]
    with pytest.raises(UnusableInput, match="the weight format q3_K is not known"):
        formats_named("q4_K+q3_K")


def test_a_matrix_that_is_not_named_is_plain() -> None:
    found = mix(w2="q6_K")
    assert format_of(found, "layers.1.feed_forward.w2.weight") == get("q6_K")
    assert format_of(found, "layers.1.feed_forward.w1.weight") is None
    assert format_of(get("int8"), "anything") == get("int8")
    assert format_of(None, "anything") is None


def test_images_hold_each_matrix_in_its_format_and_may_differ_by_layer() -> None:
    by_layer = Mix({**mix(wq="q4_0").by_tensor, "layers.1.attention.wq.weight": "q8_0"})
    layouts = planned_layouts(CONFIG, torch.bfloat16, by_layer, most=True)
    formats = [{t.name: t.format for t in layouts[GroupId(layer, "attn")].tensors} for layer in (0, 1)]
    assert [found["wq"] for found in formats] == ["q4_0", "q8_0"]
    assert {found["wk"] for found in formats} == {None}
    first, second = (layouts[GroupId(layer, "attn")].nbytes for layer in (0, 1))
    assert second - first == 256 * 256 // 32 * (34 - 18)
    plan = plan_store(CONFIG, torch.bfloat16, 1, 1, by_layer)
    assert not plan.is_bound
    assert plan.target_bytes == 4096 + sum(layout.nbytes for layout in layouts.values())


def test_what_comes_encoded_is_cut_between_groups_and_what_is_encoded_here_anywhere() -> None:
    for name, ranks in (("q4_K", 1), ("int4", 2), ("int4-g64", 4), ("int4-row", 4), ("q8_0", 4)):
        found = mix(wo=name, wq=name)
        check_cuts(CONFIG, torch.bfloat16, ranks, found)
        if ranks < 4:
            with pytest.raises(UnusableInput, match=r"cannot be cut for 4 ranks.*wo.*--nproc-per-node 1( or 2)?$"):
                check_cuts(CONFIG, torch.bfloat16, 4, found)
    check_cuts(CONFIG, torch.bfloat16, 4, get("int4"))
    check_cuts(CONFIG, torch.bfloat16, 4, mix(wq="q4_K"))  # cut by rows
    assert [columns_together(get(name)) for name in ("q6_K", "int4-g32", "int8-row", "fp8")] == [256, 32, 1, 1]


def test_a_width_that_no_number_of_ranks_suits_is_refused_without_one() -> None:
    narrow = dataclasses.replace(CONFIG, head_dim=32)
    with pytest.raises(UnusableInput, match=r"wo being in q4_K, whose blocks of 256 weights do not fill a row of 128$"):
        check_cuts(narrow, torch.bfloat16, 1, mix(wo="q4_K"))
