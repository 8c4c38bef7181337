"""Code of a wide instruction set is reached through its table alone: run earlier it kills machines without the set."""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def build_flags() -> list[str]:
    """What setup.py compiles the kernels with, but -O1: that takes half the time and inlines less, so nothing hides."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (flags,) = [word.value for call in calls for word in call.keywords if word.arg == "extra_compile_args"]
    flags = ["-O1" if flag == "-O3" else flag for flag in ast.literal_eval(flags)]
    assert "-O1" in flags
    return ["-std=c++17", "-fPIC", "-fvisibility=hidden", *flags]


@pytest.mark.parametrize(
    "source", sorted(ROOT.glob("csrc/*/cpu_v*.cpp")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_wide_set_exports_tables_and_no_code(source, tmp_path):
    target = tmp_path / "set.o"
    subprocess.run([COMPILER, *build_flags(), f"-I{ROOT / 'csrc'}", "-c", source, "-o", target], check=True)
    listed = subprocess.run(["nm", "-C", "--defined-only", target], check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listed.splitlines()]
    callable_elsewhere = [name for kind, name in symbols if kind in "TWi"]
    run_when_loaded = [name for _, name in symbols if name.startswith(("_GLOBAL__", "global constructors"))]
    assert callable_elsewhere == run_when_loaded == []
