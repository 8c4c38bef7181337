import pytest
import torch
from clock import TIMED

import logra_kernels as lk

pytestmark = TIMED
CASES = {  # device, dtype of rows and queries, then Q N D
    "cpu-fp32-q1": ("cpu", torch.float32, (1, 2048, 8192)),
    "cpu-fp32-q64": ("cpu", torch.float32, (64, 2048, 8192)),
} | {f"cpu-bf16-q{q}": ("cpu", torch.bfloat16, (q, 2048, 8192)) for q in (1, 8, 64, 256)}
if torch.cuda.is_available():
    CASES |= {
        f"cuda-{dtype}-q{q}": ("cuda", getattr(torch, dtype), (q, 65536, 8192))
        for dtype in ("bfloat16", "float32")
        for q in (1, 8, 64, 256)
    }
PROVIDERS = {"naive": lambda queries, rows: queries @ rows.T, "logra_kernels": lk.score_block}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def bench_score_block(cell, case, provider):
    device, dtype, (q, n, d) = CASES[case]
    queries, rows = (torch.randn(count, d, device=device).to(dtype) for count in (q, n))
    flops, moved = 2 * q * n * d, (q + n) * d * dtype.itemsize + q * n * 4
    cell("score_block", f"Q{q} N{n} D{d}", provider, PROVIDERS, (queries, rows), flops, moved)
