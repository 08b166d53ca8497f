"""Manifests of version 2: what is written is read back; what is damaged is refused by the name of its field."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from llama.inputs import read_manifest
from tests.stores import CONFIG, CountingCheckpoint, checkpoint, pack_tiny
from tests.wsm.layout.test_groups import configs
from wsm.errors import StoreError, UnusableInput
from wsm.layout.groups import BLOCK, GroupId, pass_order
from wsm.store.layout import Superblock, plan_store, stripes
from wsm.store.manifest import manifest_digest

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_tiny(tmp_path_factory.mktemp("store"))


@given(nbytes=st.integers(1, 500).map(lambda blocks: blocks * BLOCK), targets=st.integers(1, 4))
def test_stripes_cover_an_image_once(nbytes: int, targets: int) -> None:
    parts = stripes(nbytes, 3 * BLOCK, targets)
    assert [part.target for part in parts] == list(range(len(parts)))
    end = 0
    for part in parts:
        assert part.slot_offset == end
        assert part.offset == 3 * BLOCK
        assert part.nbytes % BLOCK == 0
        end += part.nbytes
    assert end == nbytes


@given(config=configs(), targets=st.integers(1, 4))
def test_groups_lie_apart_on_every_target_in_pass_order(config: Any, targets: int) -> None:
    plan = plan_store(config, torch.bfloat16, targets)
    assert list(plan.offsets) == [None, *pass_order(config.n_layers)]
    ends = [BLOCK] * targets
    for group, layout in plan.layouts.items():
        for part in stripes(layout.nbytes, plan.offsets[group], targets):
            assert part.offset >= ends[part.target]
            assert part.offset % BLOCK == 0
            ends[part.target] = part.offset + part.nbytes
    assert max(ends) <= plan.target_bytes


def test_a_manifest_says_what_design_lists(packed: Path) -> None:
    content = json.loads(packed.read_text())
    assert set(content) == {
        *("format", "version", "store_id", "created", "targets", "block_size", "dtype", "model", "source"),
        *("globals", "groups"),
    }
    for entry in [content["globals"], *content["groups"]]:
        assert set(entry) == {"layer", "kind", "offset", "nbytes", "stride", "checksum", "tensors"}
        for tensor in entry["tensors"]:
            assert set(tensor) == {"name", "dtype", "shape", "offset", "nbytes"}
            assert tensor["offset"] % 512 == 0


def test_what_was_packed_is_described(packed: Path) -> None:
    description = read_manifest(packed)
    assert description.version == 2
    assert description.config == CONFIG
    assert description.dtype == torch.bfloat16
    assert description.sources == checkpoint().sources()
    assert list(description.groups) == [None, *pass_order(CONFIG.n_layers)]
    assert description.groups[GroupId(1, "ffn")].name == "L1.ffn"


def test_the_format_is_the_same_as_ever(tmp_path: Path) -> None:
    """A tiny store's bytes and manifest, by their hashes: change them only with the format's version."""
    content = json.loads(pack_tiny(tmp_path, source=CountingCheckpoint()).read_text())
    image = (tmp_path / "store.wsm").read_bytes()
    assert len(image) == 290_816
    assert xxhash.xxh3_128_hexdigest(image[BLOCK:]) == "1fd537ed92d8a153ca5431a2c29a0162"
    for field, value in {"store_id": "00" * 16, "created": "2000-01-01T00:00:00+00:00", "targets": ["x"]}.items():
        content[field] = value
    assert manifest_digest(content) == "4827a807fa85a9a0b0525096303f5fbd"
    superblock = Superblock("0123456789abcdef" * 2, manifest_digest(content), 1, 3).to_bytes()
    golden = (
        "57534d53544f5245"
        "02000000"
        "01000000"
        "03000000"  # magic, version, target, targets
        "0123456789abcdef0123456789abcdef"  # store id
        "4827a807fa85a9a0b0525096303f5fbd"  # manifest digest
        "0ce65d658e3fd243"  # checksum of the fields
    )
    assert superblock[:60].hex() == golden
    assert not any(superblock[60:])


def test_another_device_name_is_the_same_manifest(packed: Path) -> None:
    content = json.loads(packed.read_text())
    assert manifest_digest({**content, "targets": ["/dev/other"]}) == manifest_digest(content)
    assert manifest_digest({**content, "created": "later"}) != manifest_digest(content)
    assert read_manifest(packed, raw_device="/dev/other").targets == ("/dev/other",)


def _set(*path: Any, to: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def _drop(*path: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


DAMAGE: list[tuple[Change, str]] = [
    (_set("version", to=3), "version 3"),
    (_set("version", to=1), "version 1"),
    (_set("version", to=None), "version None"),
    (_set("format", to="other"), "format 'other'"),
    (_drop("format"), "format None"),
    (_set("dtype", to="int4"), "field dtype: 'int4' is not known"),
    (_set("dtype", to=["float32"]), "field dtype"),
    (_set("dtype", to="float32"), "nbytes"),
    (_set("block_size", to=512), "field block_size is 512, not 4096"),
    (_set("targets", to=[]), "field targets"),
    (_set("targets", to="/dev/x"), "field targets"),
    (_set("targets", to=[3]), r"field targets\[0\]"),
    (_set("targets", to=7), "field targets"),
    (_set("store_id", to="zz"), "field store_id"),
    (_set("store_id", to="00"), "field store_id"),
    (_set("store_id", to=5), "field store_id"),
    (_set("source", to=[{"name": "x"}]), r"field source\[0\].size is missing"),
    (_set("model", "n_layers", to=10**4), "field groups"),
    (_set("model", "n_layers", to="3"), "field model"),
    (_set("model", "dim", to=128), "globals"),
    (_set("model", to=[]), "field model"),
    (_drop("model", "dim"), "dim"),
    (_drop("groups"), "field groups is missing"),
    (_drop("groups", 0), "field groups"),
    (_set("groups", to={}), "field groups"),
    (_set("groups", 1, to="x"), r"field groups\[1\]: Expected `object`"),
    (_set("groups", 0, "kind", to="moe"), "group L0.attn: field kind"),
    (_set("groups", 0, "layer", to=2), "group L0.attn: field layer"),
    (_set("groups", 3, "offset", to=8192), "group L1.ffn: field offset"),
    (_set("groups", 3, "offset", to=-4096), "group L1.ffn: field offset"),
    (_set("groups", 3, "offset", to=True), "group L1.ffn: field offset"),
    (_set("groups", 3, "offset", to=1 << 60), "group L1.ffn: field offset"),
    (_set("groups", 3, "nbytes", to=4096), "group L1.ffn: field nbytes"),
    (_drop("groups", 3, "stride"), "group L1.ffn: field stride is missing"),
    (_set("groups", 3, "checksum", to=None), "group L1.ffn: field checksum"),
    (_set("groups", 3, "checksum", to="é" * 32), r"field groups\[3\]\.checksum: .*not 'éé"),
    (_set("groups", 3, "checksum", to="0" * 32 + "\n"), r"field groups\[3\]\.checksum"),
    (_drop("groups", 3, "checksum"), "group L1.ffn: field checksum"),
    (_drop("groups", 3, "tensors", 1), "group L1.ffn: field tensors"),
    (_set("groups", 3, "tensors", 1, "dtype", to="int4"), r"group L1.ffn: field tensors\[1\]: field dtype is 'int4'"),
    (_set("groups", 3, "tensors", 1, "offset", to=511), r"group L1.ffn: field tensors\[1\]: field offset"),
    (_set("groups", 3, "tensors", 1, "shape", to=[1, 2]), r"group L1.ffn: field tensors\[1\]: field shape"),
    (_set("globals", "offset", to=0), "globals: field offset"),
    (_drop("globals"), "field globals is missing"),
]


@pytest.mark.parametrize(("change", "named"), DAMAGE, ids=[named for _, named in DAMAGE])
def test_a_damaged_manifest_is_refused_by_its_field(packed: Path, tmp_path: Path, change: Change, named: str) -> None:
    content = copy.deepcopy(json.loads(packed.read_text()))
    change(content)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    with pytest.raises(UnusableInput, match=named) as refused:
        read_manifest(damaged)
    assert str(damaged) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"groups": []}', "[" * 100_000, "\ufeff", '{"version": {}}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "no.json"
    path.write_text(content)
    with pytest.raises(UnusableInput, match=r"no\.json"):
        read_manifest(path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match="No such file"):
        read_manifest(tmp_path / "absent.json")
    with pytest.raises(UnusableInput, match="cannot be read"):
        read_manifest(tmp_path)


@given(data=st.data())
def test_no_random_damage_escapes_as_another_error(packed: Path, data: st.DataObject) -> None:
    content = json.loads(packed.read_text())
    node: Any = content
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or data.draw(st.booleans()):
            break
        node = node[key]
    else:
        return
    junk: st.SearchStrategy[Any] = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([[], {}])
    )
    node[key] = data.draw(junk)
    path = packed.parent / "random.json"
    path.write_text(json.dumps(content))
    with contextlib.suppress(UnusableInput):
        read_manifest(path)


def test_raw_device_must_name_as_many_devices_as_the_store_has(packed: Path) -> None:
    with pytest.raises(UnusableInput, match="names 2 devices"):
        read_manifest(packed, raw_device="/dev/a,/dev/b")
    with pytest.raises(UnusableInput, match="empty device"):
        read_manifest(packed, raw_device="/dev/a,")


SUPERBLOCK = Superblock("0123456789abcdef" * 2, "fedcba9876543210" * 2, 1, 3)


def test_a_superblock_comes_back() -> None:
    assert len(SUPERBLOCK.to_bytes()) == BLOCK
    assert Superblock.from_bytes(SUPERBLOCK.to_bytes(), "/dev/x") == SUPERBLOCK


@given(place=st.integers(0, 59), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_superblock_is_noticed(place: int, bit: int) -> None:
    block = bytearray(SUPERBLOCK.to_bytes())
    block[place] ^= 1 << bit
    with pytest.raises(StoreError, match=r"/dev/x.*re-pack"):
        Superblock.from_bytes(bytes(block), "/dev/x")


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (Superblock("00" * 16, SUPERBLOCK.manifest_digest, 1, 3), "another store or was overwritten"),
        (Superblock(SUPERBLOCK.store_id, "00" * 16, 1, 3), "another manifest"),
        (Superblock(SUPERBLOCK.store_id, SUPERBLOCK.manifest_digest, 0, 3), "part 1 of 3"),
        (Superblock(SUPERBLOCK.store_id, SUPERBLOCK.manifest_digest, 1, 2), "part 2 of 2"),
    ],
)
def test_another_target_than_the_manifest_s_is_refused(found: Superblock, named: str) -> None:
    with pytest.raises(StoreError, match=f"/dev/x.*{named}"):
        SUPERBLOCK.check(found.to_bytes(), "/dev/x")
