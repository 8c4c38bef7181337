"""Compiles what the Triton launchers launch, for a GPU that is not there: `python ahead_of_time.py 90`.

The launchers run on CPU tensors with JITFunction.run replaced: the arguments of each launch become a signature and go
through Triton and ptxas. Prints one JSON line a launch.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from logra_kernels.ops.accumulate_gram.triton import launch as accumulate_gram
from logra_kernels.ops.project_grad.triton import launch as project_grad
from logra_kernels.ops.project_rows.triton import launch as project_rows
from logra_kernels.ops.score_block.triton import launch as score_block
from logra_kernels.ops.score_topk.triton import launch as score_topk

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def signature_of(kernel: JITFunction, args: tuple, options: dict) -> tuple[dict, dict, dict]:
    """What Triton's own specialisation makes of the arguments: 1 and None are constants, multiples of 16 are known."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = args[i] if i < len(args) else options.pop(name)
        multiple = False
        if kernel.params[i].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], multiple = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        else:
            signature[name], multiple = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if multiple:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiling_instead(arch: int, launches: list):
    def run(self: JITFunction, *args, grid, warmup, **options):
        signature, constants, attributes = signature_of(self, args, options)
        source = ASTSource(self, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        launches.append({"kernel": self.__name__, "cubin": len(made.asm["cubin"]), "shared": made.metadata.shared})

    return run


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def cases(dtype: torch.dtype) -> dict:
    x, dy, p_in, p_out = (rows(*s, dtype=dtype) for s in ((2, 96, 256), (2, 96, 384), (64, 256), (100, 384)))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    odd = rows(2, 96, 257, dtype=dtype)[..., 1:]
    weights, offsets = rows(192, dtype=acc), torch.tensor([0, 90, 192])
    queries, store, scale = rows(8, 512, dtype=acc), rows(64, 512, dtype=dtype), rows(64, dtype=acc)
    return {
        "project_rows": lambda: project_rows(x, p_in),
        "project_rows-odd": lambda: project_rows(odd, p_in[:, ::2].expand(64, 128).repeat(1, 2)[:7]),
        "project_grad": lambda: project_grad(x, dy, p_in, p_out, None, None),
        "project_grad-large": lambda: project_grad(
            x, dy, rows(300, 256, dtype=dtype), rows(256, 384, dtype=dtype), None, None
        ),
        "project_grad-ragged": lambda: project_grad(odd.flatten(0, 1), dy.flatten(0, 1), p_in, p_out, offsets, weights),
        "project_grad-projected": lambda: project_grad(rows(2, 96, 64, dtype=acc), dy, None, p_out, None, None),
        "accumulate_gram": lambda: accumulate_gram(rows(50, 200, dtype=dtype), rows(200, 200, dtype=acc)),
        "score_block": lambda: score_block(store[:8], store),
        "score_block-mixed": lambda: score_block(queries, store),
        "score_topk": lambda: score_topk(queries, store, 5, scale, True),
    }


def main(arch: int, *dtypes: str) -> None:
    for dtype in dtypes:
        for name, launch in cases(getattr(torch, dtype)).items():
            launches: list = []
            JITFunction.run = compiling_instead(arch, launches)
            line = {"case": name, "dtype": dtype, "error": None}
            try:
                launch()
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(line | {"launches": launches}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
