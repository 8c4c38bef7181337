"""A CUDA C++ source made to run on a CPU (tests/ops/cuda_on_cpu), and compiled by nvcc."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

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


def machine_code(op: str, arch: str, made: Path) -> tuple[dict[str, int], str]:
    """Kernel -> bytes a thread spills, and what the compiler said; csrc/<op>/cuda.cu becomes the cubin `made`."""
    assert NVCC is not None
    source, target = ROOT / "csrc" / op / "cuda.cu", f"-gencode=arch=compute_{arch},code=sm_{arch}"
    flags = ["-std=c++17", f"-I{ROOT / 'csrc'}", target, "-cubin", "-Xptxas", "-v"]
    told = subprocess.run(
        [NVCC, *flags, str(source), "-o", str(made)], capture_output=True, text=True, check=True
    ).stderr
    names = [line.split("'")[1] for line in told.splitlines() if "Compiling entry function" in line]
    spills = [int(line.split()[4]) for line in told.splitlines() if "spill stores" in line]
    return dict(zip(names, spills, strict=True)), told
