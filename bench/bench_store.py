"""The way of rows to the disk against the plain thing: appended rows against plain writes of as many bytes, steps
whose rows go into a store against steps whose rows stay in memory.

    python bench/bench_store.py [--write FOLDER] [--logging FOLDER]

Writing: the same rows over and over, 1.5 GB of them encoded. Two plain writers have as many bytes ready in memory,
not in the cache, and write them in files as long as the store's shards, 16 MB at a time: `cached` through the page
cache, `direct` past it; all are synced at the end. A disk's speed drifts by more than the writers differ, so they take
turns, and a round counts by the ratios of its times; between two turns what was written is removed and the disk left to
settle. What the store holds is compared with the rows before the first round and checked by fsck after the last one.

Logging: the tapped Llama of bench_logging, 2 samples a step. Four steps into memory, then four into the store, in turn;
the mean of the pairs' ratios, its standard error, and the median. What is read back is compared.

Prints tables and writes bench/results.
"""

import argparse
import itertools
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from bench_logging import INCLUDE, RANK, make_model, step  # noqa: E402
from machine import commit, cpu_model  # noqa: E402
from record import RESULTS, slug, text  # noqa: E402

import logra_kernels as lk  # noqa: E402
from logra_kernels.store import GradientStore, fsck, shard_bytes  # noqa: E402

ROUNDS = 5
WRITTEN = 1536 << 20  # bytes of encoded rows
SOURCE = 384 << 20  # of different ones, more than the caches hold
APPENDED = 1 << 20  # of fp32 in one append, but at least 8 rows
PIECE = 16 << 20  # of one plain write
CELLS = [(dtype, dim) for dtype in ("fp32", "bf16", "int8") for dim in (4096, 24 * 4096)]
PAIRS, STEPS, SAMPLES = 64, 4, 2  # of logging


def layers_of(dim: int) -> dict[str, tuple[int, int]]:
    return {f"layer{i}": (64, 64) for i in range(dim // 4096)}


class Cell:
    """One format and row length: the rows, and the bytes that they become."""

    def __init__(self, dtype: str, dim: int):
        self.dtype, self.dim = dtype, dim
        self.form = lk.RowFormat.of(dtype)
        self.row_bytes = self.form.row_bytes(dim)
        self.shard = shard_bytes(dim, self.form)
        distinct = SOURCE // (4 * dim) // 8 * 8
        self.rows = torch.randn(distinct, dim, generator=torch.Generator().manual_seed(0))
        per_shard = self.shard // self.row_bytes
        self.count = max(1, WRITTEN // self.shard) * per_shard
        self.encoded = aligned(SOURCE)
        self.encoded[:] = os.urandom(1 << 20) * (SOURCE >> 20)

    @property
    def nbytes(self) -> int:
        return self.count * self.row_bytes

    def appends(self) -> list[tuple[int, slice]]:
        """(number of the first row, where in `rows` it and those after it are)."""
        most, made, found = max(8, APPENDED // (4 * self.dim)), 0, []
        while made < self.count:
            begin = made % len(self.rows)
            stop = min(begin + most, len(self.rows), begin + self.count - made)
            found.append((made, slice(begin, stop)))
            made += stop - begin
        return found

    def store(self, path: Path) -> None:
        with GradientStore.create(path, layers_of(self.dim), self.dtype) as store:
            for first, part in self.appends():
                store.append(self.rows[part], [str(first + i) for i in range(part.stop - part.start)])

    def plain(self, path: Path, flags: int) -> None:
        path.mkdir()
        files, at = [], 0
        for number in range(self.nbytes // self.shard):
            files.append(os.open(path / str(number), os.O_WRONLY | os.O_CREAT | flags, 0o666))
            for offset in range(0, self.shard, PIECE):
                length = min(PIECE, self.shard - offset) // mmap.PAGESIZE * mmap.PAGESIZE
                assert os.pwrite(files[-1], self.encoded[at : at + length], offset) == length
                at = (at + PIECE) % SOURCE
        for file in files:
            os.fdatasync(file)
            os.close(file)

    def convert(self) -> float:
        """Seconds that encoding all rows takes by itself."""
        started = time.perf_counter()
        for _, part in self.appends():
            lk.quantize_rows(self.rows[part], self.form)
        return time.perf_counter() - started

    def check(self, path: Path) -> None:
        store = GradientStore.open(path)
        assert len(store) == self.count
        for first, rows in store.blocks():
            places = torch.arange(first, first + len(rows)) % len(self.rows)
            wanted = self.rows[places]
            if self.form.scaled:
                wanted = lk.dequantize_rows(lk.quantize_rows(wanted, self.form))
            assert torch.equal(rows, wanted.to(rows.dtype))


def aligned(nbytes: int) -> memoryview:
    """On huge pages: from scattered ones O_DIRECT is slower, and how scattered they are is chance."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)


def measure(dtype: str, dim: int, folder: Path) -> dict:
    cell, path = Cell(dtype, dim), folder / "s"
    cell.store(path)
    cell.check(path)
    settle(path)
    writers: dict[str, Callable[[], None]] = {
        "direct": lambda: cell.plain(path, os.O_DIRECT),
        "cached": lambda: cell.plain(path, 0),
        "own": lambda: cell.store(path),
    }
    took: dict[str, list[float]] = {name: [] for name in writers}
    for turn in range(ROUNDS):
        for name, write in writers.items():
            took[name].append(seconds(write))
            if name == "own" and turn == ROUNDS - 1:
                assert fsck(path).faults == []
                assert len(GradientStore.open(path)) == cell.count
            settle(path)
    row = {"rows": cell.count, "dim": dim, "dtype": dtype, "bytes": cell.nbytes, "shard_bytes": cell.shard}
    for name, times in took.items():
        row[f"{name}_gb_per_s"] = round(cell.nbytes / statistics.median(times) / 1e9, 2)
    for name in ("direct", "cached"):
        shares = [plain / own for plain, own in zip(took[name], took["own"], strict=True)]
        row[f"share_of_{name}"] = round(statistics.median(shares), 3)
        row[f"share_of_{name}_range"] = [round(min(shares), 3), round(max(shares), 3)]
    if cell.form.scaled:
        row["quantize_rows_gb_per_s"] = round(cell.nbytes / min(cell.convert() for _ in range(3)) / 1e9, 2)
    return row


def settle(path: Path) -> None:
    shutil.rmtree(path)
    os.sync()


def seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def logging(folder: Path) -> dict:
    model, tokens = make_model()
    tokens = tokens[:SAMPLES]
    taps = lk.capture(model, lk.Projection(rank=RANK), include=INCLUDE)
    kept: list[Tensor] = []

    def logged() -> Tensor:
        with taps:
            taps.reset(SAMPLES)
            step(model, tokens)
            return taps.rows()

    def to_memory() -> None:
        for _ in range(STEPS):
            kept.append(logged())

    took: dict[str, list[float]] = {"memory": [], "store": []}
    ids = (str(number) for number in itertools.count())
    with GradientStore.create(folder / "s", taps.layers) as store:

        def to_store() -> None:
            for _ in range(STEPS):
                store.append(logged(), list(itertools.islice(ids, SAMPLES)))

        for _ in range(PAIRS + 1):
            took["memory"].append(seconds(to_memory))
            took["store"].append(seconds(to_store))
    torch.testing.assert_close(GradientStore.open(folder / "s").read(0, len(kept) * SAMPLES), torch.cat(kept))
    pairs = zip(took["store"], took["memory"], strict=True)
    ratios = [store / memory for store, memory in pairs][1:]  # the first one warms up
    return {
        "shape": f"{SAMPLES} x {tokens.shape[1]} tokens a step, rows of {sum(o * i for o, i in taps.layers.values())}",
        "dtype": "fp32", "pairs": PAIRS, "steps": STEPS,
        "step_ms": round(statistics.median(took["memory"]) / STEPS * 1e3, 1),
        "mean_ratio": round(statistics.mean(ratios), 4),
        "standard_error": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 4),
        "median_ratio": round(statistics.median(ratios), 4),
        "trimmed_ratio": round(trimmed(ratios), 4),
    }  # fmt: skip


def trimmed(ratios: list[float]) -> float:
    """Mean without the least and the greatest tenth."""
    cut = len(ratios) // 10
    return statistics.mean(sorted(ratios)[cut : len(ratios) - cut])


def keep(op: str, rows: list[dict]) -> None:
    head = {"op": op, "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    contents = {**head, "threads": torch.get_num_threads(), "rows": rows}
    (RESULTS / f"{op}-{slug(cpu_model())}.json").write_text(text(contents))


def show(row: dict) -> dict:
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, help="a folder on the disk to measure; 1.5 GB are written and removed")
    parser.add_argument("--logging", type=Path, help="a folder; 200 MB are written and removed")
    parser.add_argument("--cells", default=",".join(f"{dtype}/{dim}" for dtype, dim in CELLS), help="of writing")
    args = parser.parse_args()
    if args.write is None and args.logging is None:
        args.write = args.logging = Path(tempfile.gettempdir())
    if args.write is not None:
        cells = [(dtype, int(dim)) for dtype, _, dim in (cell.partition("/") for cell in args.cells.split(","))]
        with tempfile.TemporaryDirectory(dir=args.write) as scratch:
            keep("store_write", [show(measure(dtype, dim, Path(scratch))) for dtype, dim in cells])
    if args.logging is not None:
        with tempfile.TemporaryDirectory(dir=args.logging) as scratch:
            keep("store_logging", [show(logging(Path(scratch)))])


if __name__ == "__main__":
    main()
