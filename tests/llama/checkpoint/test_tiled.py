"""Synthetic weights in weight formats: what tiling gives is what encoding the tiled weights gives."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from llama.checkpoint.base import Checkpoint, RankCheckpoint
from llama.checkpoint.synthetic import SyntheticCheckpoint
from llama.config import PRESETS, ModelConfig
from tests.stores import tensor_of
from wsm.formats import registry
from wsm.formats.exact import Exact
from wsm.layout.groups import GroupId, pass_order, planes_in
from wsm.layout.model import Shard
from wsm.store.images import coming_layout, image_work
from wsm.store.pack import PackRequest, pack

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


@pytest.mark.parametrize("ffn_dim", [2304, 2302], ids=["even", "odd"])
def test_a_pack_for_two_ranks_has_the_bytes_that_encoding_gives(ffn_dim: int, tmp_path: Path) -> None:
    """In a share of an odd number of columns, pairs of weights are of two rows: that one is encoded."""
    config, exact = dataclasses.replace(CONFIG, ffn_dim=ffn_dim), registry.get("exact")
    packed = []
    for kind in (SyntheticCheckpoint, EncodedCheckpoint):
        place = tmp_path / kind.__name__
        request = PackRequest((f"{place}.wsm",), Path(f"{place}.json"), BF16, tp=2, weight_format=exact)
        pack(kind(config, seed=0, dtype=BF16), request, confirm=lambda question: True)
        manifest = json.loads(request.manifest.read_text())
        packed.append((Path(f"{place}.wsm").read_bytes()[4096:], manifest["groups"], manifest["globals"]))
    assert packed[0] == packed[1]


class EncodedCheckpoint(SyntheticCheckpoint):
    """Synthetic weights whose planes are encoded as those of weights in files are."""

    encode, encode_into, planes = Checkpoint.encode, Checkpoint.encode_into, Checkpoint.planes

    def share(self, shard: Shard) -> Checkpoint:
        return RankCheckpoint(self, shard)


def test_no_rank_encodes_a_matrix_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it for their sizes, which it has to know of all layers before it plans: that took minutes of 70B."""

    def encode(*_: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(Exact, "encode", encode)
    made = SyntheticCheckpoint(dataclasses.replace(PRESETS["Llama-3.1-70B"], n_layers=1), seed=0, dtype=BF16)
    exact, shares = registry.get("exact"), [made.share(Shard(rank, 8)) for rank in range(8)]
    for group in pass_order(1):
        for layout in [coming_layout(share, group, BF16, exact) for share in shares]:
            matrices = [tensor for tensor in layout.tensors if len(tensor.shape) == 2]
            assert {tensor.format for tensor in matrices} == {"exact"}
            weights = sum(math.prod(tensor.shape) for tensor in matrices)
            assert sum(tensor.nbytes for tensor in matrices) / weights == pytest.approx(1.5, abs=0.002)
    group, layout = GroupId(0, "attn"), coming_layout(shares[7], GroupId(0, "attn"), BF16, exact)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    for piece in image_work(shares[7], group, layout, buffer):
        piece()
    (wo,) = (tensor for tensor in layout.encoded if tensor.name == "wo")
    exact.check((8192, 1024), planes_in(buffer, wo).planes)
    out = torch.empty(8192, 1024, dtype=BF16)
    exact.decode_(planes_in(buffer, wo).planes, out)
    assert torch.equal(out, tensor_of(made, "layers.0.attention.wo.weight", (8192, 8192))[:, 7 * 1024 :])


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
