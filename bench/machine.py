"""What a result must name so that it can be read later: the machine, the commit, the versions."""

import platform
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SETS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}  # the widest first


def _zen(facts: dict[str, str], flags: set[str]) -> str | None:
    """AMD's generation since Zen 3, which a virtual machine's name of the processor leaves out."""
    family = facts.get("cpu family") if facts.get("vendor_id") == "AuthenticAMD" else None
    return {"25": "Zen 4" if "avx512f" in flags else "Zen 3", "26": "Zen 5"}.get(family or "")


@cache
def cpu_model() -> str:
    """The processor and the widest set of instructions it has: virtual machines name several generations alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    widest = next((name for flag, name in SETS.items() if flag in flags), None)
    return ", ".join(filter(None, (facts.get("model name", platform.machine()), _zen(facts, flags), widest)))


@cache
def commit() -> str:
    """The commit measured, with "+" where the tree holds changes to code."""

    def git(*words: str) -> str:
        try:
            ran = subprocess.run(("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # there is none
            return ""
        return ran.stdout.strip()

    changed = git("status", "--porcelain", "--", "../logra_kernels", "../csrc", "../python", ".", ":!results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


@cache
def triton_version() -> str:
    if find_spec("triton") is None:
        return "absent"
    import triton

    return triton.__version__
