"""The package with its C++ kernels compiled another way, beside the one that `make test` tests."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden"]
COMPILER = os.environ.get("CXX", "g++").split()


def build(made: Path, flags: list[str], rewrite: Callable[[str], str] = str) -> None:
    """`made`/logra_kernels: the package as it is, with the extension made of rewritten sources by FLAGS and flags."""
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(ROOT / "logra_kernels", made / "logra_kernels", ignore=shutil.ignore_patterns("*.so"))
    for folder in ("csrc", "python"):
        shutil.copytree(ROOT / folder, made / folder)
    for source in (*made.glob("csrc/*/*.cpp"), *made.glob("csrc/*/*.inc"), *made.glob("csrc/*/*.h")):
        source.write_text(rewrite(source.read_text()))
    jobs = int(os.environ.get("LOGRA_KERNELS_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        sources = [*made.glob("csrc/*/cpu*.cpp"), made / "python" / "module.cpp"]
        objects = list(pool.map(partial(_compiled, made, [*FLAGS, *flags]), sources))
    target = made / "logra_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*COMPILER, *FLAGS, *flags, "-shared", *map(str, objects), "-o", str(target)], check=True)


def _compiled(made: Path, flags: list[str], source: Path) -> Path:
    target = made / "objects" / source.relative_to(made).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    folders = made / "csrc", ROOT / "tests", pybind11.get_include(), sysconfig.get_path("include")
    includes = [f"-I{folder}" for folder in folders]
    subprocess.run([*COMPILER, *flags, *includes, "-c", str(source), "-o", str(target)], check=True)
    return target


def run(made: Path, tests: list[str], left_out: str, environment: dict[str, str]) -> bool:
    """Whether the tests of the package in `made` pass, but for those that the expression names."""
    testers = str(min(4, os.cpu_count() or 1))
    asked = ["-q", "-p", "no:cacheprovider", "-n", testers, "--dist", "worksteal", "-k", f"not ({left_out})"]
    command = [sys.executable, "-m", "pytest", *asked, *(str(ROOT / "tests" / name) for name in tests)]
    given = os.environ | {"OMP_WAIT_POLICY": "passive"} | environment
    return subprocess.run(command, cwd=made, env=given).returncode == 0  # where Python finds the package first
