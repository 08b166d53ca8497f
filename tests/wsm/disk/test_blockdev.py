"""Writing to a block device is the one dangerous act: what is in use, bears something or is too small stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama.inputs import read_manifest
from llama.opening import open_inputs
from llama.options import BuildOptions
from tests.stores import CONFIG, assert_equals, checkpoint, loop_device, pack_tiny, write_v1
from wsm.disk import blockdev, safety
from wsm.disk.blockdev import signatures, unusable_target
from wsm.disk.direct import open_for_reading
from wsm.disk.safety import check_writable, why_busy, why_file_busy
from wsm.errors import DoesNotFit, StoreError, UnusableInput
from wsm.kv.target import KVTarget
from wsm.store.layout import plan_store
from wsm.store.match import compare_heads
from wsm.store.pack import PackRequest, pack
from wsm.store.packed_store import PackedStore, verify

MIB = 1 << 20
SBIN = f"{os.defpath}:/usr/sbin:/sbin"


# -- who uses a device: a made-up /proc and /sys

DISK, P1, P4, OTHER, MAPPED, LOOP, LOOP_P1 = "259:0", "259:1", "259:4", "8:0", "253:0", "7:0", "259:7"
DEVICES = {
    "/dev/nvme0n1": DISK,
    "/dev/nvme0n1p1": P1,
    "/dev/nvme0n1p4": P4,
    "/dev/sda": OTHER,
    "/dev/dm-0": MAPPED,
    "/dev/loop0": LOOP,
    "/dev/loop0p1": LOOP_P1,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An NVMe disk with partitions 1 and 4, another disk, a device-mapper volume; nothing in use."""
    real = {DISK: "nvme0n1", P1: "nvme0n1/nvme0n1p1", P4: "nvme0n1/nvme0n1p4", OTHER: "sda", MAPPED: "dm-0"}
    real |= {LOOP: "loop0", LOOP_P1: "loop0/loop0p1"}
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    for number, place in real.items():
        node = tmp_path / "sys/devices" / place
        (node / "holders").mkdir(parents=True)
        (node / "dev").write_text(f"{number}\n")
        if "/" in place:
            (node / "partition").write_text("1\n")
        (tmp_path / "sys/dev/block" / number).symlink_to(node)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("20 1 0:19 / /proc rw,relatime shared:4 - proc proc rw\n")
    (tmp_path / "proc/swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n")
    monkeypatch.setattr(safety, "is_block_device", lambda path: path in DEVICES)
    monkeypatch.setattr(safety, "device_number", lambda path: DEVICES[path])
    return tmp_path


def mount(root: Path, number: str, where: str, source: str, kind: str = "ext4") -> None:
    with (root / "proc/self/mountinfo").open("a") as file:
        file.write(f"31 1 {number} / {where} rw,relatime shared:1 - {kind} {source} rw\n")


def hold(root: Path, number: str, holder: str) -> None:
    ((root / "sys/dev/block" / number).resolve() / "holders" / holder).mkdir()


def test_an_idle_device_is_free(root: Path) -> None:
    assert [why_busy(device, root=root) for device in DEVICES] == [None] * len(DEVICES)


@pytest.mark.parametrize(
    ("mounted", "target", "busy"),
    [
        (P4, "/dev/nvme0n1p4", True),
        (P1, "/dev/nvme0n1p4", False),  # a neighbour
        (P1, "/dev/nvme0n1", True),  # a part of it
        (DISK, "/dev/nvme0n1p4", True),  # the whole that it is part of
        (OTHER, "/dev/nvme0n1", False),
    ],
)
def test_a_mount_keeps_what_writing_would_hurt(root: Path, mounted: str, target: str, busy: bool) -> None:
    mount(root, mounted, r"/my\040data", "/dev/root")
    found = why_busy(target, root=root)
    assert (found is not None) is busy
    if busy:
        assert str(found).endswith("is mounted on /my data")
        with pytest.raises(UnusableInput, match=r"in use.*nothing was written"):
            check_writable(target, force=True, root=root)


def test_btrfs_which_mounts_under_a_number_of_its_own_is_seen(root: Path) -> None:
    mount(root, "0:47", "/data", "/dev/nvme0n1p4", "btrfs")
    assert why_busy("/dev/nvme0n1p4", root=root) == "nvme0n1p4 is mounted on /data"
    assert why_busy("/dev/nvme0n1p1", root=root) is None


@pytest.mark.parametrize(
    ("used", "target", "busy"),
    [
        ("/dev/nvme0n1p1", "/dev/nvme0n1p1", True),
        ("/dev/nvme0n1p1", "/dev/nvme0n1", True),
        ("/dev/nvme0n1p1", "/dev/nvme0n1p4", False),
        ("/swapfile", "/dev/nvme0n1p4", False),
    ],
)
def test_swap_is_seen(root: Path, used: str, target: str, busy: bool) -> None:
    with (root / "proc/swaps").open("a") as file:
        file.write(f"{used}\tpartition\t8388604\t0\t-2\n")
    assert (why_busy(target, root=root) == f"{used} is in use as swap") is busy


@pytest.mark.parametrize(
    ("held", "target", "busy"),
    [(P4, "/dev/nvme0n1p4", True), (P4, "/dev/nvme0n1", True), (P1, "/dev/nvme0n1p4", False)],
)
def test_lvm_raid_and_encryption_are_seen(root: Path, held: str, target: str, busy: bool) -> None:
    hold(root, held, "dm-0")
    found = why_busy(target, root=root)
    assert (found is not None) is busy
    assert not busy or "held by dm-0" in str(found)


# -- what a device bears: blkid's answers


def fake_blkid(monkeypatch: pytest.MonkeyPatch, code: int, out: str = "", err: str = "") -> None:
    answer = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: answer)
    monkeypatch.setattr(shutil, "which", lambda name, path: f"/usr/sbin/{name}")


def test_blkid_s_answers_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_blkid(monkeypatch, 2)
    assert signatures("/dev/x") == []
    fake_blkid(monkeypatch, 0, "DEVNAME=/dev/x\nTYPE=LVM2_member\nPTTYPE=gpt\n")
    assert signatures("/dev/x") == ["a signature of type LVM2_member", "a partition table of type gpt"]
    fake_blkid(monkeypatch, 8)
    assert signatures("/dev/x") == ["more than one signature"]


@pytest.mark.parametrize(("code", "err"), [(2, "error: /dev/x: Input/output error"), (4, "usage")])
def test_a_device_that_blkid_cannot_read_is_not_taken_for_a_bare_one(
    monkeypatch: pytest.MonkeyPatch, code: int, err: str
) -> None:
    fake_blkid(monkeypatch, code, err=err)
    with pytest.raises(UnusableInput, match=f"could not read /dev/x.*{err}"):
        signatures("/dev/x")


def test_without_blkid_only_force_writes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(UnusableInput, match=r"blkid.*not installed.*--force"):
        check_writable("/dev/sda", force=False, root=root)
    assert check_writable("/dev/sda", force=True, root=root) == []


def test_use_is_refused_before_a_signature_is_looked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_blkid(monkeypatch, 0, "TYPE=ext4\n")
    with pytest.raises(UnusableInput, match=r"bears a signature of type ext4.*--force overwrites it"):
        check_writable("/dev/sda", force=False, root=root)
    assert check_writable("/dev/sda", force=True, root=root) == ["a signature of type ext4"]
    mount(root, OTHER, "/data", "/dev/sda")
    with pytest.raises(UnusableInput, match="mounted on /data"):
        check_writable("/dev/sda", force=False, root=root)


def test_no_permission_names_the_group_that_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blockdev, "is_block_device", lambda path: True)
    denied = OSError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    owner = SimpleNamespace(st_gid=os.getgid() or 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path: owner)
        assert "run `sudo usermod -aG " in str(unusable_target("/dev/sda", denied))
        owner.st_gid = 0
        assert "usermod" not in str(unusable_target("/dev/sda", denied))
    monkeypatch.setattr(blockdev, "is_block_device", lambda path: False)
    assert "change its mode" in str(unusable_target(str(tmp_path), denied))


def attach(root: Path, loop: str, backing: str) -> None:
    (root / f"sys/block/{loop}/loop").mkdir(parents=True)
    (root / f"sys/block/{loop}/loop/backing_file").write_text(backing + "\n")


def test_the_file_behind_a_loop_device_is_in_use(root: Path) -> None:
    disk, other = root / "disk.img", root / "other.img"
    for file in (disk, other):
        file.touch()
    attach(root, "loop0", f"{root}/gone.img (deleted)")
    attach(root, "loop7", str(disk))
    link = root / "same.img"
    link.hardlink_to(disk)
    for name in (disk, link):
        assert why_file_busy(str(name), root=root) == (
            "it is the contents of loop7; `losetup -d /dev/loop7` detaches that"
        )
    assert why_file_busy(str(other), root=root) is None


def test_a_swap_file_is_in_use(root: Path) -> None:
    (root / "swap file").touch()
    with (root / "proc/swaps").open("a") as file:
        file.write(f"{root}/swap\\040file file 8388604 0 -2\n")
    assert why_file_busy(str(root / "swap file"), root=root) == f"{root}/swap file is in use as swap"


def test_where_the_kernel_tells_no_swap_nothing_is_swap(root: Path) -> None:
    (root / "proc/swaps").unlink()
    (root / "a file").touch()
    assert why_file_busy(str(root / "a file"), root=root) is None


def test_a_second_loop_device_over_one_file_is_in_use(root: Path) -> None:
    (root / "disk.img").touch()
    attach(root, "loop0", str(root / "disk.img"))
    assert why_busy("/dev/loop0", root=root) is None
    assert why_busy("/dev/loop0p1", root=root) is None
    attach(root, "loop1", f"{root}/./disk.img")
    for target in ("/dev/loop0", "/dev/loop0p1"):
        found = f"loop0 is over {root}/disk.img, and it is the contents of loop1 too"
        assert str(why_busy(target, root=root)).startswith(found)


def test_a_loop_device_over_a_block_device_is_in_use_as_that_is(root: Path) -> None:
    attach(root, "loop0", "/dev/nvme0n1p4")
    assert why_busy("/dev/loop0", root=root) is None
    assert why_busy("/dev/nvme0n1p4", root=root) == "loop0 is a loop device over nvme0n1p4"
    assert why_busy("/dev/nvme0n1", root=root) == "loop0 is a loop device over nvme0n1p4"
    assert why_busy("/dev/nvme0n1p1", root=root) is None
    mount(root, DISK, "/data", "/dev/root")
    assert why_busy("/dev/loop0", root=root) == "loop0 is over /dev/nvme0n1p4, and nvme0n1 is mounted on /data"


def test_a_mapped_volume_is_in_use_where_what_it_lies_on_is_mounted(root: Path) -> None:
    hold(root, P4, "dm-0")
    slaves = (root / "sys/dev/block" / MAPPED).resolve() / "slaves"
    slaves.mkdir()
    (slaves / "nvme0n1p4").symlink_to((root / "sys/dev/block" / P4).resolve())
    assert why_busy("/dev/dm-0", root=root) is None  # that holds its partition itself
    mount(root, P4, "/data", "/dev/root")
    assert why_busy("/dev/dm-0", root=root) == "dm-0 lies on nvme0n1p4, and nvme0n1p4 is mounted on /data"


# -- /dev: no place for files


@pytest.mark.parametrize("target", ["/dev/nvme9n1p9", "/dev/disk/by-id/none/x"])
def test_a_block_device_that_is_not_there_makes_no_file_in_dev(target: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    for name in (target, str(link)):
        with pytest.raises(UnusableInput, match=f"--to {name} is no block device"):
            pack_tiny(tmp_path, targets=[name])
        assert not os.path.exists(target)


def test_neither_manifest_nor_cache_nor_store_nor_kv_lies_among_the_nodes_of_dev(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"--manifest /dev/m\.json is no block device"):
        pack(
            checkpoint(),
            PackRequest((str(tmp_path / "s"),), Path("/dev/m.json"), torch.bfloat16),
            confirm=lambda _: True,
        )
    with pytest.raises(UnusableInput, match="--cache-dir /dev/cache is no block device"):
        open_inputs(BuildOptions(cache_dir=Path("/dev/cache"), device="cpu"))
    with pytest.raises(UnusableInput, match="--kv-device /dev/nvme9n1p9 is no block device"):
        KVTarget("/dev/nvme9n1p9", MIB, [])
    if os.access("/dev", os.W_OK):
        lost = Path(f"/dev/wsm-{os.getpid()}")
        lost.write_bytes(bytes(4096))
        try:
            with pytest.raises(UnusableInput, match=f"{lost} is no block device"):
                open_for_reading(str(lost))
        finally:
            lost.unlink()


def test_filesystems_of_their_own_below_dev_hold_files(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not (shm.is_mount() and os.access(shm, os.W_OK)):
        pytest.skip("no /dev/shm here")
    target = shm / f"wsm-{os.getpid()}.wsm"
    try:
        PackedStore(read_manifest(pack_tiny(tmp_path, targets=[str(target)])), staging_bytes=MIB).close()
    finally:
        target.unlink(missing_ok=True)


# -- real devices


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path / "disk.img", 16 * MIB) as name:
        yield name


def bytes_of(device: str) -> bytes:
    with open(device, "rb") as file:
        return file.read(2 * MIB)


@pytest.mark.root
def test_pack_verify_and_read_a_block_device(tmp_path: Path, device: str) -> None:
    description = read_manifest(pack_tiny(tmp_path, targets=[device]))
    assert description.targets == (device,)
    store = PackedStore(description, staging_bytes=MIB)
    assert store.warnings == []
    assert_equals(store, checkpoint())
    assert verify(store) == []
    store.close()
    # Packing again needs no --force: our own superblock is no filesystem.
    pack_tiny(tmp_path, targets=[device], source=checkpoint(seed=1))
    with pytest.raises(StoreError, match=f"{device} is another store or was overwritten"):
        PackedStore(description, staging_bytes=MIB)


@pytest.mark.root
def test_a_block_device_and_a_file_make_one_store(tmp_path: Path, device: str) -> None:
    manifest = pack_tiny(tmp_path, targets=[device, str(tmp_path / "other.wsm")])
    store = PackedStore(read_manifest(manifest), staging_bytes=MIB)
    assert_equals(store, checkpoint())
    store.close()


@pytest.mark.root
def test_an_interrupted_pack_leaves_no_store_on_the_device(tmp_path: Path, device: str) -> None:
    kept = read_manifest(pack_tiny(tmp_path, targets=[device]))

    def interrupted(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_tiny(tmp_path, targets=[device], progress=interrupted)
    assert not (tmp_path / "store.json").exists()
    assert os.path.exists(device)
    with pytest.raises(StoreError, match="bears no packed store"):
        PackedStore(kept, staging_bytes=MIB)


@pytest.mark.root
def test_a_version_1_store_on_a_block_device_is_read(tmp_path: Path, device: str) -> None:
    source = checkpoint()
    path = write_v1(tmp_path, source, gaps=(1, 0, 7))
    with open(device, "r+b") as file:
        file.write((tmp_path / "v1.raw").read_bytes())
    description = read_manifest(path, raw_device=device, checkpoint=source)
    store = PackedStore(description, staging_bytes=MIB)
    compare_heads(store, source)
    assert_equals(store, source)
    store.close()


@pytest.mark.root
@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["mkfs.ext4", "-q"], "ext4"),
        (["mkswap"], "swap"),
        (["pvcreate", "-y"], "LVM2_member"),
    ],
)
def test_a_device_that_bears_something_stays_as_it_is(
    tmp_path: Path, device: str, command: list[str], named: str
) -> None:
    program = shutil.which(command[0], path=SBIN)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    subprocess.run([program, *command[1:], device], check=True, capture_output=True)
    before = bytes_of(device)
    with pytest.raises(UnusableInput, match=f"{device} bears a signature of type {named}.*--force"):
        pack_tiny(tmp_path, targets=[device])
    assert bytes_of(device) == before
    pack_tiny(tmp_path, targets=[device], force=True)


@pytest.mark.root
def test_a_partition_table_is_seen(tmp_path: Path, device: str) -> None:
    entry = bytes([0, 0, 2, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (8192).to_bytes(4, "little")
    with open(device, "r+b") as file:
        file.write(b"\0" * 446 + entry + b"\0" * 48 + b"\x55\xaa")
    with pytest.raises(UnusableInput, match="bears a partition table of type dos"):
        pack_tiny(tmp_path, targets=[device])


@pytest.mark.root
def test_a_mounted_device_is_refused_even_with_force(tmp_path: Path, device: str) -> None:
    make_filesystem(device)
    where = tmp_path / "mounted"
    where.mkdir()
    mounted = subprocess.run(["mount", device, str(where)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount fails here: {mounted.stderr.strip()}")
    try:
        (where / "file").write_text("mine")
        with pytest.raises(UnusableInput, match=f"{device} is in use .*mounted on {where}"):
            pack_tiny(tmp_path, targets=[device], force=True)
        assert (where / "file").read_text() == "mine"
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.root
def test_a_device_that_another_program_has_exclusively_is_refused(tmp_path: Path, device: str) -> None:
    """What neither mounts nor holders show, O_EXCL does."""
    file = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(UnusableInput, match=f"{device} is in use: nothing was written"):
            pack_tiny(tmp_path, targets=[device])
    finally:
        os.close(file)


@pytest.mark.root
def test_the_file_behind_an_attached_loop_device_is_not_packed_over(tmp_path: Path, device: str) -> None:
    before = bytes_of(device)
    name = device.rpartition("/")[2]
    with pytest.raises(UnusableInput, match=f"contents of {name}; `losetup -d {device}`.*nothing was written"):
        pack_tiny(tmp_path, targets=[str(tmp_path / "disk.img")])
    assert bytes_of(device) == before


@pytest.mark.root
def test_a_second_loop_device_over_a_mounted_image_is_refused_even_with_force(tmp_path: Path, device: str) -> None:
    image, where = tmp_path / "disk.img", tmp_path / "mounted"
    make_filesystem(device)
    where.mkdir()
    mounted = subprocess.run(["mount", device, str(where)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mount fails here: {mounted.stderr.strip()}")
    try:
        (where / "file").write_text("mine")
        second = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=True)
        other = second.stdout.strip()
        before = bytes_of(other)
        try:
            for target in (other, str(image)):
                with pytest.raises(UnusableInput, match=f"{target} is in use .*nothing was written"):
                    pack_tiny(tmp_path, targets=[target], force=True)
            with pytest.raises(UnusableInput, match=f"--kv-device {other} is in use"):
                KVTarget(other, MIB, [])
            assert bytes_of(other) == before
        finally:
            subprocess.run(["losetup", "--detach", other], check=True)
        assert (where / "file").read_text() == "mine"
    finally:
        subprocess.run(["umount", str(where)], check=True)


def make_filesystem(target: str) -> None:
    mkfs = shutil.which("mkfs.ext4", path=SBIN)
    if mkfs is None:
        pytest.skip("mkfs.ext4 is not installed")
    subprocess.run([mkfs, "-q", "-F", target], check=True)


def test_a_file_that_holds_a_filesystem_needs_force(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    make_filesystem(str(image))
    before = image.read_bytes()
    with pytest.raises(UnusableInput, match=f"{image} bears a signature of type ext4.*--force overwrites it"):
        pack_tiny(tmp_path, targets=[str(image)])
    assert image.read_bytes() == before
    pack_tiny(tmp_path, targets=[str(image)], force=True)
    pack_tiny(tmp_path, targets=[str(image)])  # a packed store is no filesystem


@pytest.mark.root
def test_too_small_a_device_stays_as_it_is(tmp_path: Path) -> None:
    needed = plan_store(CONFIG, torch.bfloat16, 1).target_bytes
    with loop_device(tmp_path / "small.img", needed - 4096) as device:
        before = bytes_of(device)
        with pytest.raises(DoesNotFit, match=f"{device} is too small.*nothing was written"):
            pack_tiny(tmp_path, targets=[device])
        assert bytes_of(device) == before
    with loop_device(tmp_path / "exact.img", needed) as device:
        pack_tiny(tmp_path, targets=[device])


@pytest.mark.root
def test_the_question_names_the_device_and_what_it_bears(tmp_path: Path, device: str) -> None:
    mkswap = shutil.which("mkswap", path=SBIN)
    if mkswap is None:
        pytest.skip("mkswap is not installed")
    subprocess.run([mkswap, device], check=True, capture_output=True)
    questions: list[str] = []

    def no(question: str) -> bool:
        questions.append(question)
        return False

    before = bytes_of(device)
    request = PackRequest((device,), tmp_path / "m.json", torch.bfloat16, force=True)
    with pytest.raises(UnusableInput, match="not confirmed"):
        pack(checkpoint(), request, confirm=no)
    assert f"{device} (which bears a signature of type swap)" in questions[0]
    assert bytes_of(device) == before
