"""What is done to whole stores: SIGKILL, full disks and readers, for real, in processes of their own."""

import os
import sys
import tempfile

import pytest
from store.samples import write
from store.test_crash import HERE, in_a_mount, run

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, merge

PROGRAM = HERE / "life_crash.py"
JOBS = {"delete", "compact", "merge", "quantize", "export", "index", "sidecar"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What happened, by kind; one process, because its start is a part of the time. On a disk that takes no time to
    fsync, where there is one: a killed process needs none."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path_factory.mktemp("life")
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        return run(sys.executable, PROGRAM, scratch, "steps", "random", "readers", "limit")


def test_sigkill_before_every_step(seen):
    kills = seen["steps"]
    assert kills["delete"] >= 10
    assert kills["compact"] >= 20
    assert kills["merge"] >= 20
    assert kills["quantize"] >= 15
    assert kills["index"] >= 4
    assert kills["sidecar"] >= 5


def test_sigkill_at_random_times(seen):
    assert seen["random"] >= 20


def test_readers_beside_a_writer_that_deletes_and_compacts(seen):
    assert seen["readers"]["opened"] >= 20
    assert seen["readers"]["states"] >= 5


def test_files_that_cannot_grow(seen):
    said = seen["limit"]
    assert {name for name in said if name.endswith(" 0")} == {f"{job} 0" for job in JOBS}
    assert {"compact 600", "merge 600", "quantize 600"} <= said.keys()
    for text in said.values():
        assert "File too large" in text
        assert "\n" not in text


def test_a_full_file_system(tmp_path):
    said = in_a_mount(tmp_path, "12m", sys.executable, PROGRAM, tmp_path, "mount")["mount"]
    assert {name for name in said if name.endswith(" 0")} == {f"{job} 0" for job in JOBS}
    assert {"compact 12288", "merge 12288", "quantize 12288"} <= said.keys()
    for text in said.values():
        assert "No space left on device" in text
        assert "\n" not in text


def test_two_writers(tmp_path):
    path = write(tmp_path / "s")
    with GradientStore.open(path, mode="append") as writer:
        with pytest.raises(StoreError, match="is being written by another process"):
            GradientStore.open(path, mode="append")
        writer.delete(["row-1"])
    held = GradientStore.create(tmp_path / "other", {"a": (2, 2)})
    with pytest.raises(StoreError, match="is being written by another process"):
        merge([path], tmp_path / "other")
    held.close()
