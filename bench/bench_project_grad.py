from collections.abc import Callable

import pytest
import torch
from clock import TIMED, synced
from torch import Tensor

import logra_kernels as lk

pytestmark = TIMED
CASES = {  # device, dtype, lengths of the samples, then d_in d_out k
    "cpu-fp32": ("cpu", torch.float32, [256] * 8, 512, 1408, 64),
    "cpu-fp32-long": ("cpu", torch.float32, [2048], 512, 512, 64),
    "cpu-fp32-ragged": ("cpu", torch.float32, [700, 5, 300, 43, 1000], 512, 512, 64),
    "cpu-bf16": ("cpu", torch.bfloat16, [256] * 8, 512, 1408, 64),
    "cpu-bf16-k16": ("cpu", torch.bfloat16, [256] * 8, 512, 1408, 16),
    "cpu-bf16-k128": ("cpu", torch.bfloat16, [256] * 8, 512, 1408, 128),
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


def gemm_share(run: Callable[[], object], rows: int, d: int, k: int, dtype: torch.dtype, rounds: int = 40) -> float:
    """torch's time for one product of as many flops, [rows, d] x [d, k], over ours: both in turn, the best of each."""
    a, b = torch.randn(rows, d).to(dtype), torch.randn(k, d).to(dtype)
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, call in enumerate((lambda: a @ b.T, run)):
            begun = synced()
            call()
            best[i] = min(best[i], synced() - begun)
    return round(best[0] / best[1], 3)


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
        share = gemm_share(lambda: fused(*args), positions, d_in + d_out + k, k, dtype)
        benchmark.extra_info["gemm_share"] = share
        print(f"{case}: {share:.0%} of torch's rate for one product of the same flops")
    cell("project_grad", f"{batch} d_in{d_in} d_out{d_out} k{k}", provider, PROVIDERS, args, flops, moved)
