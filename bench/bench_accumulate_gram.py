import pytest
import torch
from clock import TIMED
from torch import Tensor

import logra_kernels as lk

pytestmark = TIMED
CASES = {  # device, dtype, then N d
    "cpu-fp32-256": ("cpu", torch.float32, (64, 256)),
    "cpu-fp32-1024": ("cpu", torch.float32, (64, 1024)),
    "cpu-fp32-4096": ("cpu", torch.float32, (8, 4096)),
    "cpu-bf16-1024": ("cpu", torch.bfloat16, (64, 1024)),
}
if torch.cuda.is_available():
    CASES |= {
        "cuda-fp32-4096": ("cuda", torch.float32, (256, 4096)),
        "cuda-bf16-4096": ("cuda", torch.bfloat16, (256, 4096)),
        "cuda-bf16-16384": ("cuda", torch.bfloat16, (64, 16384)),
    }


def composed(g: Tensor, out: Tensor) -> Tensor:
    return out.add_(g.T @ g)


def fused(g: Tensor, out: Tensor) -> Tensor:
    lk.accumulate_gram(g, out)
    return out


PROVIDERS = {"naive": composed, "logra_kernels": fused}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def bench_accumulate_gram(cell, case, provider):
    device, dtype, (n, d) = CASES[case]
    g, out = torch.randn(n, d, device=device).to(dtype), torch.zeros(d, d, device=device)
    # half of the products suffice, as the sum is symmetric; rates are counted against all of them
    flops, moved = 2 * n * d * d, n * d * dtype.itemsize + 2 * d * d * 4
    cell("accumulate_gram", f"N{n} d{d}", provider, PROVIDERS, (g, out), flops, moved)
