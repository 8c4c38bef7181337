"""Two-stage search against the exact pass: one query, the 100 best of 20,000 rows of 8,192 numbers.

Warm: an open store whose pages are in memory. Cold: the pages are dropped, and opening the store, loading the index and
verifying what is read count too. The rows have topics, as gradients of text have; their exact answer is worked out in
fp64 first, and an index whose recall or values are off is not timed. The provider's name says the recall measured here.
"""

import os

import pytest
import torch
from clock import in_turn
from machine import commit, cpu_model, triton_version
from torch import Tensor

from logra_kernels.store import GradientStore

COUNT, DIM, TOP, ASKED = 20_000, 8192, 100, 16
LAYERS = {"a": (64, 64), "b": (64, 64)}


def topics(count: int, seed: int) -> Tensor:
    """Rows around one of 200 centres, with 64 common directions, noise, and lengths that differ by e^0.5."""
    common = torch.Generator().manual_seed(0)
    centres, shared = torch.randn(200, DIM, generator=common), torch.randn(64, DIM, generator=common)
    draw = torch.Generator().manual_seed(seed)
    rows = 0.5 * centres[torch.randint(200, (count,), generator=draw)]
    rows += torch.randn(count, 64, generator=draw) @ shared / 8
    rows += 0.7 * torch.randn(count, DIM, generator=draw)
    return rows * torch.exp(0.5 * torch.randn(count, 1, generator=draw))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "s"
    with GradientStore.create(path, LAYERS) as store:
        for start in range(0, COUNT, 2000):
            store.append(topics(2000, start), [str(row) for row in range(start, start + 2000)])
    return path


@pytest.fixture(scope="module")
def answer(path):
    """(queries [Q, D], exact row numbers [Q, TOP], exact scores [Q, N] fp64)"""
    queries = topics(ASKED, 1)
    blocks = [queries.double() @ rows.double().T for _, rows in GradientStore.open(path).blocks()]
    scores = torch.cat(blocks, dim=1)
    return queries, scores.topk(TOP).indices, scores


def drop_pages(path) -> None:
    for file in (file for file in path.rglob("*") if file.is_file()):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def over_exact(path, query: Tensor, cold: bool) -> dict[str, float]:
    """How much longer the exact pass takes than the index, in turn."""
    warm = GradientStore.open(path)

    def opened() -> GradientStore:
        return GradientStore.open(path) if cold else warm

    calls = {"exact": lambda: opened().topk(query, TOP), "index": lambda: opened().search(query, TOP)}
    took = in_turn(calls, 5 if cold else 15, (lambda: drop_pages(path)) if cold else (lambda: None))
    return {"exact": round(took["exact"] / took["index"], 2)}


@pytest.mark.parametrize(
    ("dims", "cache"), [(dims, cache) for dims in (None, 512, 1024, 2048) for cache in ("warm", "cold")]
)
def bench_search(benchmark, path, answer, dims, cache):
    queries, exact, scores = answer
    store = GradientStore.open(path)
    provider = "exact"
    if dims is not None:
        info = store.build_index(dims, k=TOP) if cache == "warm" else store.index
        found = [store.search(query[None], TOP) for query in queries]
        for query, (values, rows) in enumerate(found):
            torch.testing.assert_close(values[0].double(), scores[query, rows[0]], rtol=1e-4, atol=1e-3)
        shares = [
            len({*rows[0].tolist()} & {*best.tolist()}) / TOP for (_, rows), best in zip(found, exact, strict=True)
        ]
        recall = sum(shares) / len(shares)
        assert recall >= 0.95
        provider = f"index of {dims}, shortlist {info.shortlist}, recall@100 {recall:.3f}"
    else:
        assert torch.equal(store.topk(queries, TOP)[1], exact)

    def ask(opened: GradientStore) -> Tensor:
        return (opened.topk if dims is None else opened.search)(queries[:1], TOP)[0]

    if dims is not None:
        benchmark.extra_info["interleaved"] = over_exact(path, queries[:1], cache == "cold")
    benchmark.group = f"search {cache}"
    benchmark.extra_info.update(
        op="search",
        provider=provider,
        shape=f"Q1 N{COUNT} D{DIM} k{TOP} {cache}",
        dtype="float32",
        device="cpu",
        threads=torch.get_num_threads(),
        flops=2 * COUNT * DIM,
        bytes=4 * COUNT * DIM,
        machine=cpu_model(),
        commit=commit(),
        torch=torch.__version__,
        triton=triton_version(),
    )
    if cache == "warm":
        benchmark.pedantic(ask, args=(store,), rounds=15, warmup_rounds=2)
        return
    del store
    benchmark.pedantic(lambda: ask(GradientStore.open(path)), setup=lambda: drop_pages(path), rounds=5)
