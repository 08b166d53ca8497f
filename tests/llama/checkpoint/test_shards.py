"""Shares of a model for several ranks: the slices of every reader, and the store that holds them rank by rank."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench_infer import command_line as main
from llama.checkpoint import Checkpoint, open_checkpoint
from llama.checkpoint.base import all_tensors
from llama.checkpoint.synthetic import BLOCK_VALUES, SyntheticCheckpoint
from llama.config import PRESETS, ModelConfig
from llama.inputs import read_manifest
from llama.names import BY_COLUMNS, Cut
from tests.stores import CONFIG, CountingCheckpoint, assert_equals, checkpoint, flip, pack_tiny, read_tensors
from tests.tiny import hf_directory, hf_model, meta_directory
from wsm.errors import StoreError, UnusableInput
from wsm.layout.groups import BLOCK
from wsm.layout.model import Shard
from wsm.store.layout import plan_store
from wsm.store.match import compare_heads
from wsm.store.pack import PackRequest, pack
from wsm.store.packed_store import PackedStore, verify

EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 304, "num_hidden_layers": 2}


def tensors(source: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = {}
    for name, shape in all_tensors(source.config):
        found[name] = torch.full(shape, float("nan"), dtype=dtype)
        source.read_into(name, found[name])
    return found


def put_together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors from every rank's, as fairscale's layers would have them."""
    whole = {}
    for name, first in parts[0].items():
        axis = int(name.endswith(BY_COLUMNS))
        whole[name] = first if first.dim() == 1 else torch.cat([part[name] for part in parts], dim=axis)
    return whole


def hf(directory: Path) -> Checkpoint:
    return open_checkpoint(hf_directory(directory / "hf", hf_model(**EIGHT)))


def hf_tied(directory: Path) -> Checkpoint:
    return open_checkpoint(hf_directory(directory / "hf", hf_model(**EIGHT, tie_word_embeddings=True)))


def meta(shards: int, columns_embedding: bool = False) -> Callable[[Path], Checkpoint]:
    def make(directory: Path) -> Checkpoint:
        path = meta_directory(directory / "meta", hf(directory), shards, columns_embedding=columns_embedding)
        return open_checkpoint(path)

    return make


def synthetic(directory: Path) -> Checkpoint:
    config = ModelConfig(
        "wide", dim=256, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=32, ffn_dim=512, vocab_size=8192
    )
    assert config.dim * config.vocab_size > BLOCK_VALUES  # a tensor passes the end of the synthetic block
    return SyntheticCheckpoint(config, seed=3, dtype=torch.bfloat16)


READERS = {
    "hf": hf,
    "hf, tied": hf_tied,
    "meta, 1 shard": meta(1),
    "meta, 2 shards": meta(2),
    "meta, 8 shards": meta(8),
    "meta, 4 shards, embedding by columns": meta(4, columns_embedding=True),
    "synthetic": synthetic,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_shares_of_all_ranks_make_the_whole_model(reader: str, size: int, tmp_path: Path) -> None:
    source = READERS[reader](tmp_path)
    whole = tensors(source)
    parts = [tensors(source.share(Shard(rank, size))) for rank in range(size)]
    for name, tensor in put_together(parts).items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [2, 8])
def test_the_first_row_of_a_share_is_read_alone(reader: str, size: int, tmp_path: Path) -> None:
    source = READERS[reader](tmp_path)
    for rank in range(size):
        share = source.share(Shard(rank, size))
        for name, tensor in tensors(share).items():
            row = share.first_row(name, tensor.dtype)
            assert torch.equal(row, tensor[0] if tensor.dim() == 2 else tensor), name


ROWS, COLUMNS = 300, 8192  # more than two synthetic blocks
LONG = SyntheticCheckpoint(ModelConfig("long", COLUMNS, 1, 2, 2, 4096, ROWS, 4), seed=0, dtype=torch.bfloat16)
MATRIX = "layers.0.feed_forward.w1.weight"


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, COLUMNS - 1), length=st.integers(1, COLUMNS))
def test_any_columns_of_a_synthetic_matrix_are_those_of_the_whole(start: int, length: int) -> None:
    whole = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    LONG.read_into(MATRIX, whole)
    part = torch.empty(ROWS, min(length, COLUMNS - start), dtype=torch.bfloat16)
    LONG.fill(MATRIX, part, Cut(0, start, *part.shape))
    assert torch.equal(part, whole[:, start : start + length])


@pytest.mark.parametrize("name", PRESETS)
def test_every_known_model_is_cut_for_8_ranks_or_names_what_it_can_be_cut_for(name: str) -> None:
    config = PRESETS[name]
    counts = (config.n_heads, config.n_kv_heads, config.ffn_dim, config.vocab_size)
    if all(count % 8 == 0 for count in counts):
        assert config.share(8).n_kv_heads == config.n_kv_heads // 8
        return
    with pytest.raises(UnusableInput, match="--nproc-per-node") as refusal:
        config.share(8)
    possible = str(refusal.value).rpartition("--nproc-per-node ")[2].split(" or ")
    for size in map(int, possible):
        config.share(size)


# -- stores


def pack_for(directory: Path, tp: int, source: Checkpoint | None = None, targets: int = 1) -> Path:
    manifest = directory / f"tp{tp}.json"
    names = tuple(str(directory / f"tp{tp}-{number}.wsm") for number in range(targets))
    request = PackRequest(names, manifest, torch.bfloat16, tp=tp)
    pack(source or checkpoint(), request, confirm=lambda question: True)
    return manifest


@pytest.mark.parametrize("targets", [1, 2])
def test_each_rank_reads_its_share_from_extents_of_its_own(targets: int, tmp_path: Path) -> None:
    source, tp = checkpoint(), 2
    manifest = pack_for(tmp_path, tp, source, targets)
    taken: list[tuple[int, int, int]] = []
    for rank in range(tp):
        description = read_manifest(manifest, rank=rank)
        assert description.shard == (rank, tp)
        taken += [(e.target, e.offset, e.nbytes) for group in description.groups.values() for e in group.extents]
        store = PackedStore(description, staging_bytes=1 << 20)
        assert_equals(store, source.share(Shard(rank, tp)))
        compare_heads(store, source.share(Shard(rank, tp)))
        store.close()
    for target in range(targets):
        extents = sorted((offset, nbytes) for number, offset, nbytes in taken if number == target)
        assert all(first + nbytes <= second for (first, nbytes), (second, _) in itertools.pairwise(extents))
    if targets == 1:  # group by group, rank by rank, without gaps
        groups = read_manifest(manifest).groups.values()
        ends = [group.extents[0].offset + tp * group.layout.nbytes for group in groups]
        assert [group.extents[0].offset for group in groups] == [BLOCK, *ends[:-1]]
        assert all(len(group.extents) == 1 for group in groups)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_eight_shards_of_meta_are_packed_for_any_number_of_ranks(tp: int, tmp_path: Path) -> None:
    source = meta(8)(tmp_path)
    manifest = pack_for(tmp_path, tp, source)
    parts = []
    for rank in range(tp):
        store = PackedStore(read_manifest(manifest, rank=rank), staging_bytes=1 << 20)
        parts.append(read_tensors(store))
        store.close()
    whole = tensors(source, torch.bfloat16)
    for name, tensor in put_together(parts).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_store_for_one_rank_is_byte_for_byte_what_it_was(tmp_path: Path) -> None:
    """So stores and readers of before stay good: no field of ranks in the manifest, the same layout."""
    manifest = json.loads(pack_tiny(tmp_path, source=CountingCheckpoint()).read_text())
    assert "tp" not in manifest
    assert set(manifest["groups"][0]) == {"layer", "kind", "offset", "nbytes", "stride", "checksum", "tensors"}


def test_the_manifest_of_several_ranks_says_how_many_and_has_a_checksum_for_each(tmp_path: Path) -> None:
    manifest = json.loads(pack_for(tmp_path, 2).read_text())
    assert manifest["tp"] == 2
    assert all(len(entry["checksums"]) == 2 for entry in [manifest["globals"], *manifest["groups"]])
    assert manifest["groups"][0]["tensors"][1]["shape"] == [CONFIG.n_heads * CONFIG.head_dim // 2, CONFIG.dim]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tp": 0}, "field tp"),
        ({"tp": "2"}, "field tp"),
        ({"tp": 4}, "cannot be cut for 4 ranks"),
        ({"tp": 1}, "checksum"),
    ],
)
def test_a_manifest_with_another_number_of_ranks_is_damaged(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    path = pack_for(tmp_path, 2)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnusableInput, match=named):
        read_manifest(path)


def test_a_damaged_share_is_named_by_verify_and_by_no_other_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = pack_for(tmp_path, 2)
    extent = read_manifest(manifest, rank=1).groups[None].extents[0]
    flip(tmp_path / "tp2-0.wsm", extent.offset + extent.nbytes // 2)
    bad = []
    for rank in range(2):
        store = PackedStore(read_manifest(manifest, rank=rank), staging_bytes=1 << 20)
        bad.append(verify(store))
        store.close()
    assert bad[0] == []
    assert "the globals of rank 1" in bad[1][0]
    assert main(["verify", "--manifest", str(manifest)]) == 4
    said = capsys.readouterr()
    assert "the globals of rank 1" in said.err
    assert "13 of 14 groups sound" in said.out


def test_a_store_of_other_weights_is_known_by_a_ranks_first_rows(tmp_path: Path) -> None:
    store = PackedStore(read_manifest(pack_for(tmp_path, 2), rank=1), staging_bytes=1 << 20)
    try:
        for other in (checkpoint(seed=1), CountingCheckpoint()):
            with pytest.raises(StoreError, match=r"is not the file|does not hold the checkpoint's"):
                compare_heads(store, other.share(Shard(1, 2)))
    finally:
        store.close()


def test_content_is_the_same_for_two_packings_and_another_for_other_weights(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        contents.append(read_manifest(pack_for(tmp_path / name, 2, checkpoint(seed=seed))).content)
    assert contents[0] == contents[1] != contents[2]


@given(tp=st.sampled_from([1, 2]), targets=st.integers(1, 3))
def test_ranks_images_never_overlap(tp: int, targets: int) -> None:
    plan = plan_store(CONFIG, torch.bfloat16, targets, tp)
    for target in range(targets):
        extents = sorted(
            (e.offset, e.nbytes)
            for group in plan.layouts
            for rank in range(tp)
            for e in plan.extents(group, rank)
            if e.target == target
        )
        assert extents[0][0] == BLOCK
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(extents))
        assert sum(extents[-1]) <= plan.target_bytes
    images = [layout.nbytes for layout in plan.layouts.values()]
    assert sum(e.nbytes for g in plan.layouts for r in range(tp) for e in plan.extents(g, r)) == tp * sum(images)
    assert math.gcd(*images, BLOCK) == BLOCK
