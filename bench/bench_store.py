"""The store against the plain thing: appended rows against a sequential write, streamed top-k against resident rows.

What was written is read back, and the top-k compared with fp64, before any time is taken. A disk's speed drifts by more
than the two writers differ, so they take turns, and a round counts by the ratio of its two times.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from logra_kernels.store import GradientStore

DIM, BATCH, TOP = 4096, 64, 100
LAYERS = {"layer": (64, 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WRITTEN = {"fp32": 49152, "bf16": 98304}  # rows; 768 MB, twelve shards
SCORED = {"fp32": 16384, "bf16": 32768}  # rows; 256 MB, four shards
MEMORY = Path("/dev/shm")  # without a disk, what is left is the software's own time


def rows_of(count: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(0))


def write_plain(path: Path, rows: Tensor, dtype: str) -> None:
    """The least that keeps the rows: convert, write in the same batches through the page cache, fsync."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, rows.shape[0], BATCH):
            file.write(rows[start : start + BATCH].to(DTYPES[dtype]).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def write_store(path: Path, rows: Tensor, dtype: str) -> None:
    with GradientStore.create(path, LAYERS, dtype) as store:
        for start in range(0, rows.shape[0], BATCH):
            store.append(rows[start : start + BATCH], [str(i) for i in range(start, start + BATCH)])


def describe(benchmark, op: str, shape: str, dtype: str, **more: object) -> None:
    benchmark.extra_info.update(
        op=op,
        shape=shape,
        dtype=dtype,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **more,
    )


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_store_write(benchmark, tmp_path, dtype, where):
    if where == "memory" and not os.access(MEMORY, os.W_OK):
        pytest.skip(f"{MEMORY} cannot be written")
    rows = rows_of(WRITTEN[dtype])
    nbytes = rows.numel() * DTYPES[dtype].itemsize
    with tempfile.TemporaryDirectory(dir=MEMORY if where == "memory" else tmp_path) as scratch:
        path, plain_times, ratios = Path(scratch), [], []
        write_store(path / "store", rows, dtype)
        assert torch.equal(GradientStore.open(path / "store").read(0, len(rows)), rows.to(DTYPES[dtype]).float())

        def plain_first() -> None:
            shutil.rmtree(path / "store")
            started = time.perf_counter()
            write_plain(path / "plain", rows, dtype)
            plain_times.append(time.perf_counter() - started)
            (path / "plain").unlink()

        def ours() -> None:
            started = time.perf_counter()
            write_store(path / "store", rows, dtype)
            ratios.append(plain_times[-1] / (time.perf_counter() - started))

        shape = f"N{len(rows)} D{DIM}"
        describe(benchmark, "store_write", shape, dtype, provider="logra_kernels", where=where, bytes=nbytes)
        benchmark.pedantic(ours, setup=plain_first, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        plain_gb_per_s=nbytes / statistics.median(plain_times) / 1e9,
        gb_per_s=nbytes / benchmark.stats.stats.median / 1e9,
        share_of_plain_bandwidth=statistics.median(ratios),
    )


@pytest.mark.parametrize("provider", ["torch, resident", "logra_kernels"])
@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_store_topk(benchmark, tmp_path, dtype, count, provider):
    rows = rows_of(SCORED[dtype]).to(DTYPES[dtype])
    queries = torch.randn(count, DIM).to(DTYPES[dtype])
    write_store(tmp_path / "s", rows, dtype)
    store = GradientStore.open(tmp_path / "s")

    def resident() -> tuple[Tensor, Tensor]:
        return torch.topk(queries @ rows.T, TOP)

    def streamed() -> tuple[Tensor, Tensor]:
        return store.topk(queries, TOP)

    exact = queries.double() @ rows.double().T
    values, index = streamed()
    torch.testing.assert_close(exact.gather(1, index), exact.topk(TOP).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(values.double(), exact.gather(1, index), rtol=1e-3, atol=1e-3)
    del exact
    shape = f"Q{count} N{len(rows)} D{DIM} k{TOP}"
    describe(benchmark, "store_topk", shape, dtype, provider=provider, flops=2 * count * rows.numel())
    benchmark.group = f"store_topk {dtype} Q{count}"
    benchmark.pedantic({"torch, resident": resident, "logra_kernels": streamed}[provider], rounds=7, warmup_rounds=2)
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(pairs_per_s=count * len(rows) / median, gb_per_s=rows.nbytes / median / 1e9)
