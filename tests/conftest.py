import os

import pytest
import torch

if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel file is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS warns without it once the fixture below is on

_KEPT = 2 << 30  # bytes of the device's that a process keeps for its next test; there are several processes


def pytest_runtest_teardown(item):
    """After a broken kernel nothing runs on the device in this process: pytest-xdist begins another one."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        os.write(2, f"\n{item.nodeid} lost the device: {error}\n".encode())
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the device is lost", returncode=3)
    if torch.cuda.memory_reserved() > _KEPT:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def poisoned_memory_and_fixed_seed():
    """A kernel that leaves part of its output unwritten shows NaN (or the largest integer).

    torch fills new memory by itself in deterministic mode, below Python, so compiled code is covered too.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets torch's thread count for one test: threads(2)."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
