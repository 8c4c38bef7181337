"""The ops' tests by every instruction set that this machine lacks: `python tests/isa.py [sets]`, or `make test-isa`.

Kernels of AVX-512 and AMX run in plain C++ (tests/emulated) on any x86-64 machine with AVX2, and what they would do
wrong there they do wrong here; how fast they are is not seen. The extension made so lies in build/emulated and knows
every set. Sets may be named, as LOGRA_KERNELS_ISA names them.
"""

import re
import sys

from variant import ROOT, build, run

from logra_kernels import _C

MADE = ROOT / "build" / "emulated"
SETS = ["v4", "v4vnni", "v4bf16", "v4amx"]
TESTS = ["ops", "test_native.py"]
LEFT_OUT = "triton or cuda or bf16_instructions_are_used_where_there_are_any"
FLAGS = ["-march=x86-64-v3", "-Wno-psabi", "-Wno-ignored-attributes"]

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
    source = source.replace('asm("" : "+v"(v));', "")  # no register here holds these vectors
    source = re.sub(r"syscall\(SYS_arch_prctl[^)]*\)", "0", source)
    for theirs, ours in ASSEMBLY:
        source = re.sub(theirs, f"emulated::{ours}", source)
    source = re.sub(r"\b_mm512_(\w+)", r"emulated::\1", source)
    for theirs, ours in NARROW.items():
        source = re.sub(rf"\b{theirs}\b", f"emulated::{ours}", source)
    return f'#include "emulated/amx.h"\n{source}' if "emulated::" in source else source


def main(names: list[str]) -> int:
    wanted = names or [name for name in SETS if name not in _C.isas()]
    if unknown := set(wanted) - set(SETS):
        sys.exit(f"no such instruction set to emulate: {', '.join(sorted(unknown))} (there are: {', '.join(SETS)})")
    if not wanted:
        print("this machine has every instruction set; `make test` runs them")
        return 0
    build(MADE, FLAGS, emulated)
    failed = []
    for name in wanted:
        print(f"{name}, emulated:", flush=True)
        if not run(MADE, TESTS, LEFT_OUT, {"LOGRA_KERNELS_ISA": name}):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
