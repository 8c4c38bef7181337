import pytest
import torch
from clock import TIMED
from machine import commit, cpu_model, triton_version

import logra_kernels as lk

pytestmark = TIMED
N, D = 512, 8192
FORMATS = ("fp8", "int8", "int4", "int2", "sign")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", FORMATS)
def bench_dequantize_rows(benchmark, name, backend):
    rows = lk.quantize_rows(torch.randn(N, D), name)
    got, wanted = (lk.dequantize_rows(rows, backend=b) for b in (backend, "reference"))
    assert torch.equal(got, wanted)
    benchmark.group = f"dequantize_rows {name}"
    benchmark.extra_info.update(
        op="dequantize_rows", provider="naive" if backend == "reference" else "logra_kernels", shape=f"N{N} D{D}",
        dtype=name, device="cpu", threads=torch.get_num_threads(), flops=N * D, bytes=got.nbytes + rows.nbytes,
        machine=cpu_model(), commit=commit(), torch=torch.__version__, triton=triton_version(),
    )  # fmt: skip
    benchmark(lk.dequantize_rows, rows, backend=backend)
