"""The truncated SVD of gradients' layers, against torch.linalg.svd and torch.svd_lowrank.

Checked by what the factors are for: the error of the rebuilt rows, which may exceed the least one by 0.1 %.
"""

import pytest
import torch
from clock import TIMED
from machine import commit, cpu_model, triton_version

import logra_kernels as lk

pytestmark = TIMED
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, COUNT = (64, 64), 64


def of_parts(u, sigma, v, rank):
    root = sigma[:, :rank].sqrt()[:, None]
    return torch.cat([(side[:, :, :rank] * root).mT.flatten(1) for side in (u, v)], 1)


def by_svd(rows, rank):
    u, sigma, v = torch.linalg.svd(rows.view(-1, *SIZE), full_matrices=False)
    return of_parts(u, sigma, v.mT, rank)


def by_svd_lowrank(rows, rank):
    return of_parts(*torch.svd_lowrank(rows.view(-1, *SIZE), rank + 7, niter=8), rank)


def ours(rows, rank):
    return lk.factor_rows(rows, [SIZE], rank)


PROVIDERS = {"naive": by_svd, "torch.svd_lowrank": by_svd_lowrank, "logra_kernels": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def bench_factor_rows(benchmark, rank, provider):
    rows = torch.randn(COUNT, SIZE[0] * SIZE[1], device=DEVICE)
    least = torch.linalg.svdvals(rows.double().view(-1, *SIZE))[:, rank:].norm(dim=1)
    error = (lk.rebuild_rows(PROVIDERS[provider](rows, rank), [SIZE], rank) - rows).double().norm(dim=1)
    assert bool((error <= 1.001 * least).all())
    shape = f"N{COUNT} {SIZE[0]}x{SIZE[1]} c{rank}"
    benchmark.group = f"factor_rows {shape}"
    benchmark.extra_info.update(
        op="factor_rows",
        provider=provider,
        shape=shape,
        dtype="float32",
        device=DEVICE,
        threads=torch.get_num_threads(),
        flops=COUNT * 8 * 4 * SIZE[0] * SIZE[1] * (rank + 7),  # of the products with G in 8 steps
        bytes=rows.nbytes + COUNT * rank * sum(SIZE) * 4,
        machine=torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_model(),
        commit=commit(),
        torch=torch.__version__,
        triton=triton_version(),
    )
    benchmark(PROVIDERS[provider], rows, rank)
