"""A tiny model and data on disk, and two ways to run a command: in this process, and in one that can be killed."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from integrations import tiny_lm

from logra_kernels.cli.main import main

# at random: then what is logged does not depend on which rows there were when the store was begun
SHAPE = ["--rank", "4", "--batch-size", "2", "--rows-per-shard", "16", "--projection", "orthonormal"]
SHAPE += ["--window", "12"]  # so that most shards end within one
ROWS = 160


def write_rows(path: Path, texts: list[str]) -> Path:
    records = ({"id": f"r{i}", "text": text, "source": f"book {i % 3}"} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def call(*argv) -> int:
    """Run a command in this process; gives its exit code."""
    return main([str(part) for part in argv])


def contents(store: Path) -> dict[str, str]:
    """Every file of a store and the hash of its bytes."""
    files = (path for path in sorted(store.rglob("*")) if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The model is so small that a second thread costs more than it brings; the forked commands have one too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny_lm.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def memory_dir(tmp_path):
    """A directory on a disk that takes no time to fsync, where there is one: stores sync five times a shard."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def texts():
    return tiny_lm.sentences(ROWS, seed=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory, texts):
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", texts)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, model_dir, data):
    """A store of all rows, logged without any interruption; not to be written to."""
    store = tmp_path_factory.mktemp("whole") / "store"
    assert call("log", model_dir, data, "--out", store, *SHAPE) == 0
    return store


@pytest.fixture
def fails(capsys):
    """Run a command that must end in exit code 1 and one line on stderr; gives the line."""

    def run(*argv):
        capsys.readouterr()
        assert call(*argv) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("logra: error: ")
        return lines[0]

    return run


class Commands:
    """Runs commands in processes forked from one that has imported everything, each with a death of its own."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("fork_server.py")
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(self, *argv, file_size: int | None = None) -> int:
        """Begin a command and return its process id."""
        request = {"argv": [str(part) for part in argv], "file_size": file_size}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._read())

    def wait(self) -> tuple[int, list[str]]:
        """(exit code, negative for a signal; lines on stderr apart from progress) of the command started last."""
        code, error = json.loads(self._read())
        return code, [line for line in error.splitlines() if line and "row/s" not in line]

    def run(self, *argv, file_size: int | None = None) -> tuple[int, list[str]]:
        self.start(*argv, file_size=file_size)
        return self.wait()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def _read(self) -> str:
        return self._server.stdout.readline().strip()


@pytest.fixture(scope="session")
def commands():
    made = Commands()
    yield made
    made.close()
