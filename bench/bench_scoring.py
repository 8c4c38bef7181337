"""Scoring a store, side by side in one run: numpy, torch, LogIX, Bergson and ours in every format.

    python bench/bench_scoring.py 2048x98304 65536x8192      warm page cache: rows x dims, 1 to 256 queries
    python bench/bench_scoring.py cold                       page cache dropped, against a plain sequential read
    python bench/bench_scoring.py limited                    a store three times the memory of its control group

Each part replaces its own rows of the results. Every answer is compared with fp64 before it is timed; providers take
turns, and medians of the turns are given. `share_of_read` is the best turn of a plain read of the same mapped bytes
(plain_read.py) over the best turn of ours. Pairs are (row, query).
"""

import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from plain_read import plain_reads
from scoring_providers import FORMATS, LOGIX_ROWS, OWN, PEERS, RELATIF, TOP, Answer, Rows, ours
from torch import Tensor

from logra_kernels.store import GradientStore

QUERIES = (1, 8, 64, 256)
SECONDS = 0.4  # of rounds a provider gets, but at least one and at most ROUNDS
ROUNDS = 7
SLOW = ("logix", "bergson")  # at most of so many queries: their time is proportional to them
SLOW_QUERIES = 64
COLD_ROWS, COLD_DIM = 4096, 98304  # fp32, 1.6 GB
GROUPS = Path("/sys/fs/cgroup/memory")
CHECKED = 8  # queries compared with fp64
TESTS = Path(__file__).resolve().parents[1] / "tests"


def exact_scores(store: GradientStore, queries: Tensor) -> Tensor:
    """fp64 scores of the stored numbers, [Q, N]."""
    return torch.cat([queries.double() @ rows.double().T for _, rows in store.blocks()], dim=1)


def check(answer: Answer, exact: Tensor, slack: float = 2e-3) -> None:
    """The first queries' scores, or best rows, are those of fp64 up to `slack` of their spread: long sums' rounding."""
    slack *= exact.std().item()
    if isinstance(answer, Tensor):
        found = answer[: len(exact)]
        assert (found.double() - exact[:, : found.shape[1]]).abs().max() < slack
        return
    values, index = (part[: len(exact)] for part in answer)
    best = exact.topk(index.shape[1])
    assert (values.double() - best.values).abs().max() < slack
    assert (exact.gather(1, index) - best.values).abs().max() < slack


def turns(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if seconds[name] and sum(seconds[name]) > SECONDS:
                continue
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def warm(count: int, dim: int, folder: Path) -> list[dict]:
    rows = Rows(folder, count, dim)
    queries = torch.randn(max(QUERIES), dim, generator=torch.Generator().manual_seed(1))
    stores = {form: GradientStore.open(folder / form) for form in FORMATS}
    exact = {form: exact_scores(store, queries[:CHECKED]) for form, store in stores.items()}
    bf16_queries = queries[:CHECKED].bfloat16()
    exact["bf16"] = exact_scores(stores["bf16"], bf16_queries)
    reads = {
        (form, kind): call
        for form, store in stores.items()
        for kind, call in plain_reads(rows for _, rows in store.encoded_blocks()).items()
    }
    reads = dict(sorted(reads.items(), key=lambda read: read[0][1]))  # no form after itself: it would be cached
    made = []
    for number in QUERIES:
        for mode in ("dot", "relatif"):
            calls = {}
            norm = rows.norm if mode == "relatif" else None
            for name, (form, query_format) in OWN.items():
                call = ours(stores[form], queries[:number], None if norm is None else norm.reciprocal(), query_format)
                # Rounded queries: each of D products has a random error of 1 / 254 of the block's largest at most.
                _check(call, exact[form], number, norm, 0.1 if query_format else 2e-3)
                calls[f"logra_kernels {name}"] = call
            for peer, make in PEERS.items():
                if find_spec(peer) is None or (mode == "relatif" and peer not in RELATIF):
                    continue
                if peer in SLOW and number > SLOW_QUERIES:
                    continue
                call = make(rows, queries[:number], mode)
                _check(call, exact["fp32"], number, norm)
                calls[peer] = call
            made += _rows_of(calls, count, dim, number, mode, reads)
            print(
                f"{count}x{dim} {number} {mode}", {row["provider"]: row["pairs_per_s"] for row in made[-len(calls) :]}
            )
    return made


def _check(call: Callable[[], Answer], exact: Tensor, number: int, norm: Tensor | None, slack: float = 2e-3) -> None:
    exact = exact[:number]
    check(call(), exact if norm is None else exact / norm, slack)


def _rows_of(calls: dict, count: int, dim: int, number: int, mode: str, reads: dict) -> list[dict]:
    made = []
    seconds = turns(calls | reads if number == 1 else calls)
    for name in calls:
        scored, median = min(count, LOGIX_ROWS) if name == "logix" else count, statistics.median(seconds[name])
        row = {"part": f"{count}x{dim}", "provider": name, "queries": number, "mode": mode, "rows": scored}
        row |= {"median_ms": round(median * 1e3, 2), "pairs_per_s": round(scored * number / median)}
        form = name.removeprefix("logra_kernels ").partition(",")[0]
        best = [min(seconds[read]) for read in reads if read[0] == form and number == 1]
        if best:
            row["share_of_read"] = round(min(best) / min(seconds[name]), 3)
        made.append(row)
    rates = {row["provider"]: row["pairs_per_s"] for row in made}
    for row in made:
        for peer in PEERS.keys() & rates.keys():
            if row["provider"].startswith("logra_kernels"):
                row[f"over_{peer}"] = round(row["pairs_per_s"] / rates[peer], 2)
    return made


def drop_pages(files: list[Path]) -> None:
    """Take the files out of the page cache; raises if they stay."""
    os.sync()
    stay = 0
    for file in files:
        fd = os.open(file, os.O_RDWR)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(fd, 0)
        os.close(fd)
        flags = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), flags) == 0
        stay += sum(flag & 1 for flag in flags) * mmap.PAGESIZE
    assert stay < 0.01 * sum(file.stat().st_size for file in files), f"{stay} bytes stay in the page cache"


def read_plainly(files: list[Path]) -> None:
    """Sequential reads of 8 MB with the kernel's read-ahead at its widest."""
    with mmap.mmap(-1, 8 << 20) as buffer:
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while os.readv(fd, [buffer]):
                pass
            os.close(fd)


def cold(folder: Path) -> list[dict]:
    """A first query: the disk, the checksums and the scores. Rounds of plain read, query, plain read.

    What it can come to is the longer of the plain read and of the scores alone, which the same store gives once its
    pages are there; `time_over_bound` is how far from overlapping the two it is.
    """
    generator = torch.Generator().manual_seed(0)
    with GradientStore.create(folder / "s", {"layer": (1, COLD_DIM)}) as store:
        for start in range(0, COLD_ROWS, 64):
            store.append(torch.randn(64, COLD_DIM, generator=generator), [str(row) for row in range(start, start + 64)])
    files = sorted((folder / "s").glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    made = []
    for number in (1, 8, 64):
        queries = torch.randn(number, COLD_DIM)
        check(
            GradientStore.open(folder / "s").topk(queries, TOP), exact_scores(GradientStore.open(folder / "s"), queries)
        )
        plain, own, ratios, scoring, bounds = [], [], [], [], []
        for _ in range(3):
            around = []
            for call in (read_plainly, None, read_plainly):
                drop_pages(files)
                store = GradientStore.open(folder / "s")
                begun = time.perf_counter()
                if call is None:
                    store.topk(queries, TOP)
                    own.append(time.perf_counter() - begun)
                    begun = time.perf_counter()
                    store.topk(queries, TOP)
                    scoring.append(time.perf_counter() - begun)
                else:
                    call(files)
                    around.append(time.perf_counter() - begun)
                del store
            plain += around
            ratios.append(statistics.mean(around) / own[-1])
            bounds.append(own[-1] / max(scoring[-1], statistics.mean(around)))
        row = {"part": "cold", "provider": "logra_kernels fp32", "queries": number, "rows": COLD_ROWS, "dim": COLD_DIM}
        row |= {"gb_per_s": round(nbytes / statistics.median(own) / 1e9, 2)}
        row |= {"plain_gb_per_s": round(nbytes / statistics.median(plain) / 1e9, 2)}
        row |= {
            "share_of_plain_read": round(statistics.median(ratios), 3),
            "scores_alone_gb_per_s": round(nbytes / statistics.median(scoring) / 1e9, 2),
            "time_over_bound": round(statistics.median(bounds), 3),
            "pairs_per_s": round(number * COLD_ROWS / statistics.median(own)),
        }
        made.append(row)
        print(row)
    return made


def limited(folder: Path) -> list[dict]:
    """2.1 GB asked in a control group that leaves 0.7 GB to rows, page cache included; elsewhere under RLIMIT_DATA."""
    dim, count, headroom = 8192, 65536, 680 << 20
    generator, parts = torch.Generator().manual_seed(0), []
    asked = torch.randn(4, dim, generator=torch.Generator().manual_seed(1)).double()
    with GradientStore.create(folder / "s", layers := {"a": (64, 64), "b": (64, 64)}) as store:
        assert sum(k_out * k_in for k_out, k_in in layers.values()) == dim
        for start in range(0, count, 1024):
            rows = torch.randn(1024, dim, generator=generator)
            store.append(rows, [str(row) for row in range(start, start + 1024)])
            parts.append(asked @ rows.double().T)
    group = GROUPS / f"logra-bench-{os.getpid()}"
    in_group = os.access(GROUPS, os.W_OK)
    command = [sys.executable, str(TESTS / "store" / "limited.py"), str(folder / "s"), str(headroom)]
    if in_group:
        group.mkdir()
        command.append(str(group))
    try:
        environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    finally:
        if in_group:
            group.rmdir()
    seen = json.loads(shown)
    best = torch.cat(parts, dim=1).topk(20)
    assert seen["index"] == best.indices.tolist()
    row = {"part": "limited", "provider": "logra_kernels fp32", "queries": 4, "rows": count, "dim": dim}
    row |= {"limit": "control group" if in_group else "RLIMIT_DATA", "headroom_bytes": headroom}
    row |= {"store_bytes": seen["store"], "peak_bytes": seen["peak"], "planned_bytes": seen["planned"]}
    row |= {"seconds": round(seen["seconds"], 2)}
    print(row)
    return [row]


def bench_scoring(benchmark, tmp_path) -> None:
    benchmark.pedantic(warm, args=(512, 8192, tmp_path), rounds=1)


def main(parts: list[str]) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    from machine import commit, cpu_model
    from record import RESULTS, slug, text

    path = RESULTS / f"scoring-{slug(cpu_model())}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    missing = [peer for peer in PEERS if find_spec(peer) is None]
    if missing:
        print(f"not installed, and left out: {', '.join(missing)}")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            if part in ("cold", "limited"):
                rows = {"cold": cold, "limited": limited}[part](Path(folder))
            else:
                count, dim = (int(size) for size in part.split("x"))
                rows = warm(count, dim, Path(folder))
        kept = [row for row in kept if row["part"] != part] + [{**row, "commit": commit()} for row in rows]
    facts = {"op": "scoring", "machine": cpu_model(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    path.write_text(text({**facts, "rows": kept}))


if __name__ == "__main__":
    main(sys.argv[1:])
