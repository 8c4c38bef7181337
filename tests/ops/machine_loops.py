"""What the machine code of a Triton kernel spills, loop by loop."""

import re
import struct
import subprocess
import tempfile
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
LOCAL = ("LDL", "STL")  # reads and writes of registers that were spilled
PRODUCTS = ("HMMA", "HGMMA", "IMMA", "IGMMA", "DMMA", "QGMMA", "FFMA", "DFMA")


def _name(instruction: str) -> str:
    """LDG.E.U8 of @P1 LDG.E.U8 R2, [R4.64]."""
    return instruction.removeprefix("@").split()[instruction.startswith("@")]


def has_stack(cubin: bytes) -> bool:
    """Whether a function keeps anything in local memory: its frame size, an attribute in .nv.info."""
    frames = re.finditer(rb"\x04\x11\x08\x00(?=.{8})", cubin, re.DOTALL)
    sizes = [struct.unpack_from("<II", cubin, frame.end())[1] for frame in frames]
    assert sizes
    return any(sizes)


def innermost_loops(cubin: bytes) -> list[list[str]]:
    """The names of the instructions of each loop without another in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    back: list[tuple[int, int]] = []
    for line in listed.splitlines():
        if label := re.match(r"\.?(L_x_\d+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/\s+(.*?);", line.strip()):
            code.append(instruction[1])
            jump = re.search(r"\bBRA\b.*?(L_x_\d+)", instruction[1])
            if jump and jump[1] in labels:
                back.append((labels[jump[1]], len(code)))
    inner = [loop for loop in back if not any(loop != at and loop[0] <= at[0] and at[1] <= loop[1] for at in back)]
    return [[_name(instruction) for instruction in code[first:end]] for first, end in inner]


def multiplying_loops(cubin: bytes) -> list[list[str]]:
    """Those of the innermost ones."""
    return [loop for loop in innermost_loops(cubin) if sum(name.startswith(PRODUCTS) for name in loop) > 1]


def most_spilled(cubin: bytes) -> float:
    """The largest share of instructions that move spilled registers, of the loops that multiply."""
    loops = multiplying_loops(cubin) if has_stack(cubin) else []  # nvdisasm takes half a second
    return max((sum(name.startswith(LOCAL) for name in loop) / len(loop) for loop in loops), default=0.0)


def counts(cubin: bytes) -> list[dict[str, int]]:
    """Of each loop that multiplies: its instructions, and how many of them load from or store to which memory."""
    kinds = ("LDG", "LDGSTS", "LDS", "STS", *LOCAL)
    loops = multiplying_loops(cubin)
    return [{"all": len(at)} | {kind: sum(i.partition(".")[0] == kind for i in at) for kind in kinds} for at in loops]
