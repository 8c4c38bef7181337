"""The ops' tests by every instruction set that this machine lacks: `python tests/isa.py [sets]`, or `make test-isa`.

Kernels of AVX-512 and AMX run in plain C++ (tests/emulated) on any x86-64 machine with AVX2, and what they would do
wrong there they do wrong here; how fast they are is not seen. The extension made so lies in build/emulated and knows
every set. Sets may be named, as LOGRA_KERNELS_ISA names them.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from logra_kernels import _C

ROOT = Path(__file__).parents[1]
MADE = ROOT / "build" / "emulated"
SETS = ["v4", "v4vnni", "v4bf16", "v4amx"]
TESTS = [str(ROOT / "tests" / name) for name in ("ops", "test_native.py")]
LEFT_OUT = "not triton and not cuda and not bf16_instructions_are_used_where_there_are_any"
FLAGS = ["-O1", "-march=x86-64-v3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden"]
COMPILER = os.environ.get("CXX", "g++").split()
QUIET = ["-Wno-psabi", "-Wno-ignored-attributes"]

NARROW = {  # intrinsics of shorter vectors that AVX-512 brings
    "_mm_maskz_loadu_ps": "maskz_loadu_ps_128",
    "_mm_maskz_cvtepi32_epi8": "maskz_cvtepi32_epi8_128",
    "_mm256_maskz_loadu_epi16": "maskz_loadu_epi16_256",
    "_mm256_mask_storeu_epi16": "mask_storeu_epi16_256",
}
ASSEMBLY = [  # (in csrc, here)
    (r'asm\("(vpdpbusd|vdpbf16ps) %2, %1, %0" : "\+v"\(sum\) : "v"\((\w+)\), "v"\((\w+)\)\);', r"\1(sum, \2, \3);"),
    (
        r'asm\("vdpbf16ps %2%\{1to16%\}, %1, %0" : "\+v"\(sum\) : "v"\(b\), "m"\(.*?\(a\)\)\);',
        "vdpbf16ps_all(sum, b, a);",
    ),
    (r'asm volatile\("ldtilecfg %0" : : "m"\(config\)\)', "ldtilecfg(&config)"),
    (r'asm volatile\("tilerelease"\)', "tilerelease()"),
    (r'asm volatile\("tilezero [^;]*;', "tilezero(kTile);"),
    (r'asm volatile\("tileloadd [^;]*;', "tileloadd(kTile, from, stride, kOffset);"),
    (r'asm volatile\("tilestored [^;]*;', "tilestored(kTile, to, stride);"),
    (r'asm volatile\("(tdp\w+) [^:]*: : "i"\((\w+)\), "i"\((\w+)\), "i"\((\w+)\)\);', r"\1(\2, \3, \4);"),
]


def emulated(source: str) -> str:
    """A source of csrc with calls of functions in tests/emulated where it had instructions beyond AVX2."""
    source = re.sub(r"#pragma GCC target\([^)]*\)", "", source)
    source = re.sub(r'__builtin_cpu_supports\("(avx512|amx)[^"]*"\)', "true", source)
    source = re.sub(r"syscall\(SYS_arch_prctl[^)]*\)", "0", source)
    for theirs, ours in ASSEMBLY:
        source = re.sub(theirs, f"emulated::{ours}", source)
    source = re.sub(r"\b_mm512_(\w+)", r"emulated::\1", source)
    for theirs, ours in NARROW.items():
        source = re.sub(rf"\b{theirs}\b", f"emulated::{ours}", source)
    return f'#include "emulated/amx.h"\n{source}' if "emulated::" in source else source


def compiled(source: Path) -> Path:
    target = MADE / "objects" / source.relative_to(MADE).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    folders = MADE / "csrc", ROOT / "tests", pybind11.get_include(), sysconfig.get_path("include")
    includes = [f"-I{folder}" for folder in folders]
    subprocess.run([*COMPILER, *FLAGS, *QUIET, *includes, "-c", str(source), "-o", str(target)], check=True)
    return target


def build() -> None:
    """build/emulated/logra_kernels: the package as it is, with the extension made of emulated sources."""
    shutil.rmtree(MADE, ignore_errors=True)
    shutil.copytree(ROOT / "logra_kernels", MADE / "logra_kernels", ignore=shutil.ignore_patterns("*.so"))
    for folder in ("csrc", "python"):
        shutil.copytree(ROOT / folder, MADE / folder)
    for source in (*MADE.glob("csrc/*/*.cpp"), *MADE.glob("csrc/*/*.inc"), *MADE.glob("csrc/*/*.h")):
        source.write_text(emulated(source.read_text()))
    jobs = int(os.environ.get("LOGRA_KERNELS_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, [*MADE.glob("csrc/*/cpu*.cpp"), MADE / "python" / "module.cpp"]))
    target = MADE / "logra_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*COMPILER, "-shared", "-fopenmp", *map(str, objects), "-o", str(target)], check=True)


def main(names: list[str]) -> int:
    wanted = names or [name for name in SETS if name not in _C.isas()]
    if unknown := set(wanted) - set(SETS):
        sys.exit(f"no such instruction set to emulate: {', '.join(sorted(unknown))} (there are: {', '.join(SETS)})")
    if not wanted:
        print("this machine has every instruction set; `make test` runs them")
        return 0
    build()
    failed = []
    for name in wanted:
        print(f"{name}, emulated:", flush=True)
        environment = os.environ | {"LOGRA_KERNELS_ISA": name, "OMP_WAIT_POLICY": "passive"}
        asked = ["-q", "-p", "no:cacheprovider", "-n", str(min(4, os.cpu_count() or 1)), "--dist", "worksteal"]
        command = [sys.executable, "-m", "pytest", *asked, "-k", LEFT_OUT, *TESTS]
        if subprocess.run(command, cwd=MADE, env=environment).returncode:  # where Python finds the package first
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
