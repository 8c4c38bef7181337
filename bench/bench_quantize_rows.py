import pytest
import torch
from clock import TIMED
from machine import commit, cpu_model, triton_version

import logra_kernels as lk

pytestmark = TIMED
N, D = 512, 8192
FORMATS = ("fp8", "int8", "int4", "int2", "sign")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def bench_quantize_rows(benchmark, name, rounding, backend):
    g = torch.randn(N, D)
    got, wanted = (lk.quantize_rows(g, name, rounding=rounding, backend=b) for b in (backend, "reference"))
    assert torch.equal(got.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(got.scales, wanted.scales)
    benchmark.group = f"quantize_rows {name} {rounding}"
    benchmark.extra_info.update(
        op="quantize_rows", provider="naive" if backend == "reference" else "logra_kernels",
        shape=f"N{N} D{D} {rounding}", dtype=name, device="cpu", threads=torch.get_num_threads(), flops=N * D,
        bytes=g.nbytes + got.nbytes, machine=cpu_model(), commit=commit(), torch=torch.__version__,
        triton=triton_version(),
    )  # fmt: skip
    benchmark(lk.quantize_rows, g, name, rounding=rounding, backend=backend)
