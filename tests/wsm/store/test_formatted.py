"""Stores in a weight format: packed the same by any number of threads; bad layouts and bad planes are refused."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.checkpoint import Checkpoint
from llama.checkpoint.base import all_tensors, stretch
from llama.config import ModelConfig
from llama.inputs import read_manifest
from llama.names import Cut
from tests.stores import CONFIG, aligned, tensor_of
from wsm.disk.io_threads import IOThreads
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.formats import registry
from wsm.layout.groups import BLOCK, Encoded, GroupId, InFormat, TensorSpec, image_layout, planes_in, stored_views
from wsm.layout.model import Shard, SourceFile
from wsm.store.images import make_images
from wsm.store.layout import FORMATTED, Superblock, plan_store
from wsm.store.manifest import manifest_digest
from wsm.store.pack import PackRequest, pack
from wsm.store.packed_store import PackedStore, verify

FFN1 = GroupId(1, "ffn")
Change = Callable[[dict[str, Any]], object]


class Random(Checkpoint):
    """Normal weights, some of them far smaller: an image takes more or less of them."""

    def __init__(self, config: ModelConfig = CONFIG) -> None:
        super().__init__(config, torch.bfloat16)

    def sources(self) -> tuple[SourceFile, ...]:
        return (SourceFile("random", 0, "00"),)

    def fill(self, name: str, out: Tensor, cut: Cut) -> None:
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(sum(name.encode()))
        values = torch.randn(math.prod(shape), generator=generator)
        small = torch.rand(values.shape, generator=generator) < 0.02 * (sum(name.encode()) % 5)
        values[small] *= 2.0**-60
        if name == "layers.2.attention.wo.weight":  # exponents of all sizes: exact does not pay
            values *= 2.0 ** torch.randint(-100, 0, values.shape, generator=generator)
        out.copy_(stretch(values.view(shape), cut))


def pack_formatted(
    directory: Path, name: str, *, tp: int = 1, targets: int = 1, source: Checkpoint | None = None
) -> Path:
    directory.mkdir(exist_ok=True)
    files = tuple(str(directory / f"store{number}.wsm") for number in range(targets))
    request = PackRequest(files, directory / "store.json", torch.bfloat16, tp=tp, weight_format=registry.get(name))
    pack(source or Random(), request, confirm=lambda question: True)
    return directory / "store.json"


def contents(directory: Path) -> list[bytes]:
    """Of all targets, without what is different each time."""
    return [path.read_bytes()[BLOCK:] for path in sorted(directory.glob("*.wsm"))]


def decoded(description_of: Path, rank: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the store, by full name, decoded."""
    description = read_manifest(description_of, rank=rank)
    store = PackedStore(description, staging_bytes=1 << 20)
    for group, stored in description.groups.items():
        buffer = aligned(stored.layout.nbytes)
        store.read(group, buffer).checked.result()
        for short, tensor in stored_views(buffer, stored.layout).items():
            if isinstance(tensor, Encoded):
                out = torch.empty(tensor.shape, dtype=tensor.dtype)
                registry.get(tensor.format).decode_(tensor.planes, out)
                tensor = out
            yield CONFIG.full_name(group, short), tensor.clone()
    store.close()


# -- packing


@pytest.mark.parametrize("name", registry.NAMES)
def test_packed_twice_with_1_and_with_8_threads_are_the_same_bytes(name: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 8):
            torch.set_num_threads(threads)
            pack_formatted(tmp_path / str(threads), name)
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "8")
    first, second = (read_manifest(tmp_path / threads / "store.json") for threads in ("1", "8"))
    assert first.content == second.content


@pytest.mark.parametrize("name", [None, *registry.NAMES])
def test_an_image_is_the_same_whatever_its_buffer_held(name: str | None) -> None:
    weight_format = registry.get(name) if name is not None else None
    plan, found = plan_store(CONFIG, torch.bfloat16, 1, 1, weight_format), []
    for group in (None, FFN1):
        for held in (0, 255):
            buffer = torch.full((plan.layouts[group].nbytes,), held, dtype=torch.uint8)
            with IOThreads(2, "test") as threads:
                (layout,) = make_images([Random()], group, plan, [buffer], threads).result()
            found.append(buffer[: layout.nbytes])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


@pytest.mark.parametrize(("tp", "targets"), [(1, 1), (2, 1), (2, 3)])
def test_what_exact_packed_is_the_checkpoint_bit_for_bit(tp: int, targets: int, tmp_path: Path) -> None:
    manifest = pack_formatted(tmp_path, "exact", tp=tp, targets=targets)
    for rank in range(tp):
        share = Random().share(Shard(rank, tp))
        found = dict(decoded(manifest, rank))
        expected = {name: tensor_of(share, name, shape) for name, shape in all_tensors(share.config)}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_images_have_sizes_of_their_own_and_those_of_the_ranks_are_padded_to_the_largest(tmp_path: Path) -> None:
    manifest = pack_formatted(tmp_path, "exact", tp=2)
    ranks = [read_manifest(manifest, rank=rank) for rank in range(2)]
    sizes = {group: stored.layout.nbytes for group, stored in ranks[0].groups.items()}
    assert len({nbytes for group, nbytes in sizes.items() if group and group.kind == "ffn"}) > 1
    assert sizes == {group: stored.layout.nbytes for group, stored in ranks[1].groups.items()}
    ends = [stored.extents[-1].offset + stored.extents[-1].nbytes for stored in ranks[1].groups.values()]
    assert (tmp_path / "store0.wsm").stat().st_size == max(ends)
    formats = [tensor.format for tensor in ranks[0].groups[GroupId(2, "attn")].layout.tensors]
    assert formats == [None, "exact", "exact", "exact", None]  # the norm, and a matrix that exact does not pay for


def test_a_target_is_checked_against_the_most_that_the_store_can_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = plan_store(CONFIG, torch.bfloat16, 1, 1, registry.get("exact")).target_bytes
    monkeypatch.setattr("wsm.disk.targets.free_bytes", lambda place: most - 1)
    with pytest.raises(DoesNotFit):
        pack_formatted(tmp_path, "exact")
    assert not list(tmp_path.glob("*"))
    monkeypatch.setattr("wsm.disk.targets.free_bytes", lambda place: most)
    pack_formatted(tmp_path, "exact")
    assert (tmp_path / "store0.wsm").stat().st_size < most


def test_a_formatted_manifest_is_of_version_3_and_says_what_docs_list(tmp_path: Path) -> None:
    content = json.loads(pack_formatted(tmp_path, "int4").read_text())
    assert (content["version"], content["weight_format"]) == (3, "int4")
    for entry in [content["globals"], *content["groups"]]:
        assert set(entry) == {"layer", "kind", "offset", "nbytes", "stride", "images"}
        for tensor in entry["images"][0]["tensors"]:
            matrix = entry["layer"] >= 0 and len(tensor["shape"]) == 2
            own = {"format", "planes"} if matrix else set()
            assert set(tensor) == {"name", "dtype", "shape", "offset", "nbytes", *own}
            for plane in tensor.get("planes", ()):
                assert set(plane) == {"name", "dtype", "shape", "offset", "nbytes"}
                assert plane["offset"] % 512 == 0
    with contextlib.closing(PackedStore(read_manifest(tmp_path / "store.json"), staging_bytes=1 << 20)) as store:
        assert verify(store) == []


# -- layouts that cannot be


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_formatted(tmp_path_factory.mktemp("formatted"), "int4")


def _set(*path: Any, to: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def encode_embedding(content: dict[str, Any]) -> None:
    """All would be right with it, were it no global tensor."""
    tensor = content["globals"]["images"][0]["tensors"][0]
    rows, cols = tensor["shape"]
    (layout,) = image_layout(
        [TensorSpec("w", (rows, cols))],
        torch.bfloat16,
        {"w": InFormat("int4", registry.get("int4").least_planes((rows, cols), torch.bfloat16))},
    ).tensors
    tensor |= {"format": "int4", "offset": layout.offset, "nbytes": layout.nbytes}
    tensor["planes"] = [
        {**asdict(plane), "dtype": str(plane.dtype).removeprefix("torch."), "shape": list(plane.shape)}
        for plane in layout.planes
    ]


W1 = ("groups", 3, "images", 0, "tensors", 1)
DAMAGE: list[tuple[Change, str]] = [
    (_set("weight_format", to="int5"), "field weight_format: the weight format int5 is not known"),
    (_set("weight_format", to=4), "field weight_format"),
    (_set("weight_format", to="int4+int8"), "weight_format: only a quantised checkpoint's own are several"),
    (_set("native", to=1), "field native: Expected `bool`"),
    (_set("weight_format", to="int8"), "group L0.attn: wq: a 'int4' of 3 planes cannot be here"),
    (_set("dtype", to="float32"), "globals: tok_embeddings: field dtype"),
    (_set("groups", 3, "layer", to=0), "group L1.ffn: fields layer and kind"),
    (_set("groups", 3, "offset", to=4095), r"field groups\[3\].offset"),
    (_set("groups", 3, "offset", to=8192), "field offset"),
    (_set("groups", 3, "nbytes", to=4096), "group L1.ffn: field stride"),
    (_set("groups", 3, "images", to=[]), "group L1.ffn: field images"),
    (_set("groups", 3, "images", 0, "checksum", to="00"), "checksum"),
    (_set("groups", 3, "images", 0, "tensors", 0, "nbytes", to=7), "ffn_norm: field nbytes is 7"),
    (_set(*W1, "name", to="w9"), "group L1.ffn: field tensors"),
    (_set(*W1, "shape", to=[64, 96]), "group L1.ffn: field tensors"),
    (_set(*W1, "format", to="exact"), "w1: a 'exact' of 3 planes cannot be here"),
    (_set(*W1, "format", to=None), "w1: field nbytes"),
    (_set(*W1, "planes", to=[]), "w1: a 'int4' of 0 planes"),
    (_set(*W1, "planes", 0, "offset", to=5), r"planes\[0\].offset"),
    (_set(*W1, "planes", 0, "offset", to=1 << 40), "w1: fields offset and nbytes"),
    (_set(*W1, "planes", 1, "offset", to=512), "w1: plane|lies within another|fields offset"),
    (_set(*W1, "planes", 0, "nbytes", to=100), "w1: plane values: field nbytes is 100"),
    (_set(*W1, "planes", 0, "dtype", to="complex64"), "w1: plane values: field dtype"),
    (_set(*W1, "planes", 0, "name", to="codes"), "w1: its planes are not those of int4"),
    (_set(*W1, "planes", 1, "shape", to=[96, 0]), "w1: plane scales: field nbytes"),
    (_set(*W1, "planes", 1, "shape", to=[1 << 62] * 2000), r"planes\[1\].shape: Expected `array` of length <= 2"),
    (_set("weight_format", to="int4" * 1000), "field weight_format: Expected `str` of length <= 1024"),
    (lambda content: encode_embedding(content), "globals: tok_embeddings: a 'int4' of 3 planes cannot be here"),
]


@pytest.mark.parametrize(("change", "named"), DAMAGE, ids=[named for _, named in DAMAGE])
def test_a_layout_out_of_bounds_is_refused_by_its_field(
    packed: Path, tmp_path: Path, change: Change, named: str
) -> None:
    content = copy.deepcopy(json.loads(packed.read_text()))
    change(content)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    with pytest.raises(UnusableInput, match=named):
        read_manifest(damaged)


@settings(deadline=None)
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
    values = st.none() | st.booleans() | st.integers() | st.text() | st.just([]) | st.just({})
    node[key] = data.draw(values)
    path = packed.with_name("random.json")
    path.write_text(json.dumps(content))
    with contextlib.suppress(UnusableInput):
        read_manifest(path)


# -- planes that cannot be


def rewrite(manifest: Path, group: GroupId, name: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change a matrix's planes in the store, every checksum made good again: as a faulty packer would leave them."""
    description, content = read_manifest(manifest), json.loads(manifest.read_text())
    stored = description.groups[group]
    (extent,) = stored.extents
    target = Path(description.targets[0])
    file = bytearray(target.read_bytes())
    image = torch.frombuffer(file, dtype=torch.uint8)[extent.offset : extent.offset + extent.nbytes]
    change(planes_in(image, next(t for t in stored.layout.tensors if t.name == name)).planes)
    entry = next(e for e in content["groups"] if (e["layer"], e["kind"]) == tuple(group))
    entry["images"][0]["checksum"] = xxhash.xxh3_128_hexdigest(image.numpy().tobytes())
    digest = manifest_digest(content)
    file[:BLOCK] = Superblock(content["store_id"], digest, 0, 1, FORMATTED).to_bytes()
    target.write_bytes(file)
    manifest.write_text(json.dumps(content))
    return manifest


def _fill(plane: str, value: float, at: int = 0) -> Callable[[dict[str, Tensor]], object]:
    def change(planes: dict[str, Tensor]) -> None:
        planes[plane].view(-1)[at] = value

    return change


def _reverse(planes: dict[str, Tensor]) -> None:
    planes["places"].copy_(planes["places"].int().flip(0))


BAD_PLANES = [
    ("exact", _fill("base", 250), "the window begins at exponent 250"),
    ("exact", _reverse, "out of order"),
    ("exact", _fill("codes", 255), "codes are the escape, and"),
    ("exact", _fill("counts", 1), "do not rise"),
    ("exact", _fill("places", 65535, -1), "beyond|is at weight"),
    ("fp8", _fill("scales", float("nan"), 3), "NaN"),
    ("int8", _fill("scales", float("inf"), 3), "NaN or infinity"),
    ("int4", _fill("scales", float("nan"), 3), "NaN or infinity"),
]


@pytest.mark.parametrize(("name", "change", "said"), BAD_PLANES, ids=[f"{n}: {said}" for n, _, said in BAD_PLANES])
def test_planes_that_cannot_be_decoded_are_refused_when_their_group_is_read(
    name: str, change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    manifest = rewrite(pack_formatted(tmp_path, name), FFN1, "w1", change)
    store = PackedStore(read_manifest(manifest), staging_bytes=1 << 20)
    failure = store.read(FFN1, aligned(store.layout(FFN1).nbytes)).checked.exception(20)
    assert isinstance(failure, StoreError)
    assert str(failure).startswith("w1 of L1.ffn")
    assert any(part in str(failure) for part in said.split("|")), failure
    assert len(verify(store)) == 1
    store.close()


def test_a_store_that_was_cut_short_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    manifest = pack_formatted(tmp_path, "exact")
    target = tmp_path / "store0.wsm"
    with target.open("r+b") as file:
        file.truncate(target.stat().st_size - BLOCK)
    with pytest.raises(StoreError, match="cut short"):
        PackedStore(read_manifest(manifest), staging_bytes=1 << 20)
