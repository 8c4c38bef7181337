"""The tests of kernels on this machine's CUDA device: `python tests/gpu.py [pytest's arguments]`, or `make test-gpu`.

Most of their time is Triton's, which compiles some six hundred kernels: pytest-xdist, where it is installed, spreads
that over the cores, and replaces a process whose device was lost to a broken kernel. A run is stopped after LIMIT
seconds; what has failed by then has been printed.
"""

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

LIMIT = 360
ROOT = Path(__file__).parents[1]


def options(cores: int) -> list[str]:
    """pytest's, by the plugins that are here."""
    chosen = ["-m", "gpu", "-q", "-s", "-p", "instantly", "--tb=short", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None:
        chosen += ["-n", str(max(1, min(12, cores - 2))), "--dist", "worksteal", "--max-worker-restart", "24"]
    if find_spec("pytest_timeout") is not None:
        chosen += ["--timeout", "150", "--timeout-method", "thread"]  # no signal ends a wait for the device
    return chosen


def run(command: list[str], limit: float, environment: dict[str, str]) -> int:
    """Its exit status; interrupted after `limit` seconds, and killed if that does not help."""
    child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit:.0f} s", flush=True)
        child.send_signal(signal.SIGINT)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return 124


def main(arguments: list[str]) -> int:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(
        f"{device or 'no CUDA device: its tests will be skipped'}; torch {torch.__version__},"
        f" triton {version('triton') if find_spec('triton') else 'absent'}, Python {sys.version.split()[0]}",
        flush=True,
    )
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "2"}
    if device is None:
        return run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", *arguments], LIMIT, environment)
    table = subprocess.Popen(
        [sys.executable, "-c", "from logra_kernels.selftest import render, run; print(render(run()))"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    status = run([sys.executable, "-m", "pytest", *options(cores), *arguments], LIMIT, environment)
    try:
        print(table.communicate(timeout=30)[0])
    except subprocess.TimeoutExpired:
        table.kill()
        print(table.communicate()[0], "the self-test was not done in time", sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
