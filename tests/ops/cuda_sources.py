"""A CUDA C++ source made to run on a CPU (tests/ops/cuda_on_cpu), and what nvcc made of it."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[-1])


class OnCpu:
    """The library made of tests/ops/cuda_on_cpu/<op>.cpp in `folder`; its one function runs the op's kernels."""

    def __init__(self, op: str, folder: Path) -> None:
        assert COMPILER is not None
        path, here = folder / f"{op}.so", ROOT / "tests" / "ops" / "cuda_on_cpu"
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{here}"]
        subprocess.run([COMPILER, *flags, str(here / f"{op}.cpp"), "-o", str(path)], check=True)
        self._run = getattr(ctypes.CDLL(str(path)), op)
        self._run.restype = ctypes.c_char_p

    def __call__(self, *args) -> None:
        error = self._run(*args)
        if error is not None:
            raise RuntimeError(error.decode())


def _tool() -> str | None:
    """cuobjdump: CUDA's own, or the one that Triton brings."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec is not None and spec.origin else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=folder)


CUOBJDUMP, BUILT = _tool(), next(iter(ROOT.glob("logra_kernels/_C_cuda*.so")), None)
is_built = pytest.mark.skipif(CUOBJDUMP is None or BUILT is None, reason="no cuobjdump, or _C_cuda is not built")


def _listing(arch: str, *what: str) -> str:
    assert CUOBJDUMP is not None
    command = [CUOBJDUMP, "-arch", f"sm_{arch}", *what, str(BUILT)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def stacks(op: str, arch: str) -> dict[str, int]:
    """Built kernel of csrc/<op> -> bytes a thread keeps in memory: what it spills, since none has arrays there."""
    found = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _listing(arch, "-res-usage"))
    return {name: int(stack) + int(local) for name, stack, local in found if f"3lgk{len(op)}{op}" in name}


def machine_code(kernels: list[str], arch: str) -> list[str]:
    """The instructions of each, which are named as in `stacks`."""
    return _listing(arch, "-sass", "-fun", ",".join(kernels)).split("Function : ")[1:]


def said_by_nvcc() -> str:
    """What nvcc said when the kernels were built (setup.py keeps it)."""
    return (ROOT / "build" / "nvcc.log").read_text()
