import pytest
import torch
from ops.views import VIEWS, far_apart
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels import ops
from logra_kernels.ops.score_block import op, reference

SHAPES = [(1, 1, 16), (3, 37, 40), (70, 65, 131), (1, 200, 33), (17, 9, 1), (2, 3, 700)]  # Q N D


def case(q, n, d, dtype=torch.float32, device="cpu"):
    return torch.randn(q, d, device=device).to(dtype), torch.randn(n, d, device=device).to(dtype)


def check(target, queries, rows):
    naive = queries @ rows.T if queries.dtype == rows.dtype else reference.score_block(queries, rows)
    got = lk.score_block(queries, rows, backend=target.backend)
    assert_as_good_as_naive(got, queries.double() @ rows.double().T, naive)
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_fp64(target, dtype, shape):
    got = check(target, *case(*shape, dtype, target.device))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_queries_on_half_rows(target, half):
    queries, rows = case(5, 50, 137, device=target.device)
    check(target, queries, rows.to(half))


@pytest.mark.parametrize("view", VIEWS)
def test_strides(target, dtype, view):
    check(target, *map(VIEWS[view], case(5, 29, 37, dtype, target.device)))


@pytest.mark.parametrize("depth", [31, 4097, 3 * 8192 + 1, 2 * 16384 + 33])
def test_few_queries(dtype, depth):
    """Every count of queries that rows meet as dot products; depths that end in a run, a vector and a pair."""
    for q in range(1, 10):
        queries, rows = case(q, 13, depth, dtype)
        got = lk.score_block(queries, rows, backend="cpp")
        assert_as_good_as_naive(got, queries.double() @ rows.double().T, queries @ rows.T)
        assert torch.equal(got[:, :7], lk.score_block(queries, rows[:7].contiguous(), backend="cpp"))


@pytest.mark.parametrize("q", [10, 16, 20, 32, 33])
def test_rows_whose_lines_share_a_set_of_the_cache(dtype, q):
    """Rows a page apart, which are multiplied fewer at a time: the same bits as of rows that lie otherwise."""
    queries, rows = case(q, 70, 4096, dtype)
    got = lk.score_block(queries, rows, backend="cpp")
    assert_as_good_as_naive(got, queries.double() @ rows.double().T, queries @ rows.T)
    apart = torch.nn.functional.pad(rows, (0, 24))[:, :4096]
    assert torch.equal(got, lk.score_block(queries, apart, backend="cpp"))


def test_expanded(target):
    queries, rows = case(1, 1, 37, device=target.device)
    check(target, queries.expand(3, 37), rows.expand(20, 37))


def test_far_apart_rows(target):
    queries, rows = case(3, 2100, 16, device=target.device)
    check(target, queries, far_apart(rows))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)], ids=["Q", "N", "D"])
def test_empty(target, shape):
    q, n, d = shape
    queries, rows = torch.zeros(q, d, device=target.device), torch.zeros(n, d, device=target.device)
    got = lk.score_block(queries, rows, backend=target.backend)
    assert got.shape == (q, n)
    assert not got.any()


def test_nan_stays_in_its_row(target):
    queries, rows = case(5, 50, 16, device=target.device)
    queries[2, 1] = rows[7, 3] = float("nan")
    bad = lk.score_block(queries, rows, backend=target.backend).isnan()
    assert bad[2].all()
    assert bad[:, 7].all()
    assert bad.sum() == 54


def test_same_bits_for_any_thread_count(dtype, threads):
    args = case(7, 211, 300, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(lk.score_block(*args, backend="cpp"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_same_bits_again(target, dtype):
    args = case(5, 65, 70, dtype, target.device)
    first, second = (lk.score_block(*args, backend=target.backend) for _ in range(2))
    assert torch.equal(first, second)


def test_does_not_depend_on_the_batch(target):
    queries, rows = case(9, 80, 70, device=target.device)
    whole = lk.score_block(queries, rows, backend=target.backend)
    alone = [lk.score_block(q[None], rows, backend=target.backend) for q in queries]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-5)
    blocks = [lk.score_block(queries, rows[i : i + 20], backend=target.backend) for i in range(0, 80, 20)]
    torch.testing.assert_close(whole, torch.cat(blocks, 1), rtol=1e-5, atol=1e-5)


def test_registration(device, dtype):
    queries, rows = case(3, 20, 24, dtype, device)
    torch.library.opcheck(op._op, (queries, rows, "auto"))
    if dtype != torch.float64:
        torch.library.opcheck(op._op, (queries.float(), rows, "auto"))


def test_compiles_without_a_graph_break(device):
    compiled = torch.compile(lk.score_block, fullgraph=True, dynamic=True, backend="aot_eager")
    for q, n in ((2, 9), (3, 17)):
        args = case(q, n, 12, device=device)
        torch.testing.assert_close(compiled(*args), lk.score_block(*args))


def test_bad_input_raises():
    queries, rows = case(3, 20, 24)
    with pytest.raises(ValueError, match=r"score_block: queries \(3, 23\) and rows \(20, 24\)"):
        lk.score_block(queries[:, 1:], rows)
    with pytest.raises(ValueError, match=r"score_block: queries \(24,\)"):
        lk.score_block(queries[0], rows)
    with pytest.raises(ValueError, match=r"score_block: queries are torch.bfloat16; for torch.float32 rows"):
        lk.score_block(queries.bfloat16(), rows)
    with pytest.raises(ValueError, match=r"score_block: rows is torch.int8"):
        lk.score_block(queries, rows.to(torch.int8))
    with pytest.raises(ValueError, match="score_block: rows is on meta"):
        lk.score_block(queries, rows.to("meta"))


def test_unavailable_backend_raises():
    with pytest.raises(RuntimeError, match="score_block: backend 'cublas' is not available here"):
        lk.score_block(*case(3, 20, 24), backend="cublas")


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp16", "int8", "int4", "sign"])
@pytest.mark.parametrize("query_format", [None, "int8", "fp32"])
@pytest.mark.parametrize("q", [1, 7, 70, 300])
def test_blocks_that_come_one_by_one_give_the_bits_of_a_call_each(form, query_format, q):
    rows = lk.quantize_rows(torch.randn(500, 300), form)
    if query_format is not None and not rows.format.scaled:
        with pytest.raises(ValueError, match="is for rows with scales"):
            ops.Scorer(torch.randn(q, 300), query_format).score(rows)
        return
    numbers = rows if rows.format.scaled else rows.codes
    queries = torch.randn(q, 300).to(torch.float32 if rows.format.scaled else numbers.dtype)
    scorer = ops.Scorer(queries, query_format)
    out = torch.full((q, 510), torch.nan)
    for start, stop in ((0, 7), (7, 8), (8, 8), (8, 300), (300, 500)):
        scorer.score(numbers[start:stop], out[:, start:stop])
        alone = lk.score_block(queries, numbers[start:stop], query_format=query_format)
        assert torch.equal(out[:, start:stop], alone)
        assert torch.equal(scorer.score(rows[start:stop]), alone)
    assert out[:, 500:].isnan().all()
    spread = torch.full((500, q), torch.nan).T
    scorer.score(numbers, spread)
    assert torch.equal(spread, lk.score_block(queries, numbers, query_format=query_format))


def test_what_does_not_fit_a_scorer_raises():
    queries, rows = torch.randn(3, 200), torch.randn(9, 200)
    scorer = ops.Scorer(queries)
    scorer.score(lk.quantize_rows(rows, "int8"))
    with pytest.raises(ValueError, match="the rows of a scorer must all have one format"):
        scorer.score(lk.quantize_rows(rows, "int4"))
    with pytest.raises(ValueError, match=r"queries \(3, 200\) and rows \(9, 199\)"):
        scorer.score(rows[:, 1:])
    assert ops.Scorer(queries.double()).score(rows.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="queries are torch.float32; for torch.float64 rows"):
        scorer.score(rows.double())


def test_a_scorer_on_another_device_or_backend(target):
    queries, rows = case(5, 50, 16, device=target.device)
    torch.testing.assert_close(ops.Scorer(queries).score(rows), lk.score_block(queries, rows, backend=target.backend))
