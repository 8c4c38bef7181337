"""Factored rows against dense ones: the same scores from dense fp32 rows, and those rows composed and multiplied.

Flops count the rebuilt rows, 2 Q N D, whatever way they were avoided. The dense rows are scored in the same round as
the factors, so that `of_score_block` is a ratio of neighbours in time.
"""

from statistics import median

import pytest
import torch
from clock import TIMED, synced

import logra_kernels as lk

pytestmark = TIMED
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = [(64, 64)] * 4
DIM = 4096 * len(LAYERS)
COUNTS = {1: 4096, 8: 4096, 64: 2048, 256: 1024}  # queries -> rows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def composed(rank):
    """Rows rebuilt in memory, then a product."""

    def score(queries, factors):
        return queries @ lk.rebuild_rows(factors, LAYERS, rank).to(queries.dtype).T

    return score


def kernel(rank):
    return lambda queries, factors: lk.score_factored(queries, factors, LAYERS, rank)


@pytest.mark.parametrize("provider", ["naive", "logra_kernels"])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", COUNTS)
def bench_score_factored(cell, benchmark, q, dtype, rank, provider):
    n, kind = COUNTS[q], DTYPES[dtype]
    queries = torch.randn(q, DIM, device=DEVICE).to(kind)
    factors = torch.randn(n, rank * 128 * len(LAYERS), device=DEVICE).to(kind)
    providers = {"naive": composed(rank), "logra_kernels": kernel(rank)}
    moved = q * DIM * kind.itemsize + factors.nbytes + q * n * 4
    cell("score_factored", f"Q{q} N{n} D{DIM} c{rank}", provider, providers, (queries, factors), 2 * q * n * DIM, moved)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("q", COUNTS)
def bench_against_score_block(benchmark, q, rank):
    """fp32 factors and the fp32 rows they stand for, in turn."""
    n = COUNTS[q]
    queries, factors = torch.randn(q, DIM, device=DEVICE), torch.randn(n, rank * 128 * len(LAYERS), device=DEVICE)
    rows = lk.rebuild_rows(factors, LAYERS, rank)
    torch.testing.assert_close(kernel(rank)(queries, factors), lk.score_block(queries, rows), rtol=1e-4, atol=1e-2)
    dense = []

    def score_block() -> None:
        started = synced()
        lk.score_block(queries, rows)
        dense.append(synced() - started)

    def score_factored() -> None:
        kernel(rank)(queries, factors)

    benchmark.group = f"of score_block, Q{q} c{rank}"
    benchmark.pedantic(score_factored, setup=score_block, rounds=9, warmup_rounds=1)
    benchmark.extra_info.update(
        of_score_block=median(dense) / benchmark.stats.stats.median,
        gflops=2 * q * n * DIM / benchmark.stats.stats.median / 1e9,
        score_block_gflops=2 * q * n * DIM / median(dense) / 1e9,
    )
