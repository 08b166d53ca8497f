"""Files that are read: what could be read for ever is refused, and so is JSON that Python takes and nobody else."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from wsm.disk import files
from wsm.errors import UnusableInput


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "/dev/zero", "/dev/null"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = Path(kind) if kind.startswith("/") else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(UnusableInput, match=r"^config.json cannot be read: it is a .*, not a file"):
            files.read_file(name, "config.json")
    if kind == "socket":
        listening.close()


def test_what_cannot_be_opened_is_told_with_its_reason(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, reason in ((loop, "symbolic links"), (tmp_path / "none", "No such file"), (tmp_path / "a\0b", "null")):
        with pytest.raises(UnusableInput, match=f"cannot be read: .*{reason}"):
            files.read_file(path)


def test_a_file_that_is_too_large_is_refused_and_one_at_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"x" * 1000)
    assert files.read_file(path, most_bytes=1000) == b"x" * 1000
    with pytest.raises(UnusableInput, match="larger than"):
        files.read_file(path, most_bytes=999)
    with pytest.raises(UnusableInput, match="larger than"):  # it says that it has 0 bytes
        files.read_file(Path("/proc/self/status"), most_bytes=100)


def test_a_pipe_is_read_to_its_end_where_pipes_may_be(tmp_path: Path) -> None:
    receive, send = os.pipe()
    content = b"a prompt\n" * 50_000  # more than a pipe holds

    def write() -> None:
        with os.fdopen(send, "wb") as file:
            file.write(content[:10])
            file.flush()
            time.sleep(0.02)
            file.write(content[10:])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert files.read_file(Path(f"/dev/fd/{receive}"), pipes=True) == content
    finally:
        os.close(receive)
        writer.join()


def test_a_pipe_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIPE_LIMIT_S", 0.05)
    receive, send = os.pipe()
    os.write(send, b"x" * 100)
    try:
        with pytest.raises(UnusableInput, match="did not come to its end"):
            files.read_file(Path(f"/dev/fd/{receive}"), pipes=True)
        os.write(send, b"x" * 100)
        with pytest.raises(UnusableInput, match="larger than"):
            files.read_file(Path(f"/dev/fd/{receive}"), pipes=True, most_bytes=10)
    finally:
        os.close(receive)
        os.close(send)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"a": 1e999}', "a is Infinity"),
        (b'{"a": -Infinity}', "a is -Infinity"),
        (b'{"a": [NaN]}', r"a\.\[\] is NaN"),
        (b'{"a": 1' + b"0" * 400 + b"}", "a is 10000"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' comes twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b"\xff\xfe", "decode"),
        (b'{"a": "\xed\xa0\x80"}', "decode"),
        (b"[" * 200 + b"]" * 200, "deeper than 100 levels"),
        (b'{"a":' * 100_000, "recursion|nested"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_is_refused_in_one_sentence(content: bytes, fault: str) -> None:
    with pytest.raises(UnusableInput, match=f"config.json is damaged .*({fault}).*; fetch it again") as caught:
        files.parse_json(content, "config.json", "fetch it again")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_json_is_read_with_a_byte_order_mark_and_surrogate_pairs() -> None:
    assert files.parse_json(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": [1e30, 10]}', "x", "y") == {
        "a": "😀",
        "b": [1e30, 10],
    }
