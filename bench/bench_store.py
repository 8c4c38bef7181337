"""The store against the plain thing: appended rows against a sequential write, logged rows against rows kept in memory,
streamed top-k against resident rows.

What was written is read back, and the top-k compared with fp64, before any time is taken. A disk's speed drifts by more
than the writers differ, so they take turns, and a round counts by the ratios of its times. Two plain writers: `cached`
converts the same batches and writes them through the page cache; `direct` writes a buffer that is ready over and over,
past the page cache, in files as long as the store's shards. Both end with fsync.
"""

import mmap
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
from bench_logging import INCLUDE, RANK, make_model, step
from torch import Tensor

import logra_kernels as lk
from logra_kernels.store import GradientStore

DIM, TOP = 4096, 100
BATCH_BYTES = 1 << 20  # of fp32 in one append, but at least 8 rows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WRITTEN = 768 << 20  # bytes; four to twelve shards
DIRECT, SHARD = 16 << 20, 64 << 20  # of a plain write, and of its files
STEPS = 6  # of logging
SCORED = {"fp32": 16384, "bf16": 32768}  # rows; 256 MB, four shards
MEMORY = Path("/dev/shm")  # without a disk, what is left is the software's own time


def rows_of(count: int, dim: int = DIM) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0))


def batches(rows: Tensor) -> list[slice]:
    step = max(8, BATCH_BYTES // (4 * rows.shape[1]))
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def write_cached(path: Path, rows: Tensor, dtype: str) -> None:
    path.mkdir()
    with open(path / "rows", "wb", buffering=0) as file:
        for part in batches(rows):
            file.write(rows[part].to(DTYPES[dtype]).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def write_direct(path: Path, nbytes: int, direct: int) -> None:
    path.mkdir()
    with mmap.mmap(-1, DIRECT) as buffer:
        buffer[:] = bytes(1 << 20) * (DIRECT >> 20)  # its pages are there
        for first in range(0, nbytes, SHARD):
            fd = os.open(path / str(first), os.O_WRONLY | os.O_CREAT | direct)
            for offset in range(0, SHARD, DIRECT):
                os.pwrite(fd, buffer, offset)
            os.fsync(fd)
            os.close(fd)


def write_store(path: Path, rows: Tensor, dtype: str) -> None:
    layers = {f"layer{i}": (64, 64) for i in range(rows.shape[1] // 4096)}
    with GradientStore.create(path, layers, dtype) as store:
        for part in batches(rows):
            store.append(rows[part], [str(i) for i in range(part.start, part.stop)])


def seconds(path: Path, write, *args) -> float:
    """That a write takes; what it wrote is removed."""
    started = time.perf_counter()
    write(path, *args)
    took = time.perf_counter() - started
    shutil.rmtree(path)
    return took


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
@pytest.mark.parametrize("dim", [DIM, 24 * DIM])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_store_write(benchmark, tmp_path, dtype, dim, where):
    if where == "memory" and not os.access(MEMORY, os.W_OK):
        pytest.skip(f"{MEMORY} cannot be written")
    nbytes = WRITTEN
    rows = rows_of(nbytes // (dim * DTYPES[dtype].itemsize), dim)
    with tempfile.TemporaryDirectory(dir=MEMORY if where == "memory" else tmp_path) as scratch:
        path = Path(scratch) / "s"
        write_store(path, rows, dtype)
        assert torch.equal(GradientStore.open(path).read(0, len(rows)), rows.to(DTYPES[dtype]).float())
        shutil.rmtree(path)
        times: dict[str, list[float]] = {"cached": [], "direct": [], "own": []}

        def plain_first() -> None:
            times["cached"].append(seconds(path, write_cached, rows, dtype))
            times["direct"].append(seconds(path, write_direct, nbytes, 0 if where == "memory" else os.O_DIRECT))

        def ours() -> None:
            times["own"].append(seconds(path, write_store, rows, dtype))

        describe(benchmark, "store_write", f"N{len(rows)} D{dim}", dtype, provider="logra_kernels", where=where)
        benchmark.pedantic(ours, setup=plain_first, rounds=7, warmup_rounds=1)
    rates = {f"{name}_gb_per_s": round(nbytes / statistics.median(own) / 1e9, 2) for name, own in times.items()}
    shares = {
        f"share_of_{plain}": round(statistics.median(a / b for a, b in zip(times[plain], times["own"], strict=True)), 3)
        for plain in ("cached", "direct")
    }
    benchmark.extra_info.update(bytes=nbytes, **rates, **shares)
    print(f"store_write {dtype} D{dim} {where}: {rates} {shares}")


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


def bench_store_logging(benchmark, tmp_path):
    """The tapped Llama of bench_logging: rows into a store, against the same rows kept in memory; in turn, by ratio."""
    model, tokens = make_model()
    taps = lk.capture(model, lk.Projection(rank=RANK), include=INCLUDE)

    def logged() -> Tensor:
        with taps:
            taps.reset(len(tokens))
            step(model, tokens)
            return taps.rows()

    kept: list[Tensor] = []
    times: dict[str, list[float]] = {"memory": [], "store": []}
    with GradientStore.create(tmp_path / "s", taps.layers) as store:

        def to_memory() -> None:
            started = time.perf_counter()
            kept.append(logged())
            times["memory"].append(time.perf_counter() - started)

        def to_store() -> None:
            started = time.perf_counter()
            rows = logged()
            store.append(rows, [f"{len(times['store'])}-{i}" for i in range(len(rows))])
            times["store"].append(time.perf_counter() - started)

        benchmark.pedantic(to_store, setup=to_memory, rounds=STEPS, warmup_rounds=1)
    found = GradientStore.open(tmp_path / "s").read(0, len(tokens) * (STEPS + 1))
    torch.testing.assert_close(found, torch.cat(kept))
    ratios = [a / b for a, b in zip(times["store"], times["memory"], strict=True)][1:]
    shown = {"median": round(statistics.median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4)}
    shown["of_minima"] = round(min(times["store"]) / min(times["memory"]), 4)
    describe(benchmark, "store_logging", f"N{len(tokens)} D{store.dim}", "fp32", provider="logra_kernels")
    benchmark.extra_info["time_over_memory"] = shown
    print(f"store_logging: time over that of keeping rows in memory {shown}")
