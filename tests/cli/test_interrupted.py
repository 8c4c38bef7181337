"""However a logging run ends, its rows are whole, and a rerun ends in the bytes of a run that was never disturbed."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cli.conftest import ROWS, SHAPE, call, contents

from logra_kernels.run import Run
from logra_kernels.store import GradientStore


def _await_rows(store: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if GradientStore.exists(store) and len(GradientStore.open(store)) >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"{store} never had {count} rows")


@pytest.fixture
def store(memory_dir):
    return memory_dir / "store"


@pytest.fixture
def log(model_dir, data, store):
    """The command that every case disturbs."""
    return ["log", model_dir, data, "--out", store, *SHAPE]


def test_a_forked_process_logs_the_same_bytes(commands, log, store, whole):
    assert commands.run(*log) == (0, [])
    assert contents(store) == contents(whole)


@pytest.mark.parametrize("moment", range(6))
def test_kill_9_at_a_random_moment(commands, log, store, whole, moment):
    # Drawn over the run's progress, and then some milliseconds, so that a slow machine is hit everywhere too.
    draw = random.Random(moment)
    pid = commands.start(*log)
    _await_rows(store, draw.randint(0, ROWS))
    time.sleep(draw.uniform(0.0, 0.03))
    with suppress(ProcessLookupError):  # the run may have been done already; nothing else ends it in another way
        os.kill(pid, signal.SIGKILL)
    code, _ = commands.wait()
    assert code in (-signal.SIGKILL, 0)
    left = GradientStore.open(store)
    assert left.ids == [f"r{i}" for i in range(len(left))]
    assert commands.run(*log) == (0, [])
    assert contents(store) == contents(whole)


def test_ctrl_c_leaves_a_store_that_the_shown_command_completes(commands, log, store, whole):
    pid = commands.start(*log)
    _await_rows(store, 16)
    os.kill(pid, signal.SIGINT)
    code, lines = commands.wait()
    assert code == 130
    assert len(lines) == 1
    assert lines[0].startswith("logra: interrupted; what was logged is kept, go on with: logra log ")
    assert 16 <= len(GradientStore.open(store)) < ROWS
    assert commands.run(*shlex.split(lines[0].partition(": logra ")[2])) == (0, [])
    assert contents(store) == contents(whole)


def test_a_learned_projection_is_the_same_after_ctrl_c(commands, model_dir, data, memory_dir):
    paths = [memory_dir / name for name in ("whole", "cut")]
    argv = ["log", model_dir, data, "--rank", "4", "--batch-size", "2", "--rows-per-shard", "16", "--observe", "30"]
    assert commands.run(*argv, "--out", paths[0]) == (0, [])
    pid = commands.start(*argv, "--out", paths[1])
    _await_rows(paths[1], 16)
    os.kill(pid, signal.SIGINT)
    assert commands.wait()[0] == 130
    assert commands.run(*argv, "--out", paths[1]) == (0, [])
    assert GradientStore.open(paths[0]).projection["kind"] == "pca"
    assert contents(paths[1]) == contents(paths[0])


def test_ctrl_c_while_the_curvature_is_computed(log, store, whole, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finalize", interrupted)
        assert call(*log) == 130
    assert "go on with: logra log" in capsys.readouterr().err
    assert len(GradientStore.open(store)) == ROWS
    assert call(*log) == 0
    assert contents(store) == contents(whole)


def test_file_size_limit(commands, log, store, whole):
    assert call(*log, "--limit", "24") == 0  # whole windows
    before = len(GradientStore.open(store))
    # A shard of 16 rows has 15 KB of numbers; manifest and columns stay below the limit.
    code, lines = commands.run(*log, file_size=12_000)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("logra: error: File too large")
    assert "ulimit -f" in lines[0]
    assert len(GradientStore.open(store)) == before
    assert call("info", store, "--verify") == 0
    assert commands.run(*log) == (0, [])
    assert contents(store) == contents(whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 KB, where mounting is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=100k", "none", str(disk)]
    if os.geteuid() != 0 or mount is None or subprocess.run([mount, *options], capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_full(commands, model_dir, data, small_disk, whole):
    store = small_disk / "store"
    log = ["log", model_dir, data, "--out", store, *SHAPE]
    code, lines = commands.run(*log)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("logra: error: No space left on device")
    assert "free some space" in lines[0]
    assert 0 < len(GradientStore.open(store)) < ROWS
    assert call("info", store, "--verify") == 0
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert commands.run(*log) == (0, [])
    assert contents(store) == contents(whole)
