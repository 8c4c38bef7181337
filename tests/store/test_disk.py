"""Large files past the page cache: the same bytes as the plain way, whatever their length; errors leave nothing."""

import errno
import os
import threading

import numpy as np
import pytest
from store.samples import LAYERS, part_of, tree, write

from logra_kernels.store import GradientStore
from logra_kernels.store.durable import ZEROS, digest
from logra_kernels.store.writing import commit, disk, writer

HEAD = b"head" + ZEROS + b"." * 28
AT = 4
SLOT = 2 * disk.BLOCK


@pytest.fixture
def small_slots(monkeypatch):
    monkeypatch.setattr(disk, "SLOT_BYTES", SLOT)


def payload_of(*lengths):
    return [np.random.randint(0, 256, length, np.uint8).data for length in lengths]


def expected(payload):
    checksum = digest(HEAD, *payload)
    return HEAD.replace(ZEROS, checksum.encode()) + b"".join(payload), checksum


@pytest.mark.parametrize(
    "lengths",
    [(SLOT - len(HEAD),), (SLOT - len(HEAD) - 1,), (SLOT,), (1, 2, SLOT, 3), (5 * SLOT + 17,), (disk.BLOCK, 6 * SLOT)],
)
@pytest.mark.parametrize("threaded", [True, False])
def test_bytes_and_checksum(tmp_path, small_slots, lengths, threaded):
    payload = payload_of(*lengths)
    with disk.Disk() as writes:
        file, checksum = disk.begin_sealed(tmp_path, "x", HEAD, AT, payload, writes if threaded else None)
    assert not (tmp_path / "x").exists()
    file.settle()
    assert ((tmp_path / "x").read_bytes(), checksum) == expected(payload)
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_system_that_refuses_direct_writes(tmp_path, small_slots, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(disk, "_leave_direct", lambda fd: refused.append(fd) or len(refused) < 2)
    refused = []

    def pwrite(fd, data, offset):
        if not refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data[:5000], offset)

    monkeypatch.setattr(disk, "_begin_direct", disk.Temporary)
    monkeypatch.setattr(os, "pwrite", pwrite)
    payload = payload_of(4 * SLOT)
    with disk.Disk() as writes:
        file, _ = disk.begin_sealed(tmp_path, "x", HEAD, AT, payload, writes)
    file.settle()
    assert (tmp_path / "x").read_bytes() == expected(payload)[0]
    assert refused


@pytest.mark.parametrize("good_writes", [0, 1, 4])
def test_an_error_leaves_nothing_and_the_next_file_is_whole(tmp_path, small_slots, monkeypatch, good_writes):
    real, left = os.pwrite, [good_writes]

    def pwrite(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    payload = payload_of(9 * SLOT)
    with disk.Disk() as writes:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "pwrite", pwrite)
            disk.begin_sealed(tmp_path, "x", HEAD, AT, payload, writes)[0].settle()
        assert os.listdir(tmp_path) == []
        disk.begin_sealed(tmp_path, "x", HEAD, AT, payload, writes)[0].settle()
    assert (tmp_path / "x").read_bytes() == expected(payload)[0]


def test_a_store_is_the_same_either_way(tmp_path, monkeypatch):
    plain = tree(write(tmp_path / "plain", 1200, rows_per_shard=500))
    monkeypatch.setattr(disk, "SLOT_BYTES", SLOT)
    assert tree(write(tmp_path / "direct", 1200, rows_per_shard=500)) == plain


def test_manifests_are_a_small_part_of_what_is_written(tmp_path, monkeypatch):
    written = []
    real = commit.write_manifest
    monkeypatch.setattr(commit, "write_manifest", lambda *a: written.append(real(*a)) or written[-1])
    monkeypatch.setattr(commit, "BYTES_PER_MANIFEST_BYTE", 8)
    monkeypatch.setattr(commit, "MOST_SECONDS", 1e9)
    path = write(tmp_path / "s", 600, rows_per_shard=1)
    rows = sum(len(data) for name, data in tree(path).items() if name.startswith("rows-"))
    assert 3 <= len(written) < 100
    assert sum(written[:-2]) <= rows / 8  # the last two belong to the group that `close` cut short


def test_what_a_group_holds_back_is_committed_in_a_pause(tmp_path, monkeypatch):
    done = threading.Event()
    real = commit.write_manifest

    def write_manifest(directory, manifest):
        if manifest.rows == 16:
            done.set()
        return real(directory, manifest)

    monkeypatch.setattr(writer, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(commit, "BYTES_PER_MANIFEST_BYTE", 1e9)
    monkeypatch.setattr(commit, "write_manifest", write_manifest)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        store.append(*part_of(20, 0, 20))
        assert done.wait(20)
    assert len(GradientStore.open(tmp_path / "s")) == 20
