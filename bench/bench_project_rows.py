import pytest
import torch
from clock import TIMED

import logra_kernels as lk

pytestmark = TIMED
CASES = {  # device, dtype, then N T d k
    "cpu-fp32": ("cpu", torch.float32, (8, 256, 512, 64)),
    "cpu-fp32-wide": ("cpu", torch.float32, (8, 256, 1408, 64)),
    "cpu-bf16": ("cpu", torch.bfloat16, (8, 256, 512, 64)),
}
if torch.cuda.is_available():
    CASES |= {
        f"cuda-bf16-{d}-k{k}": ("cuda", torch.bfloat16, (16, 512, d, k)) for d in (4096, 14336) for k in (16, 64, 128)
    }
PROVIDERS = {"naive": lambda x, p: x @ p.T, "logra_kernels": lk.project_rows}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def bench_project_rows(cell, case, provider):
    device, dtype, (n, t, d, k) = CASES[case]
    x = torch.randn(n, t, d, device=device).to(dtype)
    p = (torch.randn(k, d, device=device) / d**0.5).to(dtype)
    size = dtype.itemsize
    flops, moved = 2 * n * t * d * k, n * t * (d * size + k * 4) + k * d * size
    cell("project_rows", f"N{n} T{t} d{d} k{k}", provider, PROVIDERS, (x, p), flops, moved)
