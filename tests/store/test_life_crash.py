"""Deleting, compacting and merging: SIGKILL, full disks and readers, for real, in processes of their own."""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
from store.samples import write
from store.test_crash import HERE, run

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, merge


@pytest.fixture
def scratch(tmp_path):
    """On a disk that takes no time to fsync, where there is one: a killed process needs none."""
    with contextlib.ExitStack() as stack:
        if os.access("/dev/shm", os.W_OK):
            tmp_path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        yield tmp_path


def test_sigkill_before_every_step(scratch):
    kills = run(sys.executable, HERE / "life_crash.py", "steps", scratch)["kills"]
    assert kills["delete"] >= 10
    assert kills["compact"] >= 20
    assert kills["merge"] >= 20


def test_sigkill_at_random_times(scratch):
    assert run(sys.executable, HERE / "life_crash.py", "random", scratch)["kills"] >= 24


def test_readers_beside_a_writer_that_deletes_and_compacts(scratch):
    seen = run(sys.executable, HERE / "life_crash.py", "readers", scratch)
    assert seen["opened"] >= 20
    assert seen["states"] >= 5


def test_a_full_disk(scratch):
    said = run(sys.executable, HERE / "life_crash.py", "full", scratch)["said"]
    assert {name for name in said if name.endswith(" 0")} == {"delete 0", "compact 0", "merge 0"}
    assert {"compact 600", "merge 600"} <= said.keys()
    for text in said.values():
        assert "File too large" in text
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
