from collections.abc import Callable

import pytest
import torch
from clock import TIMED, in_turn
from tolerance import assert_as_good_as_naive
from torch import Tensor

import logra_kernels as lk

pytestmark = TIMED
CASES = {  # device, dtype, lengths of the samples, then d_in d_out k
    "cpu-fp32-long": ("cpu", torch.float32, [2048], 512, 512, 64),
    "cpu-fp32-ragged": ("cpu", torch.float32, [700, 5, 300, 43, 1000], 512, 512, 64),
    "cpu-bf16-short": ("cpu", torch.bfloat16, [128] * 8, 512, 1408, 64),
} | {
    f"cpu-{name}-{d_in}x{d_out}-k{k}": ("cpu", dtype, [256] * 8, d_in, d_out, k)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for d_in, d_out in ((512, 1408), (1408, 512), (2048, 2048))
    for k in (16, 64, 128)
}
if torch.cuda.is_available():
    BATCHES = {"16x512": [512] * 16, "4x2048": [2048] * 4, "1x8192": [8192], "ragged": [5000, 12, 700, 1800, 680]}
    CASES |= {
        f"cuda-bf16-{d_in}x{d_out}-k{k}-{batch}": ("cuda", torch.bfloat16, lengths, d_in, d_out, k)
        for d_in, d_out in ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 8192))
        for k in (16, 64, 128)
        for batch, lengths in BATCHES.items()
    }


def composed(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor, lengths: list[int] | None) -> Tensor:
    """Two products and a batched one; a product for each sample where lengths differ."""
    a, b = x @ p_in.T, dy @ p_out.T
    if lengths is None:
        return b.mT @ a
    return torch.stack([v.T @ u for u, v in zip(a.split(lengths), b.split(lengths), strict=True)])


def fused(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor, lengths: list[int] | None) -> Tensor:
    if lengths is None:
        return lk.project_grad(x, dy, p_in, p_out)
    offsets = torch.tensor([0, *lengths], device=x.device).cumsum(0)
    return lk.project_grad(x, dy, p_in, p_out, offsets)


def widened(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor, lengths: list[int] | None) -> Tensor:
    """`composed` whose last product is of fp32 numbers, as our results are."""
    a, b = (x @ p_in.T).float(), (dy @ p_out.T).float()
    if lengths is None:
        return b.mT @ a
    return torch.stack([v.T @ u for u, v in zip(a.split(lengths), b.split(lengths), strict=True)])


def rounded(x: Tensor, dy: Tensor, p_in: Tensor, p_out: Tensor, lengths: list[int] | None) -> Tensor:
    """`composed` of fp32 positions rounded to the factors' dtype."""
    return composed(x.to(p_in.dtype), dy.to(p_out.dtype), p_in, p_out, lengths)


def shares(args: tuple, compositions: dict[str, Callable], rows: int, d: int, k: int) -> dict[str, float]:
    """Times over ours: of torch's product of as many flops, [rows, d] x [d, k], and of each composition."""
    a, b = (torch.randn(count, d).to(args[2].dtype) for count in (rows, k))
    calls: dict[str, Callable[[], object]] = {"ours": lambda: fused(*args), "gemm": lambda: a @ b.T}
    calls |= {name: lambda call=call: call(*args) for name, call in compositions.items()}
    took = in_turn(calls)
    return {name: round(took[name] / took["ours"], 3) for name in ("gemm", *compositions)}


PROVIDERS = {"naive": composed, "logra_kernels": fused}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def bench_project_grad(cell, benchmark, case, provider):
    device, dtype, lengths, d_in, d_out, k = CASES[case]
    n, positions, size = len(lengths), sum(lengths), dtype.itemsize
    dense = len(set(lengths)) == 1
    shape = (n, lengths[0]) if dense else (positions,)

    def draw(*shape):
        return torch.randn(*shape, device=device)

    x, dy = draw(*shape, d_in).to(dtype), draw(*shape, d_out).to(dtype)
    p_in, p_out = (draw(k, d_in) / d_in**0.5).to(dtype), (draw(k, d_out) / d_out**0.5).to(dtype)
    flops = 2 * positions * (d_in * k + d_out * k + k * k)
    moved = (positions + k) * (d_in + d_out) * size + n * k * k * 4
    batch = f"N{n} T{lengths[0]}" if dense else f"N{n} R{positions}"
    args = (x, dy, p_in, p_out, None if dense else lengths)
    if device == "cpu" and provider == "logra_kernels":
        # every position: k * (d_in + d_out + k) products
        compositions = {"composed": composed} | ({"widened": widened} if dtype != torch.float32 else {})
        found = shares(args, compositions, positions, d_in + d_out + k, k)
        benchmark.extra_info.update(gemm_share=found["gemm"], interleaved=found)
        print(f"{case}: in turn, times over ours: {found}")
    cell("project_grad", f"{batch} d_in{d_in} d_out{d_out} k{k}", provider, PROVIDERS, args, flops, moved)


@pytest.mark.parametrize("k", [16, 64, 128])
@pytest.mark.parametrize("sizes", [(512, 1408), (1408, 512), (2048, 2048)], ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
def bench_project_grad_of_rounded_positions(benchmark, sizes, k):
    """fp32 positions beside bf16 factors, which projection_dtype=bf16 gives; checked against the rounded numbers."""
    x, dy = (torch.randn(8, 256, d) for d in sizes)
    p_in, p_out = ((torch.randn(k, d) / d**0.5).bfloat16() for d in sizes)
    exact = composed(x.bfloat16().double(), dy.bfloat16().double(), p_in.double(), p_out.double(), None)
    args = (x, dy, p_in, p_out, None)
    assert_as_good_as_naive(fused(*args), exact, rounded(*args))
    found = shares(args, {"rounded": rounded}, 8 * 256, sum(sizes) + k, k)
    print(f"fp32 beside bf16 {sizes} k{k}: in turn, times over ours: {found}")
    benchmark(fused, *args)
