"""Stores that keep factors: how fast they are asked from a cold disk, and how well they keep the order of the scores.

    python bench/bench_factored_store.py [--cold FOLDER] [--accuracy] [--rank K]

Cold: one query and its 100 best rows, k = 64 and 24 layers, from the dense fp32 store and from factored ones, the pages
of every file dropped before each question; the stores take turns. Checked first: the scores against fp64 products with
the rows that the store reads back. `disk` is a plain read of the same files in the same rounds.

Accuracy: the stories260K model's rows as factors in several number formats against fp32, by the energy they keep and
the top-100 agreement over held-out queries (needs LOGRA_DATA). Prints tables and writes bench/results.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from bench_formats import TOP, rows_and_queries  # noqa: E402
from machine import commit, cpu_model  # noqa: E402
from record import RESULTS, slug, text  # noqa: E402

import logra_kernels as lk  # noqa: E402

ROUNDS = 15  # the first ones of a new store read into memory that the machine gives out for the first time
LAYERS = {f"layer{i}": (64, 64) for i in range(24)}
DIM = 24 * 4096
COLD = {"dense fp32": (None, "fp32", 2048), "c=1 fp32": (1, "fp32", 16384), "c=1 int8": (1, "int8", 32768)}
RANKS, NUMBERS = (1, 2, 4, 8), ("fp32", "bf16", "int8", "int4")


def cold(folder: Path) -> list[dict]:
    """Pairs a second of one query, from dropped pages."""
    query = torch.randn(1, DIM)
    stores = {name: made(folder / name.replace(" ", "-"), *setting) for name, setting in COLD.items()}
    for path in stores.values():
        check(path, query)
    took: dict[str, list[float]] = {name: [] for name in stores}
    disk: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(ROUNDS):
        for name, path in stores.items():
            drop(path)
            took[name].append(seconds(lambda path=path: lk.GradientStore.open(path).topk(query, TOP)))
            drop(path)
            disk[name].append(seconds(lambda path=path: [file.read_bytes() for file in path.glob("*.safetensors")]))
    rows = []
    for name, path in stores.items():
        store, best = lk.GradientStore.open(path), statistics.median(took[name])
        rows.append(
            {
                "store": name, "rows": len(store), "bytes_per_row": store.manifest.row_bytes,
                "median_s": round(best, 4), "pairs_per_s": round(len(store) / best),
                "gbytes_per_s": round(len(store) * store.manifest.row_bytes / best / 1e9, 3),
                "of_plain_read": round(statistics.median(disk[name]) / best, 3),
            }
        )  # fmt: skip
    for row in rows:
        row["times_dense_fp32"] = round(row["pairs_per_s"] / rows[0]["pairs_per_s"], 2)
    return rows


def made(path: Path, rank: int | None, dtype: str, count: int) -> Path:
    """A store of `count` rows: 256 different ones over and over, so that it is made in seconds."""
    rows = torch.randn(256, DIM)
    with lk.GradientStore.create(path, LAYERS, dtype, rank_c=rank) as store:
        for start in range(0, count, 256):
            store.append(rows, [str(i) for i in range(start, start + 256)])
            rows = rows.roll(1, 0)
    return path


def check(path: Path, query: Tensor) -> None:
    store = lk.GradientStore.open(path)
    rows = store.read(0, 256).double()
    torch.testing.assert_close(store.score(query)[:, :256].double(), query.double() @ rows.T, rtol=1e-4, atol=1e-2)


def drop(path: Path) -> None:
    for file in path.iterdir():
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def accuracy(k: int) -> list[dict]:
    """Each rank and number format against the fp32 rows, for the same preconditioned queries."""
    with tempfile.TemporaryDirectory() as scratch:
        rows, queries, factor = rows_and_queries(Path(scratch), k)
        layers = list(lk.GradientStore.open(Path(scratch) / "store").layers.values())
    queries = factor.solve_toward_stored(queries)
    exact = queries.double() @ rows.double().T
    best = exact.topk(TOP).indices
    found = []
    for rank in RANKS:
        factors = lk.factor_rows(rows, layers, rank)
        for name in NUMBERS:
            if factors.shape[1] < rows.shape[1]:
                found.append(measured(factors, name, rank, layers, rows, queries, exact, best))
    return found


def measured(factors, name, rank, layers, rows, queries, exact, best) -> dict:
    encoded = lk.quantize_rows(factors, name)
    numbers = lk.dequantize_rows(encoded)
    kept = lk.rebuild_rows(numbers, layers, rank)
    scores = lk.score_factored(queries, numbers, layers, rank)
    nbytes, dense = encoded.format.row_bytes(factors.shape[1]), rows.shape[1] * 4
    lost = (kept - rows).double().square()
    ends = torch.tensor([k_out * k_in for k_out, k_in in layers]).cumsum(0)[:-1]
    energy = [
        1 - (part.sum() / whole.sum()).item()
        for part, whole in zip(lost.tensor_split(ends, 1), rows.double().square().tensor_split(ends, 1), strict=True)
    ]
    shared = [len(set(a) & set(b)) for a, b in zip(scores.topk(TOP).indices.tolist(), best.tolist(), strict=True)]
    pairs = torch.stack((scores.double().flatten(), exact.flatten()))
    return {
        "rank_c": rank, "format": str(encoded.format), "bytes_per_row": nbytes,
        "of_fp32_bytes": round(nbytes / dense, 4),
        "energy_kept_mean": round(statistics.mean(energy), 4), "energy_kept_least": round(min(energy), 4),
        "score_correlation": round(torch.corrcoef(pairs)[0, 1].item(), 5),
        "top100": round(sum(shared) / best.numel(), 4),
    }  # fmt: skip


def keep(op: str, rows: list[dict], **facts: object) -> None:
    head = {"op": op, "machine": cpu_model(), "commit": commit(), "torch": torch.__version__}
    contents = {**head, "threads": torch.get_num_threads(), **facts, "rows": rows}
    (RESULTS / f"{op}-{slug(cpu_model())}.json").write_text(text(contents))
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cold", type=Path, help="a folder on the disk to measure; some 2 GB are written and removed")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--rank", type=int, default=32, help="k of the projection (accuracy)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.cold is not None:
        scratch = Path(tempfile.mkdtemp(dir=args.cold))
        try:
            keep("factored_cold", cold(scratch), query=f"Q1 D{DIM} k{TOP}, 24 layers of 64 x 64")
        finally:
            shutil.rmtree(scratch)
    if args.accuracy:
        keep("factored_formats", accuracy(args.rank), k=args.rank, data="stories260K, TinyStories")


if __name__ == "__main__":
    main()
