"""Synthetic weights in weight formats: what tiling gives is what encoding the tiled weights gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama.checkpoint.synthetic import SyntheticCheckpoint
from llama.config import PRESETS, ModelConfig
from tests.stores import tensor_of
from wsm.formats import registry
from wsm.layout.model import Shard

CONFIG = ModelConfig("tiny", dim=960, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=2303, vocab_size=300)
"""The feed-forward matrices are twice as large as the block that is tiled."""
NAMES = {
    "layers.0.attention.wq.weight": (256, 960),
    "layers.0.attention.wo.weight": (960, 256),
    "layers.0.feed_forward.w1.weight": (2303, 960),
    "layers.0.feed_forward.w2.weight": (960, 2303),
}
BF16 = torch.bfloat16


def source() -> SyntheticCheckpoint:
    return SyntheticCheckpoint(CONFIG, seed=0, dtype=BF16)


@pytest.mark.parametrize("name", NAMES)
def test_exact_planes_are_those_of_the_tiled_weights(name: str) -> None:
    exact, made = registry.get("exact"), source()
    found, expected = made.encode(name, NAMES[name], BF16, exact), exact.encode(tensor_of(made, name, NAMES[name]))
    assert found is not None
    assert expected is not None
    assert found.keys() == expected.keys()
    for plane, values in expected.items():
        assert torch.equal(found[plane].view(torch.uint8), values.view(torch.uint8)), plane
    exact.check((NAMES[name][0], NAMES[name][1]), found)


def test_an_odd_number_of_weights_ends_as_encoding_does() -> None:
    config = dataclasses.replace(CONFIG, dim=65, n_heads=1, n_kv_heads=1, head_dim=2, ffn_dim=1001)
    made, exact = SyntheticCheckpoint(config, seed=0, dtype=BF16), registry.get("exact")
    name, shape = "layers.0.feed_forward.w1.weight", (1001, 65)
    found, expected = made.encode(name, shape, BF16, exact), exact.encode(tensor_of(made, name, shape))
    assert found is not None
    assert expected is not None
    assert all(torch.equal(found[plane].view(torch.uint8), expected[plane].view(torch.uint8)) for plane in expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_exact_planes_are_those_of_its_share(rank: int) -> None:
    config = dataclasses.replace(CONFIG, ffn_dim=2304)
    share = SyntheticCheckpoint(config, seed=0, dtype=BF16).share(Shard(rank, 2))
    exact = registry.get("exact")
    for kind in ("attn", "ffn"):
        for spec in share.config.specs(kind)[1:]:
            name = next(n for n in NAMES if n.endswith(f"{spec.name}.weight")) if spec.name in "wq wo w1 w2" else None
            if name is None:
                continue
            expected = exact.encode(tensor_of(share, name, spec.shape))
            found = share.encode(name, spec.shape, BF16, exact)
            assert found is not None
            assert expected is not None
            for plane, values in expected.items():
                assert torch.equal(found[plane].view(torch.uint8), values.view(torch.uint8)), (name, plane)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int4-g32"])
def test_other_planes_pass_their_check_and_make_weights_of_the_usual_spread(name: str) -> None:
    made, weight_format = source(), registry.get(name)
    weight, shape = "layers.0.feed_forward.w1.weight", (2303, 960)
    planes = made.encode(weight, shape, BF16, weight_format)
    assert planes is not None
    weight_format.check(shape, planes)
    out = torch.empty(shape, dtype=BF16)
    weight_format.decode_(planes, out)
    assert float(out.float().std()) == pytest.approx(CONFIG.dim**-0.5, rel=0.1)
    assert len(out.unique(dim=0)) == shape[0]  # no two rows are alike
    again = source().encode(weight, shape, BF16, weight_format)
    assert again is not None
    assert all(torch.equal(planes[plane], again[plane]) for plane in planes)


@pytest.mark.parametrize("name", registry.BLOCK_TYPES)
@pytest.mark.parametrize("rank", [None, 1])
def test_planes_of_ggufs_types_are_whole_blocks_of_their_own(name: str, rank: int | None) -> None:
    config = dataclasses.replace(CONFIG, dim=1024, ffn_dim=4096)
    whole, weight_format = SyntheticCheckpoint(config, seed=0, dtype=BF16), registry.get(name)
    made = whole if rank is None else whole.share(Shard(rank, 2))
    shapes = {"w1": (4096, 1024), "w2": (1024, 4096)} if rank is None else {"w1": (2048, 1024), "w2": (1024, 2048)}
    for short, shape in shapes.items():
        weight, out = f"layers.0.feed_forward.{short}.weight", torch.empty(shape)
        planes = made.encode(weight, shape, BF16, weight_format)
        assert planes is not None
        weight_format.check(shape, planes)
        weight_format.decode_(planes, out)
        assert float(out.std()) == pytest.approx(1024**-0.5, rel=0.03)
        assert abs(float(out.mean())) < 0.002 * 1024**-0.5
        assert len(out.unique(dim=0)) == shape[0]  # no two rows are alike


def test_exact_sizes_of_a_large_model_are_counted_without_making_it() -> None:
    config = dataclasses.replace(PRESETS["Llama-3.1-70B"], n_layers=1)
    made = SyntheticCheckpoint(config, seed=0, dtype=BF16)
    planes = made.planes("layers.0.feed_forward.w1.weight", (28672, 8192), BF16, registry.get("exact"))
    assert planes is not None
    weights = 28672 * 8192
    assert sum(plane.nbytes for plane in planes) / weights == pytest.approx(1.5, abs=0.002)
