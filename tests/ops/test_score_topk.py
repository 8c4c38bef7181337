import pytest
import torch
from ops.views import VIEWS, far_apart
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels import ops
from logra_kernels.ops import _best
from logra_kernels.ops.score_topk import RowBlocks, op, reference

SHAPES = [(1, 1, 16, 1), (3, 37, 40, 5), (20, 65, 131, 64), (1, 200, 33, 7), (2, 3, 700, 10)]  # Q N D k


def case(q, n, d, dtype=torch.float32, device="cpu"):
    return torch.randn(q, d, device=device).to(dtype), torch.randn(n, d, device=device).to(dtype)


def small_integers(q, n, d, device="cpu"):
    """Scores are exact in fp32 in whatever order they are summed, and many are equal."""
    draw = (torch.randint(-2, 3, (count, d), device=device).float() for count in (q, n))
    return tuple(draw)


def scales(n, dtype=torch.float32, device="cpu"):
    return torch.rand(n, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.5


def check(target, queries, rows, k, row_scale=None, largest=True):
    """Values obey the fp64 rule, and the rows named have these values: equal scores may swap within the error."""
    values, index = lk.score_topk(queries, rows, k, row_scale, largest=largest, backend=target.backend)
    exact = queries.double() @ rows.double().T
    naive = queries @ rows.T if queries.dtype == rows.dtype else queries @ rows.float().T
    if row_scale is not None:
        exact, naive = exact * row_scale, naive * row_scale
    kept = min(k, rows.shape[0])
    assert index.dtype == torch.int64
    assert index.shape == (queries.shape[0], kept)
    assert all(line.unique().numel() == kept for line in index)
    assert_as_good_as_naive(values, exact.gather(1, index), naive.gather(1, index))
    best, naive_best = (s.sort(dim=1, descending=largest).values[:, :kept] for s in (exact, naive))
    assert_as_good_as_naive(values, best, naive_best)
    sign = 1 if largest else -1
    assert (sign * values.diff(dim=1) <= 0).all()
    return values, index


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_fp64(target, dtype, shape, largest):
    *sizes, k = shape
    values, _ = check(target, *case(*sizes, dtype, target.device), k, largest=largest)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_queries_on_half_rows(target, half):
    queries, rows = case(5, 50, 137, device=target.device)
    check(target, queries, rows.to(half), 7)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_row_scale(target, dtype, largest):
    queries, rows = case(5, 50, 37, dtype, target.device)
    check(target, queries, rows, 7, scales(50, dtype, target.device), largest)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(target, dtype, view):
    queries, rows = map(VIEWS[view], case(5, 29, 37, dtype, target.device))
    row_scale = torch.stack([scales(29, dtype, target.device)] * 2, dim=1)[:, 0]
    check(target, queries, rows, 4, row_scale)


def test_far_apart_rows(target):
    queries, rows = case(3, 2100, 16, device=target.device)
    check(target, queries, far_apart(rows), 9)


@pytest.mark.parametrize("k", [1, 10, 500])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_equal_scores_go_by_row_number(target, largest, scaled, k):
    queries, rows = small_integers(6, 300, 5, target.device)
    row_scale = torch.randint(0, 3, (300,), device=target.device).float() if scaled else None
    values, index = lk.score_topk(queries, rows, k, row_scale, largest=largest, backend=target.backend)
    want_values, want_index = reference.score_topk(queries, rows, k, row_scale, largest)
    assert torch.equal(values, want_values)
    assert torch.equal(index, want_index)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_nan_comes_first(target, largest):
    queries, rows = small_integers(3, 100, 5, target.device)
    rows[[7, 60, 93], 2] = float("nan")
    rows[40] = torch.tensor([float("inf"), 0, 0, 0, 0])
    queries[:, 0] = torch.tensor([1, 0, 1])  # infinity times zero is NaN for the middle query alone
    values, index = lk.score_topk(queries, rows, 6, largest=largest, backend=target.backend)
    want_values, want_index = reference.score_topk(queries, rows, 6, largest=largest)
    torch.testing.assert_close(values, want_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, want_index)
    assert index[0, :3].tolist() == [7, 60, 93]
    assert index[1, :4].tolist() == [7, 40, 60, 93]


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_merging_many_blocks(kernel, monkeypatch, largest):
    monkeypatch.setattr(_best, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(_best, "LEAST_BLOCK", 37)
    queries, rows = small_integers(6, 300, 5, kernel.device)
    rows[[36, 37, 290], 2] = float("nan")
    row_scale = torch.randint(0, 3, (300,), device=kernel.device).float()
    for k in (1, 50, 300):
        values, index = lk.score_topk(queries, rows, k, row_scale, largest=largest, backend=kernel.backend)
        want_values, want_index = reference.score_topk(queries, rows, k, row_scale, largest)
        torch.testing.assert_close(values, want_values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index, want_index)


@pytest.mark.parametrize("largest", [True, False])
def test_a_block_gives_its_best_as_a_stable_sort_would(largest):
    """Also equal scores, both zeros, infinities and NaN."""
    for n, k in ((1, 3), (40, 7), (400, 60), (400, 400)):
        scores = torch.randn(5, n).mul(2).round()
        for special in (-0.0, float("inf"), float("-inf"), float("nan"), -float("nan")):
            scores[torch.rand(5, n) < 0.05] = special
        values, columns = _best._best_of_block(scores, k, largest)
        order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(columns, order if k < n else torch.arange(n).expand(5, n))
        assert torch.equal(values.nan_to_num(7e7), scores.gather(1, columns).nan_to_num(7e7))


def test_all_nan(target):
    queries, rows = case(2, 30, 8, device=target.device)
    values, index = lk.score_topk(queries, rows * float("nan"), 5, backend=target.backend)
    assert values.isnan().all()
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_infinite_scores(target, largest):
    queries = torch.ones(1, 1, device=target.device)
    rows = torch.tensor([[0.0], [float("-inf")], [1.0], [float("inf")], [float("-inf")]], device=target.device)
    _, index = lk.score_topk(queries, rows, 5, largest=largest, backend=target.backend)
    assert index.tolist() == [[3, 2, 0, 1, 4] if largest else [1, 4, 0, 2, 3]]


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)], ids=["Q", "N", "D"])
def test_empty(target, shape):
    q, n, d = shape
    queries, rows = torch.zeros(q, d, device=target.device), torch.zeros(n, d, device=target.device)
    values, index = lk.score_topk(queries, rows, 3, backend=target.backend)
    assert values.shape == index.shape == (q, min(3, n))
    assert not values.any()
    assert torch.equal(index, torch.arange(min(3, n), device=target.device).expand(q, -1))


def test_same_bits_for_any_thread_count(dtype, threads):
    args = case(7, 211, 300, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(lk.score_topk(*args, 20, backend="cpp"))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


def test_same_bits_again(target, dtype):
    args = (*case(5, 65, 70, dtype, target.device), 9)
    first, second = (lk.score_topk(*args, backend=target.backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_does_not_depend_on_the_batch(target):
    queries, rows = small_integers(9, 80, 5, target.device)
    values, index = lk.score_topk(queries, rows, 12, backend=target.backend)
    for q in range(9):
        alone_values, alone_index = lk.score_topk(queries[q : q + 1], rows, 12, backend=target.backend)
        assert torch.equal(values[q], alone_values[0])
        assert torch.equal(index[q], alone_index[0])


def test_registration(device, dtype):
    queries, rows = case(3, 20, 24, dtype, device)
    torch.library.opcheck(op._op, (queries, rows, 4, None, True, "auto"))
    torch.library.opcheck(op._op, (queries, rows, 30, scales(20, dtype, device), False, "auto"))


def test_compiles_without_a_graph_break(device):
    compiled = torch.compile(lk.score_topk, fullgraph=True, dynamic=True, backend="aot_eager")
    for q, n in ((2, 9), (3, 17)):
        queries, rows = case(q, n, 12, device=device)
        for got, want in zip(compiled(queries, rows, 4), lk.score_topk(queries, rows, 4), strict=True):
            torch.testing.assert_close(got, want)


def test_bad_input_raises():
    queries, rows = case(3, 20, 24)
    with pytest.raises(ValueError, match=r"score_topk: queries \(3, 23\) and rows \(20, 24\)"):
        lk.score_topk(queries[:, 1:], rows, 2)
    with pytest.raises(ValueError, match="score_topk: k is 0"):
        lk.score_topk(queries, rows, 0)
    with pytest.raises(ValueError, match=r"score_topk: row_scale \(19,\) torch.float32 must be \[20\]"):
        lk.score_topk(queries, rows, 2, torch.ones(19))
    with pytest.raises(ValueError, match=r"score_topk: row_scale \(20,\) torch.float64 must be"):
        lk.score_topk(queries, rows, 2, torch.ones(20).double())
    with pytest.raises(ValueError, match="score_topk: row_scale is on meta"):
        lk.score_topk(queries, rows, 2, torch.ones(20, device="meta"))
    with pytest.raises(ValueError, match=r"score_topk: queries are torch.bfloat16"):
        lk.score_topk(queries.bfloat16(), rows, 2)
    with pytest.raises(ValueError, match=r"score_topk: queries is torch.int32"):
        lk.score_topk(queries.int(), rows, 2)


def test_unavailable_backend_raises():
    with pytest.raises(RuntimeError, match="score_topk: backend 'cublas' is not available here"):
        lk.score_topk(*case(3, 20, 24), 2, backend="cublas")


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize("q", [1, 70])
def test_blocks_that_come_one_by_one_give_what_all_rows_give(form, largest, q):
    queries = torch.randn(q, 300)
    rows, scale = lk.quantize_rows(torch.randn(500, 300), form), torch.rand(500)
    numbers = rows if rows.format.scaled else rows.codes
    queries = queries.to(numbers.dtype) if isinstance(numbers, torch.Tensor) else queries
    search = ops.TopK(queries, 40, 500, largest=largest)
    for start, stop in ((0, 7), (7, 8), (8, 8)):
        search.add((numbers[start:stop], scale[start:stop]))
    search.add(*((numbers[start:stop], scale[start:stop]) for start, stop in ((8, 300), (300, 500))))
    values, index = search.best()
    whole = lk.score_topk(queries, numbers, 40, scale, largest=largest)
    assert torch.equal(values, whole[0])
    assert torch.equal(index, whole[1])


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "sign"])
@pytest.mark.parametrize("spread", [True, False], ids=["factors spread", "no factors"])
@pytest.mark.parametrize("q", [1, 7, 70])
def test_blocks_described_once_serve_many_searches(form, spread, q):
    rows, scale = lk.quantize_rows(torch.randn(500, 300), form), torch.rand(500, 3)[:, 1]
    blocks = RowBlocks([rows[:7], rows[7:7], rows[7:300], rows[300:]])
    numbers = rows if rows.format.scaled else rows.codes
    for k, largest in ((3, True), (40, False)):
        queries = torch.randn(q, 300).to(numbers.dtype if isinstance(numbers, torch.Tensor) else torch.float32)
        search = ops.TopK(queries, k, 500, largest=largest)
        search.add_all(blocks, scale if spread else None)
        whole = lk.score_topk(queries, numbers, k, scale if spread else None, largest=largest)
        assert all(torch.equal(*pair) for pair in zip(search.best(), whole, strict=True))


def test_what_does_not_fit_blocks_raises():
    rows = torch.randn(9, 200)
    blocks = RowBlocks([rows[:4], rows[4:]])
    ops.TopK(torch.randn(3, 200), 2, 9).add_all(blocks, None)  # what fitted once is not checked again
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        ops.TopK(torch.randn(3, 200), 0, 9).add_all(blocks, None)
    with pytest.raises(ValueError, match=r"row_scale \(4,\) torch.float32 must be \[9\]"):
        ops.TopK(torch.randn(3, 200), 2, 9).add_all(blocks, torch.ones(4))
    with pytest.raises(ValueError, match="row_scale"):
        ops.TopK(torch.randn(3, 200), 2, 9).add_all(blocks, torch.ones(9).double())
    with pytest.raises(ValueError, match="queries"):
        ops.TopK(torch.randn(3, 100), 2, 9).add_all(blocks, None)
    with pytest.raises(ValueError, match="query_format 'int8' is for rows with scales"):
        ops.TopK(torch.randn(3, 200), 2, 9, query_format="int8").add_all(blocks, None)


def test_a_search_of_fewer_rows_than_asked_for():
    queries, rows = torch.randn(3, 20), torch.randn(9, 20)
    rows[4] = float("nan")
    search = ops.TopK(queries, 100, 12)
    assert search.best()[0].shape == (3, 0)
    search.add((rows[:5], None))
    assert search.best()[1][:, 0].tolist() == [4, 4, 4]
    search.add((rows[5:], None))
    values, index = search.best()
    assert index.shape == (3, 9)
    assert values[:, 0].isnan().all()
    torch.testing.assert_close(values[:, 1:], (queries @ rows.T).gather(1, index)[:, 1:])


def test_what_does_not_fit_a_search_raises():
    queries, rows = torch.randn(3, 200), torch.randn(9, 200)
    search = ops.TopK(queries, 2, 10)
    search.add((rows, None))
    with pytest.raises(ValueError, match="more rows than were announced"):
        search.add((rows, None))
    search = ops.TopK(queries, 2, 20)
    search.add((lk.quantize_rows(rows, "int8"), None))
    with pytest.raises(ValueError, match="the rows of a search must all have one format"):
        search.add((lk.quantize_rows(rows, "int4"), None))
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        ops.TopK(queries, 0, 20).add((rows, None))
