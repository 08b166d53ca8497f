"""GGUF files that are cut short, changed, or made to harm: a sentence, and no work or memory beyond the file's own."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench_infer import command_line as main
from llama.checkpoint import open_checkpoint
from llama.checkpoint.gguf_file import GGUFFile
from tests.gguf_files import CONFIG, bpe_fields, random_tensors, write_gguf
from tests.tiny import tensors_of
from wsm.errors import StoreError, UnusableInput
from wsm.formats import registry

UINT8, UINT32, STRING, ARRAY, UINT64 = 0, 4, 8, 9, 10
F32, Q4_K = 0, 12
HUGE = 2**63


def text(content: str | bytes, length: int | None = None) -> bytes:
    raw = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str, shape: Sequence[int], kind: int = F32, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def file_of(
    fields: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    data: int = 4096,
) -> bytes:
    tensor_count, field_count = counts or (len(tensors), len(fields))
    header = magic + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join((*fields, *tensors))
    return header + b"\0" * (-len(header) % 32) + b"\0" * data


LONG = "x" * 70
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends within its header"),
    "another file": (b"PK\3\4" + b"\0" * 64, "does not begin as a GGUF file does"),
    "only the magic": (b"GGUF", "ends within its header"),
    "version 1": (file_of(version=1), "version 1; 2 and 3 are read here"),
    "version 4": (file_of(version=4), "version 4; 2 and 3"),
    "big endian": (file_of(version=3 << 24), "for machines of the other byte order"),
    "2^63 tensors": (file_of(counts=(HUGE, 0)), f"{HUGE} tensors, more than any model has"),
    "2^63 fields": (file_of(counts=(0, HUGE)), f"{HUGE} metadata fields, more than any model has"),
    "more tensors than there are": (file_of(counts=(1000, 0), data=64), "dimensions"),
    "more fields than there are": (file_of(counts=(0, 60000), data=64), "ends within its header"),
    "a name of 2^63 bytes": (file_of([text("", HUGE)], counts=(0, 1)), f"{HUGE} bytes of text"),
    "a name beyond the file": (file_of([text("", 1 << 20)], counts=(0, 1)), "ends within its header"),
    "a name that is no text": (file_of([field("", UINT8, b"\0"), text(b"\xff\xfe")]), "is not UTF-8"),
    "a field of an unknown type": (file_of([field("a", 99, b"")]), "no type has the number 99"),
    "2^63 items": (file_of([field("a", ARRAY, array(UINT32, HUGE, b""))]), f"{HUGE} items of 'a'"),
    "items beyond the file": (file_of([field("a", ARRAY, array(UINT64, 1 << 20, b""))]), "ends within its header"),
    "nested arrays": (
        file_of([field("a", ARRAY, array(ARRAY, 1, array(ARRAY, 1, b"")))]),
        "an array of type 9, not of scalars or text",
    ),
    "a field twice": (file_of([field("a", UINT8, b"\1")] * 2), "metadata field 'a' comes twice"),
    "a tensor twice": (file_of([], [tensor("a", [8]), tensor("a", [8], offset=32)]), "tensor 'a' comes twice"),
    "no dimensions": (file_of([], [tensor("a", [])]), "'a' has 0 dimensions"),
    "2^32 - 1 dimensions": (file_of([], [tensor("a", [], dimensions=2**32 - 1)]), "has 4294967295 dimensions"),
    "a dimension of 0": (file_of([], [tensor("a", [8, 0])]), "'a' has shape [8, 0]"),
    "a dimension of 2^63": (file_of([], [tensor("a", [HUGE])]), f"'a' has shape [{HUGE}]"),
    "a product beyond 64 bits": (
        file_of([], [tensor("a", [2**31 - 1] * 4)]),
        "are not aligned, or end beyond the file's",
    ),
    "an offset beyond the file": (file_of([], [tensor("a", [8], offset=1 << 40)]), "end beyond the file's"),
    "an offset of 2^64 - 32": (file_of([], [tensor("a", [8], offset=2**64 - 32)]), "end beyond the file's"),
    "an offset not aligned": (file_of([], [tensor("a", [8], offset=4)]), "are not aligned"),
    "an end beyond the file": (file_of([], [tensor("a", [1025])]), "end beyond the file's"),
    "overlapping tensors": (
        file_of([], [tensor("a", [64]), tensor("b", [64], offset=128)]),
        "b lies within a",
    ),
    "half a block": (file_of([], [tensor("a", [128, 2], kind=Q4_K)]), "rows of 128 are no whole blocks of Q4_K"),
    "an alignment of 0": (file_of([field("general.alignment", UINT32, b"\0" * 4)]), "no power of two from 8 on"),
    "an alignment of 2^31": (
        file_of([field("general.alignment", UINT32, struct.pack("<I", 1 << 31))]),
        "no power of two from 8 on",
    ),
    "an alignment that is text": (file_of([field("general.alignment", STRING, text("32"))]), "no power of two"),
    "no metadata": (file_of([], [tensor("a", [8])]), "a model without an architecture"),
    "an architecture that is a number": (
        file_of([field("general.architecture", UINT32, b"\1\0\0\0")]),
        "architecture 1, which does not run here",
    ),
    "names without end in a message": (file_of([field(LONG, 99, b"")]), "no type has the number 99"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_made_to_harm_is_refused_in_a_sentence(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = HOSTILE[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(["--checkpoints", str(path), "--cache-dir", str(tmp_path), "--device", "cpu"])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    assert time.monotonic() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB


def test_counts_that_only_a_large_file_could_hold_are_bounded_in_it_too(tmp_path: Path) -> None:
    """A hole of 8 GiB: zeros are fields of an empty name, and would be read for minutes."""
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of([field("a", ARRAY, array(STRING, 1 << 29, b""))]))
    os.truncate(path, 8 << 30)
    with pytest.raises(UnusableInput, match="items of 'a', more than any model has"):
        GGUFFile(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    fields = bpe_fields(CONFIG.vocab_size)
    path = write_gguf(tmp_path_factory.mktemp("sound") / "m.gguf", random_tensors(), CONFIG, fields=fields)
    return path.read_bytes()


def test_a_cut_file_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG, architecture="qwen2")
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(UnusableInput, match="architecture 'qwen2', which does not run here"):
        open_checkpoint(path)


def test_a_file_cut_at_any_byte_is_refused(sound: bytes, tmp_path: Path) -> None:
    path, generator = tmp_path / "m.gguf", random.Random(0)
    for length in (*range(0, 256, 7), *(generator.randrange(len(sound)) for _ in range(60)), len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(UnusableInput):
            open_checkpoint(path)


def test_changed_bytes_of_the_header_give_a_model_or_a_sentence(sound: bytes, tmp_path: Path) -> None:
    path, generator = tmp_path / "m.gguf", random.Random(1)
    header = sound.index(b"blk.2.ffn_up.weight") + 60
    refused = 0
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(generator.choice([1, 1, 4])):
            at = generator.randrange(header)
            content[at : at + 1] = bytes([generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])])
        path.write_bytes(content)
        with contextlib.suppress(UnusableInput):
            refused += 1
            checkpoint = open_checkpoint(path)
            _ = checkpoint.vocabulary, checkpoint.chat_template, checkpoint.special_tokens
            tensors_of(checkpoint)
            refused -= 1
    assert 10 < refused < 150


def test_a_file_that_shrinks_is_a_sentence_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG)
    checkpoint, size = open_checkpoint(path), path.stat().st_size
    os.truncate(path, size // 2)
    with pytest.raises(StoreError, match=f"m.gguf ends at byte {size // 2}: it became shorter since it was opened"):
        tensors_of(checkpoint)
    weight_format, shape = registry.get("q4_K"), (CONFIG.ffn_dim, CONFIG.dim)
    with pytest.raises(StoreError, match="it became shorter since it was opened"):
        checkpoint.encode("layers.2.feed_forward.w3.weight", shape, torch.bfloat16, weight_format)


def test_a_scale_that_is_no_number_is_found_where_blocks_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(), CONFIG)
    place = GGUFFile(path).tensors["blk.1.ffn_up.weight"].offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<e", float("nan")))
    for mode in ("stream", "full", "mixed"):
        flags = ["--checkpoints", path, "--cache-dir", tmp_path, "--device", "cpu", "--mode", mode, "--prompt-len", 4]
        flags += ["--max-new-tokens", 2, "--no-probe", "--cpu-cache-layers", 1, "--gpu-cached-layers", 1]
        code = main([str(flag) for flag in flags])
        said = capsys.readouterr().err
        assert code == 2
        assert "blk.1.ffn_up.weight: q4_K: a scale in the plane blocks is NaN or infinity" in said
