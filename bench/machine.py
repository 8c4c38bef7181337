"""What a result must name so that it can be read later: the machine, the commit, the versions."""

import platform
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def commit() -> str:
    """The commit measured, with "+" where the tree holds changes to code."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../logra_kernels", "../csrc", "../python", ".", ":!results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


@cache
def triton_version() -> str:
    if find_spec("triton") is None:
        return "absent"
    import triton

    return triton.__version__
