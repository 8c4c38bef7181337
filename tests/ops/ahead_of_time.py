"""Compiles what the Triton launchers launch, for a GPU that is not there: `python ahead_of_time.py 90 bfloat16`.

The launchers run on CPU tensors with JITFunction.run replaced: the arguments of each launch become a signature and go
through Triton and ptxas. Prints one JSON line a launch; with a third argument, a part of cases' names, only theirs, and
what instructions their loops have.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial

import torch
import triton
from machine_loops import counts, most_spilled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from logra_kernels.ops._check import accumulator_dtype
from logra_kernels.ops._format import EncodedRows, RowFormat
from logra_kernels.ops._score import score
from logra_kernels.ops.accumulate_gram.triton import launch as accumulate_gram
from logra_kernels.ops.dequantize_rows.triton import launch as dequantize_rows
from logra_kernels.ops.factor_rows.triton import launch as factor_rows
from logra_kernels.ops.project_grad.configs import TILES, key_of
from logra_kernels.ops.project_grad.triton import launch as project_grad
from logra_kernels.ops.project_grad.triton import launch_tile
from logra_kernels.ops.project_rows.triton import launch as project_rows
from logra_kernels.ops.quantize_rows.triton import launch as quantize_rows
from logra_kernels.ops.score_block.triton import launch as score_block
from logra_kernels.ops.score_block.triton import launch_encoded as score_encoded
from logra_kernels.ops.score_factored.triton import launch as score_factored
from logra_kernels.ops.score_topk.triton import launch as score_topk

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
LAUNCHERS = ("_codes", "_score", "project_grad.triton")  # that ask for a device's compute capability
NARROW_LOAD = re.compile(r"\bld\.global\S*\.[bus](?:8|16)\b")  # of single bytes or halves
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a block can have


def signature_of(kernel: JITFunction, args: tuple, options: dict) -> tuple[dict, dict, dict]:
    """What Triton's own specialisation makes of the arguments: 1 and None are constants, multiples of 16 are known."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = args[i] if i < len(args) else options.pop(name)
        multiple = False
        if kernel.params[i].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            numbers = POINTERS[value.base.dtype].removeprefix("*")
            signature[name] = f"tensordesc<{numbers}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name], multiple = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        else:
            signature[name], multiple = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if multiple:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compiling_instead(arch: int, made_of: list[tuple[str, dict]]):
    def run(self: JITFunction, *args, grid, warmup, **options):
        signature, constants, attributes = signature_of(self, args, options)
        source = ASTSource(self, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= SHARED[arch], f"{made.metadata.shared} bytes of shared memory"
        made_of.append((self.__name__, made.asm))

    return run


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def encoded(name: str, scale: str = "fp32") -> EncodedRows:
    form = RowFormat.of(name, scale=scale)
    return EncodedRows(form, 512, zeros(form.code_dtype, 64, form.code_width(512)), zeros(form.scale_dtype, 64, 4))


def cases(dtype: torch.dtype) -> dict[str, Callable]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy, p_in, p_out = (zeros(dtype, *shape) for shape in ((2, 96, 256), (2, 96, 384), (64, 256), (100, 384)))
    queries, rows, scale = zeros(acc, 8, 512), zeros(dtype, 64, 512), zeros(acc, 64)
    layers = [(64, 64), (16, 128)]
    return {
        "project_rows": lambda: project_rows(x, p_in),
        "project_grad": lambda: project_grad(x, dy, p_in, p_out, None, None),
        "accumulate_gram": lambda: accumulate_gram(zeros(dtype, 50, 200), zeros(acc, 200, 200)),
        "quantize_rows": lambda: quantize_rows(zeros(dtype, 4, 500), RowFormat.of("int4"), "nearest", 0, 0),
        "dequantize_rows": lambda: dequantize_rows(encoded("int4")),
        "score_block": lambda: score_block(rows[:8], rows),
        "score_topk": lambda: score_topk(queries, rows, 5, scale, True),
        "factor_rows": lambda: factor_rows(zeros(dtype, 3, 6144), layers, 2),
        "score_factored": lambda: score_factored(zeros(dtype, 8, 6144), zeros(dtype, 64, 544), layers, 2, 1),
        "score_factored, rank 8": lambda: score_factored(zeros(dtype, 64, 6144), zeros(dtype, 64, 2176), layers, 8, 1),
    }


def chunks(dtype: torch.dtype, arch: int) -> dict[str, Callable]:
    """project_grad by the architecture's own tiles, samples cut into chunks, through descriptors where it has them."""

    def at(k: int, ragged: bool, programs: int) -> Callable:
        rows = (4096,) if ragged else (1, 4096)
        x, dy, p_in, p_out = (zeros(dtype, *shape) for shape in ((*rows, 1024), (*rows, 512), (k, 1024), (k, 512)))
        offsets = torch.tensor([0, 90, 4096]) if ragged else None
        tile = TILES[key_of((arch // 10, 0), dtype.itemsize, k)]
        g = torch.empty(2 if ragged else 1, k, k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        cuts = {"programs": programs, "most_partials": min(264, 3 * programs)}
        return lambda: launch_tile(x, dy, p_in, p_out, offsets, None, g, tile, described=arch >= 90, **cuts)

    halved = {f"chunks, k={k}{', ragged' * ragged}": (k, ragged, 264) for k, ragged in ((16, False), (64, True))}
    whole = {f"chunks, k={k}, whole tiles": (k, ragged, 1) for k, ragged in ((32, True), (64, False), (128, True))}
    return {name: at(*sizes) for name, sizes in (halved | whole).items()}


def score_tiles(dtype: torch.dtype) -> dict[str, Callable]:
    """Scores of more queries: by other tiles."""

    def at(q: int) -> Callable:
        asked, rows = zeros(dtype, q, 1024), zeros(dtype, 600, 1024)
        return lambda: score(asked, rows, zeros(accumulator_dtype(dtype), 600))

    return {f"score_block, {q} queries": at(q) for q in (8, 50, 200)}


def variants(dtype: torch.dtype) -> dict[str, Callable]:
    """More signatures of the same kernels: unaligned, ragged and weighted, projected, k beyond one tile, mixed."""
    odd, dy = zeros(dtype, 192, 257)[:, 1:], zeros(dtype, 192, 384)
    p_in, p_out = zeros(dtype, 300, 256), zeros(dtype, 256, 384)
    offsets, weights = torch.tensor([0, 90, 192]), zeros(torch.float32, 192)
    projected, queries, rows = (zeros(torch.float32, *shape) for shape in ((2, 96, 64), (8, 512), (64, 512)))
    return {
        "project_rows, unaligned": lambda: project_rows(odd[None], p_in[:7, ::2].repeat(1, 2)),
        "project_grad, ragged": lambda: project_grad(odd, dy, p_in[:20], p_out[:7], offsets, weights),
        "project_grad, projected": lambda: project_grad(projected, dy.view(2, 96, 384), None, p_out[:64], None, None),
        "project_grad, large k": lambda: project_grad(odd[None], dy[None], p_in, p_out, None, None),
        **{
            f"quantize_rows, {name} {rounding}": partial(quantize_rows, rows, RowFormat.of(name), rounding, 3, 1)
            for name in ("fp8", "int8", "int2", "sign")
            for rounding in ("nearest", "stochastic")
        },
        **{
            f"dequantize_rows, {name}": partial(dequantize_rows, encoded(name, scale))
            for name, scale in (("fp8", "fp32"), ("int8", "fp16"), ("int2", "fp32"), ("sign", "fp16"))
        },
        **{
            f"score_encoded, {q} queries, {name} {kind}": partial(score_encoded, zeros(kind, q, 512), encoded(name), 0)
            for q in (8, 64)
            for name in ("fp8", "int8", "int4", "int2", "sign")
            for kind in (torch.float32, torch.bfloat16)
        },
        **{
            f"score_encoded, {q} queries, {name} int8": partial(
                score_encoded, zeros(torch.float32, q, 512), encoded(name), 1
            )
            for q in (8, 64)
            for name in ("int8", "int4", "int2", "sign")
        },
        "score_block, mixed": lambda: score_block(queries, rows.to(dtype)),
        "score_factored, mixed": lambda: score_factored(queries, rows[:, :48].to(dtype), [(16, 32)], 1, 1),
        "score_topk, plain": lambda: score_topk(rows[:8].to(dtype), rows.to(dtype), 5, None, False),
    }


def main(arch: int, name: str, looked_at: str = "") -> None:
    for module in LAUNCHERS:
        sys.modules[f"logra_kernels.ops.{module}"].capability_of = lambda tensor: (arch // 10, 0)
    if name == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    dtype = getattr(torch, "float32" if name == "tf32" else name)
    made = cases(dtype) | chunks(dtype, arch) | score_tiles(dtype)
    for case, launch in (made | (variants(dtype) if name == "bfloat16" else {})).items():
        if looked_at not in case:
            continue
        made_of: list[tuple[str, dict]] = []
        JITFunction.run = compiling_instead(arch, made_of)
        line: dict = {"case": case, "error": None}
        try:
            launch()
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
        line["kernels"] = [kernel for kernel, _ in made_of]
        line["tensor_cores"] = any("mma." in asm["ptx"] for _, asm in made_of)
        line["narrow_loads"] = sum(len(NARROW_LOAD.findall(asm["ptx"])) for _, asm in made_of)
        line["spilled"] = max((most_spilled(asm["cubin"]) for _, asm in made_of), default=0.0)
        if looked_at:
            line["loops"] = [loop for _, asm in made_of for loop in counts(asm["cubin"])]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
