import pytest
import torch
from clock import TIMED
from torch import Tensor

import logra_kernels as lk

pytestmark = TIMED
CASES = {  # device, dtype of rows and queries, then Q N D k
    "cpu-fp32-q1": ("cpu", torch.float32, (1, 16384, 1024, 100)),
    "cpu-fp32-q64": ("cpu", torch.float32, (64, 16384, 1024, 100)),
    "cpu-bf16-q64": ("cpu", torch.bfloat16, (64, 16384, 1024, 100)),
}
if torch.cuda.is_available():
    CASES |= {f"cuda-bf16-q{q}": ("cuda", torch.bfloat16, (q, 1 << 20, 1024, 100)) for q in (1, 8, 64, 256)}


def composed(queries: Tensor, rows: Tensor, row_scale: Tensor, k: int) -> Tensor:
    return ((queries @ rows.T) * row_scale).topk(k).values


def streamed(queries: Tensor, rows: Tensor, row_scale: Tensor, k: int) -> Tensor:
    return lk.score_topk(queries, rows, k, row_scale)[0]


PROVIDERS = {"naive": composed, "logra_kernels": streamed}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def bench_score_topk(cell, case, provider):
    device, dtype, (q, n, d, k) = CASES[case]
    queries, rows = (torch.randn(count, d, device=device).to(dtype) for count in (q, n))
    row_scale = torch.rand(n, device=device) + 0.5
    flops, moved = 2 * q * n * d, (q + n) * d * dtype.itemsize + n * 4 + q * k * 12
    cell("score_topk", f"Q{q} N{n} D{d} k{k}", provider, PROVIDERS, (queries, rows, row_scale, k), flops, moved)
