"""Version 1 stores: read as the older tool wrote them, whatever gaps it left, or refused by the name of the field."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama.checkpoint import WeightlessCheckpoint
from llama.checkpoint.base import all_tensors
from llama.inputs import read_manifest
from tests.stores import CONFIG, assert_equals, checkpoint, edit, edit_param, flip, write_v1
from wsm.errors import StoreError, UnusableInput
from wsm.layout.groups import BLOCK, TENSOR_ALIGNMENT, GroupId
from wsm.store.description import StoreDescription, StoredGroup
from wsm.store.manifest_v1 import Param, place
from wsm.store.match import compare_heads
from wsm.store.packed_store import PackedStore

MIB = 1 << 20
WQ1 = "layers.1.attention.wq.weight"


def assert_placed(stored: StoredGroup, unit: int) -> None:
    """Extents aligned and apart, in slot and on the device; tensors inside one of them, aligned and apart."""
    slot_end = device_end = 0
    for extent in stored.extents:
        assert extent.offset % unit == extent.nbytes % unit == 0
        assert extent.slot_offset == slot_end
        assert slot_end == 0 or extent.offset > device_end, "adjacent reads are one"
        assert 0 < extent.needed <= extent.nbytes
        slot_end, device_end = extent.slot_offset + extent.nbytes, extent.offset + extent.nbytes
    assert stored.layout.nbytes == slot_end
    end = 0
    for tensor in sorted(stored.layout.tensors, key=lambda tensor: tensor.offset):
        assert tensor.offset % TENSOR_ALIGNMENT == 0
        assert tensor.offset >= end
        end = tensor.offset + tensor.nbytes
        assert any(
            extent.slot_offset <= tensor.offset and end <= extent.slot_offset + extent.needed
            for extent in stored.extents
        )


@given(gaps=st.lists(st.integers(0, 40), min_size=1, max_size=9), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_gaps_and_any_order_give_back_the_tensors(tmp_path: Path, gaps: list[int], seed: int) -> None:
    order = [name for name, _ in all_tensors(CONFIG)]
    random.Random(seed).shuffle(order)
    source = checkpoint()
    description = read_manifest(write_v1(tmp_path, source, gaps=gaps, order=order), checkpoint=source)
    for stored in description.groups.values():
        assert_placed(stored, BLOCK)
    store = PackedStore(description, staging_bytes=MIB)
    compare_heads(store, source)
    assert_equals(store, source)
    store.close()


@given(
    sizes=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30_000)), min_size=1, max_size=9),
    unit=st.sampled_from([4096, 16384, 65536]),
)
def test_reads_are_widened_to_any_logical_block(sizes: list[tuple[int, int]], unit: int) -> None:
    params, offset = {}, 0
    for number, (gap, nbytes) in enumerate(sizes):
        offset += gap * 512
        params[f"t{number}"] = Param(f"t{number}", "bfloat16", (nbytes,), offset, 2 * nbytes)
        offset += -(-2 * nbytes // 512) * 512
    assert_placed(place(None, params, unit), unit)


def test_adjacent_tensors_are_read_as_one(tmp_path: Path) -> None:
    source = checkpoint()
    description = read_manifest(write_v1(tmp_path, source), checkpoint=source)
    assert [len(stored.extents) for stored in description.groups.values()] == [1] * 7
    apart = read_manifest(write_v1(tmp_path, source, gaps=(64,)), checkpoint=source)
    assert len(apart.groups[GroupId(0, "attn")].extents) == 5


@pytest.mark.parametrize("embedding", ["tok_embeddings.weight", "embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_names_of_the_embedding_and_every_dtype_are_read(
    tmp_path: Path, embedding: str, dtype: torch.dtype
) -> None:
    source = checkpoint()
    description = read_manifest(write_v1(tmp_path, source, embedding=embedding, dtype=dtype), checkpoint=source)
    assert (description.version, description.dtype) == (1, dtype)
    store = PackedStore(description, staging_bytes=MIB)
    assert_equals(store, source, dtype)
    store.close()


def test_a_tied_model_needs_no_head(tmp_path: Path) -> None:
    source = checkpoint(dataclasses.replace(CONFIG, tied_embeddings=True))
    store = PackedStore(read_manifest(write_v1(tmp_path, source), checkpoint=source), staging_bytes=MIB)
    assert_equals(store, source)
    store.close()


def test_raw_device_overrides_the_manifest_s(tmp_path: Path) -> None:
    source = checkpoint()
    path = write_v1(tmp_path, source, gaps=(3, 0, 9))
    os.rename(tmp_path / "v1.raw", tmp_path / "moved.raw")
    store = PackedStore(
        read_manifest(path, raw_device=str(tmp_path / "moved.raw"), checkpoint=source), staging_bytes=MIB
    )
    assert_equals(store, source)
    store.close()


def test_a_device_that_ends_inside_the_last_block_is_whole(tmp_path: Path) -> None:
    """Widened to 4096 bytes, the last read reaches beyond a device whose size is a multiple of 512 only."""
    source = checkpoint()
    path = write_v1(tmp_path, source, gaps=(1,))
    end = max(param["offset"] + param["nbytes"] for param in json.loads(path.read_text())["params"])
    os.truncate(tmp_path / "v1.raw", -(-end // 512) * 512)
    assert os.path.getsize(tmp_path / "v1.raw") % BLOCK
    store = PackedStore(read_manifest(path, checkpoint=source), staging_bytes=MIB)
    assert_equals(store, source)
    store.close()


# -- wrong stores


def opened(description: StoreDescription, source: Any) -> PackedStore:
    store = PackedStore(description, staging_bytes=MIB)
    try:
        compare_heads(store, source)
    except BaseException:
        store.close()
        raise
    return store


def test_a_tensor_that_is_not_the_checkpoint_s_is_named(tmp_path: Path) -> None:
    source = checkpoint()
    path = write_v1(tmp_path, source, gaps=(5,))
    offset = next(p["offset"] for p in json.loads(path.read_text())["params"] if p["name"] == WQ1)
    flip(tmp_path / "v1.raw", offset + 100)
    with pytest.raises(StoreError, match=WQ1):
        opened(read_manifest(path, checkpoint=source), source)


def test_the_store_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_v1(tmp_path, checkpoint())
    other = checkpoint(seed=1)
    with pytest.raises(StoreError, match="another device"):
        opened(read_manifest(path, checkpoint=other), other)


def test_a_truncated_device_is_refused(tmp_path: Path) -> None:
    source = checkpoint()
    path = write_v1(tmp_path, source)
    os.truncate(tmp_path / "v1.raw", 100_000)
    with pytest.raises(StoreError, match="ends at byte 100000"):
        PackedStore(read_manifest(path, checkpoint=source), staging_bytes=MIB)


def test_without_weights_a_warning_says_that_nothing_was_checked(tmp_path: Path) -> None:
    path = write_v1(tmp_path, checkpoint())
    directory = tmp_path / "config-only"
    directory.mkdir()
    params = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "multiple_of": 96}
    (directory / "params.json").write_text(json.dumps({**params, "ffn_dim_multiplier": 0.5}))
    weightless = WeightlessCheckpoint(directory)
    store = opened(read_manifest(path, checkpoint=weightless), weightless)
    assert [warning for warning in store.warnings if "could not be checked" in warning]
    store.close()


# -- damaged manifests


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"block_size": 4096 + 1}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": "512"}, "block_size"),
        ({"block_size": None}, "block_size"),
        ({"raw_device": None}, "raw_device"),
        ({"raw_device": 3}, "raw_device"),
        ({"params": None}, "params"),
        ({"params": {}}, "params"),
        ({"params": ["x"]}, r"params\[0\]"),
        ({"params": []}, "no tensor tok_embeddings.weight"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    path = edit(write_v1(tmp_path, checkpoint()), **fields)
    with pytest.raises(UnusableInput, match=named) as refused:
        read_manifest(path, checkpoint=checkpoint())
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dtype": "int4"}, "field dtype: 'int4' is not known; bfloat16, float16, float32 are"),
        ({"dtype": ["x"]}, "wq.weight: field dtype: .*not \\['x'\\]"),
        ({"dtype": "float32"}, "field nbytes"),
        ({"shape": [64, 32]}, "field shape"),
        ({"shape": 3}, "wq.weight: field shape: .*not 3"),
        ({"nbytes": 512}, "field nbytes"),
        ({"offset": 8193}, "wq.weight: field offset: .*multiple of 512, not 8193"),
        ({"offset": -512}, "wq.weight: field offset: .*not -512"),
        ({"offset": "0"}, "wq.weight: field offset: .*not '0'"),
        ({"offset": 8192}, "lies within tok_embeddings.weight|lies within layers.1"),
        ({"offset": None}, "wq.weight: field offset is missing"),
        ({"dtype": None}, "wq.weight: field dtype is missing"),
        ({"rename": "layers.1.attention.wk.weight"}, "comes twice"),
        ({"rename": [1]}, r"field params\[\d+\]\.name"),
        ({"rename": "layers.1.attention.wqkv.weight"}, "no tensor layers.1.attention.wq.weight"),
    ],
)
def test_a_bad_tensor_is_named(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    path = edit_param(write_v1(tmp_path, checkpoint()), WQ1, **fields)
    with pytest.raises(UnusableInput, match=named) as refused:
        read_manifest(path, checkpoint=checkpoint())
    assert str(path) in str(refused.value)


def test_a_tensor_that_the_model_does_not_need_is_passed_over_whatever_it_says(tmp_path: Path) -> None:
    path = write_v1(tmp_path, checkpoint())
    content = json.loads(path.read_text())
    content["params"].append({"name": "rope.freqs", "dtype": None, "shape": None, "offset": 100, "nbytes": 3})
    path.write_text(json.dumps(content))
    assert read_manifest(path, checkpoint=checkpoint()).version == 1


def test_a_store_of_more_layers_than_the_model_is_refused(tmp_path: Path) -> None:
    path = write_v1(tmp_path, checkpoint())
    with pytest.raises(UnusableInput, match=r"layers\.2\..*the model has 2 layers"):
        read_manifest(path, checkpoint=checkpoint(dataclasses.replace(CONFIG, n_layers=2)))


def test_two_dtypes_are_refused(tmp_path: Path) -> None:
    path = edit_param(write_v1(tmp_path, checkpoint()), "norm.weight", dtype="float16")
    with pytest.raises(UnusableInput, match="field dtype differs"):
        read_manifest(path, checkpoint=checkpoint())


def test_without_a_checkpoint_the_shape_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="give --checkpoints too"):
        read_manifest(write_v1(tmp_path, checkpoint()))


def test_two_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="names 2 devices"):
        read_manifest(write_v1(tmp_path, checkpoint()), raw_device="/dev/a,/dev/b", checkpoint=checkpoint())
