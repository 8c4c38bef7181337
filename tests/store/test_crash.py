"""SIGKILL and full disks, for real, in processes of their own."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from store.samples import write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore

HERE = Path(__file__).parent
PATHS = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}


def run(*command, timeout=120):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_sigkill_at_random_times(tmp_path):
    seen = run(sys.executable, HERE / "crash.py", "random", tmp_path)
    assert seen["kills"] >= 16
    assert seen["states"] >= 4  # the kills came at different places


def test_sigkill_before_every_step(tmp_path):
    with contextlib.ExitStack() as stack:
        if os.access("/dev/shm", os.W_OK):  # some 3,000 fsyncs, of which a killed process needs none
            tmp_path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        seen = run(sys.executable, HERE / "crash.py", "steps", tmp_path)
    assert seen["kills"] >= 40
    assert seen["states"] >= 4


@pytest.mark.parametrize("kind", ["size", "manifest"])
def test_file_size_limit(tmp_path, kind):
    seen = run(sys.executable, HERE / "full_disk.py", kind, tmp_path)
    assert "File too large" in seen["said"]
    assert "raise the file size limit" in seen["said"]
    assert_useful(seen)


def in_a_mount(where, size, *command):
    """`run` with a small file system at `where` that only this command sees."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size={size} tmpfs {where}"
    if not shutil.which("unshare") or subprocess.run([*alone, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    return run(*alone, "sh", "-c", f"{mount} && exec {shlex.join(map(str, command))}")


def test_full_file_system(tmp_path):
    seen = in_a_mount(tmp_path, "512k", sys.executable, HERE / "full_disk.py", "mount", tmp_path)
    assert "No space left on device" in seen["said"]
    assert "free some space" in seen["said"]
    assert_useful(seen)


def assert_useful(seen):
    """Which shard, how many rows are safe, what to do; and at once."""
    assert "\n" not in seen["said"]
    assert "/store/rows-0000" in seen["said"]
    assert f"; {seen['rows']} rows are committed and intact;" in seen["said"]
    assert "mode='append'" in seen["said"]
    assert "skip_committed=True" in seen["said"]
    assert seen["rows"] >= 30
    assert seen["seconds"] < 20


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


def test_a_writer_in_another_process(tmp_path):
    path = write(tmp_path / "s")
    command = [sys.executable, "-c", HOLD, path / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match="is being written by another process"):
            GradientStore.open(path, mode="append")
        assert len(GradientStore.open(path)) == 20
        other.kill()
    GradientStore.open(path, mode="append").close()


def test_a_program_that_never_closes_its_store(tmp_path):
    program = (
        "import sys, torch; from logra_kernels.store import GradientStore\n"
        "store = GradientStore.create(sys.argv[1], {'a': (2, 2)}, rows_per_shard=8)\n"
        "store.append(torch.ones(21, 4), [str(i) for i in range(21)])\n"
        "sys.kept = store; print(0)"
    )
    run(sys.executable, "-c", program, tmp_path / "s")
    assert len(GradientStore.open(tmp_path / "s")) == 21
