"""Streamed scores and top-k against the dense matrix, for every cut of the rows into shards and blocks."""

import pytest
import torch
from store.samples import DIM, LAYERS, ids_of, rows_of

from logra_kernels import ops
from logra_kernels.errors import StoreError
from logra_kernels.ops import score_block
from logra_kernels.store import GradientStore

COUNT = 37


def whole_numbers(count, seed):
    """Small integers: every score is exact in fp32, and many of them are equal."""
    return torch.randint(-2, 3, (count, DIM), generator=torch.Generator().manual_seed(seed)).float()


def store_of(path, rows, dtype="fp32", rows_per_shard=8):
    with GradientStore.create(path, LAYERS, dtype, rows_per_shard=rows_per_shard) as store:
        store.append(rows, ids_of(len(rows)))
    return GradientStore.open(path)


def ordered(scores, k, largest):
    """The definition, in Python: NaN first, then by score, then by row."""
    picked = []
    for line in scores.tolist():
        sign = -1 if largest else 1
        key = [(0, 0, n) if s != s else (1, sign * s, n) for n, s in enumerate(line)]
        picked.append([n for *_, n in sorted(key)[:k]])
    return torch.tensor(picked)


@pytest.mark.parametrize("rows_per_shard", [1, 5, 16, 100])
@pytest.mark.parametrize("rows_per_block", [1, 7, 1000])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scores_and_order_are_exact(tmp_path, rows_per_shard, rows_per_block, dtype):
    rows, queries = whole_numbers(COUNT, 1), whole_numbers(4, 2)
    store = store_of(tmp_path / "s", rows, dtype, rows_per_shard)
    max_bytes = rows_per_block * DIM * (4 if dtype == "fp32" else 2)
    scale = torch.tensor([1.0, 0.5, 2.0, -1.0]).repeat(10)[:COUNT]
    for row_scale in (None, scale):
        dense = (queries @ rows.T) * (1 if row_scale is None else row_scale)
        assert torch.equal(store.score(queries, row_scale, max_bytes=max_bytes), dense)
        for largest in (True, False):
            for k in (1, 6, 99):
                expected = ordered(dense, k, largest)
                for most in (max_bytes, None):  # None: all shards that are at hand at once
                    values, index = store.topk(queries, k, row_scale, largest, max_bytes=most)
                    assert torch.equal(index, expected)
                    assert torch.equal(values, dense.gather(1, expected))
                    assert (values.dtype, index.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("largest", [True, False])
def test_nan_comes_first(tmp_path, largest):
    rows, queries = whole_numbers(COUNT, 1), whole_numbers(2, 2)
    store = store_of(tmp_path / "s", rows, rows_per_shard=5)
    scale = torch.ones(COUNT)
    scale[[7, 30]] = torch.nan
    for max_bytes in (1, None):
        values, index = store.topk(queries, 4, scale, largest, max_bytes=max_bytes)
        assert index[:, :2].tolist() == [[7, 30]] * 2
        assert values[:, :2].isnan().all()
        assert torch.equal(index, ordered(queries @ rows.T * scale, 4, largest))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_real_numbers_within_rounding(tmp_path, dtype):
    rows, queries = rows_of(COUNT), rows_of(5, seed=1)
    store = store_of(tmp_path / "s", rows, dtype, 5)
    exact = queries.double() @ store.read(0, COUNT).double().T
    torch.testing.assert_close(store.score(queries).double(), exact, rtol=1e-5, atol=1e-5)
    values, index = store.topk(queries, 10)
    torch.testing.assert_close(values.double(), exact.topk(10).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact.gather(1, index), exact.topk(10).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_queries_of_other_dtypes(tmp_path, dtype):
    rows, queries = whole_numbers(COUNT, 1), whole_numbers(3, 2)
    for stored in ("fp32", "bf16"):
        store = store_of(tmp_path / stored, rows, stored)
        assert torch.equal(store.score(queries.to(dtype)), queries @ rows.T)
        assert store.topk(queries.to(dtype).requires_grad_(), 3)[0].dtype == torch.float32


def test_no_queries(tmp_path):
    store = store_of(tmp_path / "s", rows_of(9))
    assert store.score(rows_of(0)).shape == (0, 9)
    assert [part.shape for part in store.topk(rows_of(0), 4)] == [(0, 4), (0, 4)]


def test_arguments_that_do_not_fit(tmp_path):
    store = store_of(tmp_path / "s", rows_of(9))
    for queries in (rows_of(2, dim=DIM + 1), rows_of(2)[0], rows_of(2).int()):
        with pytest.raises(StoreError, match=rf"\[Q, {DIM}\]"):
            store.score(queries)
    with pytest.raises(StoreError, match="k is 0"):
        store.topk(rows_of(2), 0)
    with pytest.raises(StoreError, match=r"row_scale \(8,\) must be \[9\]"):
        store.topk(rows_of(2), 1, torch.ones(8))
    for start, stop in [(-1, 3), (0, 10), (5, 4)]:
        with pytest.raises(StoreError, match="outside the store, which holds 9"):
            store.read(start, stop)


def test_more_shards_than_are_kept_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("logra_kernels.store.reading.reader.MAPPED_SHARDS", 3)
    rows, queries = whole_numbers(COUNT, 1), whole_numbers(4, 2)
    store = store_of(tmp_path / "s", rows, rows_per_shard=4)
    for _ in range(2):
        assert torch.equal(store.score(queries), queries @ rows.T)
        assert torch.equal(store.topk(queries, 6)[1], ordered(queries @ rows.T, 6, True))


def test_what_is_appended_between_two_queries_is_found(tmp_path):
    rows, queries = whole_numbers(COUNT, 1), whole_numbers(4, 2)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        for start, stop in ((0, 16), (16, 29), (29, COUNT)):
            store.append(rows[start:stop], ids_of(COUNT)[start:stop])
            store.flush()
            for _ in range(3):  # the later ones find all shards at hand
                assert torch.equal(store.topk(queries, 6)[1], ordered(queries @ rows[:stop].T, 6, True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_queries_are_laid_out_once_for_a_pass(tmp_path, dtype, monkeypatch):
    rows = torch.randn(90, 300)
    with GradientStore.create(tmp_path / "s", {"a": (10, 30)}, dtype, rows_per_shard=8) as writer:
        writer.append(rows, [str(i) for i in range(90)])
    store, queries, scale = GradientStore.open(tmp_path / "s"), torch.randn(20, 300), torch.rand(90)
    made = []
    laid_out = ops.Scorer.__init__
    monkeypatch.setattr(ops.Scorer, "__init__", lambda self, *args: (made.append(self), laid_out(self, *args))[1])
    got = store.score(queries, scale)
    assert len(made) == 1
    blocks = [encoded for _, encoded in store.encoded_blocks()]
    assert torch.equal(got, torch.cat([score_block(queries, block) for block in blocks], dim=1) * scale)


def test_rows_are_found_by_their_ids(tmp_path):
    with GradientStore.create(tmp_path / "s", {"a": (2, 3)}, rows_per_shard=4) as writer:
        writer.append(torch.randn(10, 6), [f"r{i}" for i in range(10)])
        writer.delete(["r2", "r7"])
    store = GradientStore.open(tmp_path / "s")
    assert store.numbers_of(["r9", "r0", "r2", "no such", "r3"]).tolist() == [7, 0, -1, -1, 2]
    assert store.numbers_of([]).tolist() == []
    with pytest.raises(StoreError, match="ids must be a list of str"):
        store.numbers_of([3])
