import pytest
import torch
from ops.conftest import TARGETS
from ops.views import VIEWS, far_apart
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops.score_factored import op

LAYERS = [(20, 33), (7, 3), (16, 140), (1, 5)]  # odd sizes, and a k_in of more than one panel
SQUARE = [(32, 32), (8, 16)]
CPP = TARGETS["cpp"]
CASES = [  # Q N rank layers: each of the ways of the C++ kernel, with one factor and with many
    (1, 1, 1, LAYERS),
    (3, 37, 2, LAYERS),
    (20, 45, 4, LAYERS),
    (9, 30, 8, LAYERS),
    (6, 13, 5, LAYERS),
    (5, 110, 3, SQUARE),
    (70, 20, 2, SQUARE),
]


def dense(layers):
    return sum(k_out * k_in for k_out, k_in in layers)


def case(q, n, rank, layers, dtype=torch.float32, device="cpu"):
    queries, factors = torch.randn(q, dense(layers)), torch.randn(n, lk.ops.factored_dim(layers, rank))
    return queries.to(device, dtype), factors.to(device, dtype)


def composed(queries, factors, layers, rank, align=1):
    """G of every layer and row, in the arguments' dtype, and then a product: independent of the package."""
    rows, at = [], 0
    for k_out, k_in in layers:
        at += -at % align
        u = factors[:, at : at + rank * k_out].reshape(-1, rank, k_out)
        v = factors[:, at + rank * k_out : at + rank * (k_out + k_in)].reshape(-1, rank, k_in)
        rows.append(torch.einsum("nci,ncj->nij", u, v).flatten(1))
        at += rank * (k_out + k_in)
    return queries @ torch.cat(rows, 1).to(queries.dtype).T


def check(target, queries, factors, layers, rank, at_once=1000):
    """Rows are scored `at_once`, but compared together: of few numbers the naive ones may be exact by chance."""
    exact, naive = composed(queries.double(), factors.double(), layers, rank), composed(queries, factors, layers, rank)
    blocks = factors.split(at_once)
    got = torch.cat([lk.score_factored(queries, rows, layers, rank, backend=target.backend) for rows in blocks], 1)
    assert_as_good_as_naive(got, exact, naive)
    return got


@pytest.mark.parametrize(("q", "n", "rank", "layers"), CASES)
def test_matches_fp64(target, dtype, q, n, rank, layers):
    got = check(target, *case(q, max(n, 8), rank, layers, dtype, target.device), layers, rank, at_once=n)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2", "sign"])
@pytest.mark.parametrize(("q", "rank"), [(2, 1), (6, 5), (12, 4)])
def test_factors_with_scales(target, name, q, rank):
    queries, factors = case(q, 23, rank, LAYERS, device=target.device)
    rows = lk.quantize_rows(factors, lk.RowFormat.of(name, 64, "fp16"))
    numbers = lk.dequantize_rows(rows, backend="reference")
    exact = composed(queries.double(), numbers.double(), LAYERS, rank)
    got = lk.score_factored(queries, rows, LAYERS, rank, backend=target.backend)
    assert_as_good_as_naive(got, exact, composed(queries, numbers, LAYERS, rank))


@pytest.mark.parametrize(("q", "rank", "align"), [(2, 1, 5), (3, 2, 128), (12, 4, 32)])
def test_layers_that_lie_apart(target, dtype, q, rank, align):
    """Between them is NaN, which nothing may look at."""
    side_by_side = case(1, 19, rank, LAYERS)[1]
    pieces = side_by_side.split([rank * (k_out + k_in) for k_out, k_in in LAYERS], dim=1)
    gaps = [torch.full((19, -piece.shape[1] % align), float("nan")) for piece in pieces[:-1]]
    factors = torch.cat([x for pair in zip(pieces, [*gaps, torch.zeros(19, 0)], strict=True) for x in pair], dim=1)
    queries = torch.randn(q, dense(LAYERS)).to(target.device, dtype)
    factors = factors.to(target.device, dtype)
    exact = composed(queries.double(), factors.double(), LAYERS, rank, align)
    got = lk.score_factored(queries, factors, LAYERS, rank, align=align, backend=target.backend)
    assert_as_good_as_naive(got, exact, composed(queries, factors, LAYERS, rank, align))
    rebuilt = lk.rebuild_rows(factors, LAYERS, rank, align=align)
    assert torch.equal(rebuilt, lk.rebuild_rows(side_by_side.to(target.device, dtype), LAYERS, rank))


@pytest.mark.parametrize(("name", "q", "rank", "align"), [("int8", 2, 1, 64), ("int4", 6, 5, 128), ("sign", 12, 4, 7)])
def test_encoded_layers_that_lie_apart(target, name, q, rank, align):
    queries = torch.randn(q, dense(LAYERS)).to(target.device)
    factors = torch.randn(23, lk.ops.factored_dim(LAYERS, rank, align)).to(target.device)
    rows = lk.quantize_rows(factors, lk.RowFormat.of(name, 64))
    numbers = lk.dequantize_rows(rows, backend="reference")
    exact = composed(queries.double(), numbers.double(), LAYERS, rank, align)
    got = lk.score_factored(queries, rows, LAYERS, rank, align=align, backend=target.backend)
    assert_as_good_as_naive(got, exact, composed(queries, numbers, LAYERS, rank, align))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("q", "rank"), [(5, 1), (20, 2)])
def test_fp32_queries_on_half_factors(target, half, q, rank):
    queries, factors = case(q, 50, rank, LAYERS, device=target.device)
    check(target, queries, factors.to(half), LAYERS, rank)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("q", [2, 20])
def test_strides(target, view, q):
    check(target, *map(VIEWS[view], case(q, 29, 2, LAYERS, device=target.device)), LAYERS, 2)


def test_far_apart_rows(target):
    queries, factors = case(2, 2060, 1, [(5, 4)], device=target.device)
    check(target, queries, far_apart(factors), [(5, 4)], 1)


def test_more_queries_than_are_scored_at_a_time(kernel):
    check(kernel, *case(260, 20, 1, [(4, 5)], device=kernel.device), [(4, 5)], 1)
    check(kernel, *case(260, 20, 2, [(4, 5)], device=kernel.device), [(4, 5)], 2)


@pytest.mark.parametrize("rank", [1, 2])
def test_layers_that_are_scored_in_groups(rank):
    """More packed queries than the C++ kernel's group of layers holds: the groups' scores are added."""
    layers = [(40, 64)] * 5
    check(CPP, *case(70, 30, rank, layers), layers, rank)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["Q", "N"])
def test_empty(target, shape):
    got = lk.score_factored(*case(*shape, 2, LAYERS, device=target.device), LAYERS, 2, backend=target.backend)
    assert got.shape == shape


def test_no_layers(target):
    args = (torch.zeros(size, 0, device=target.device) for size in (3, 5))
    got = lk.score_factored(*args, [], 2, backend=target.backend)
    assert torch.equal(got, torch.zeros(3, 5, device=target.device))


@pytest.mark.parametrize("q", [3, 20])
def test_nan_stays_in_its_row(target, q):
    queries, factors = case(q, 50, 2, LAYERS, device=target.device)
    queries[2, 1] = factors[7, 3] = float("nan")
    bad = lk.score_factored(queries, factors, LAYERS, 2, backend=target.backend).isnan()
    assert bad[2].all()
    assert bad[:, 7].all()
    assert bad.sum() == 50 + q - 1


@pytest.mark.parametrize(("q", "rank"), [(1, 1), (7, 2), (30, 4)])
def test_same_bits_for_any_thread_count_and_block_of_rows(dtype, threads, q, rank):
    queries, factors = case(q, 211, rank, SQUARE, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(lk.score_factored(queries, factors, SQUARE, rank, backend="cpp"))
    parts = [lk.score_factored(queries, factors[i : i + 50], SQUARE, rank, backend="cpp") for i in range(0, 211, 50)]
    results.append(torch.cat(parts, 1))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_that_were_factored():
    """The scores of factored rows of rank 2 are those of the rows."""
    g = torch.randn(30, 2, 20, 1, dtype=torch.float64) @ torch.randn(30, 2, 1, 30, dtype=torch.float64)
    rows, queries = g.sum(1).flatten(1), torch.randn(4, 600, dtype=torch.float64)
    factors = lk.factor_rows(rows, [(20, 30)], 2)
    torch.testing.assert_close(lk.score_factored(queries, factors, [(20, 30)], 2), queries @ rows.T)
    torch.testing.assert_close(lk.rebuild_rows(factors, [(20, 30)], 2), rows)


def test_registration(device, dtype):
    torch.library.opcheck(op._op, (*case(3, 20, 2, SQUARE, dtype, device), [32, 32, 8, 16], 2, 1, "auto"))
    queries = case(3, 1, 2, SQUARE, device=device)[0]
    rows = lk.quantize_rows(torch.randn(20, 256 + 48, device=device), "int4")
    encoded = rows.codes, rows.scales, "int4", 128, "fp32"
    torch.library.opcheck(op._op_encoded, (queries, *encoded, [32, 32, 8, 16], 2, 256, "auto"))


def test_compiles_without_a_graph_break(device):
    compiled = torch.compile(lk.score_factored, fullgraph=True, dynamic=True, backend="aot_eager")
    for q, n in ((2, 9), (3, 17)):
        args = (*case(q, n, 2, LAYERS, device=device), LAYERS, 2)
        torch.testing.assert_close(compiled(*args), lk.score_factored(*args))


def test_bad_input_raises():
    queries, factors = case(3, 20, 2, LAYERS)
    with pytest.raises(ValueError, match=r"score_factored: queries \(3, 2925\) must be \[Q, 2926\]"):
        lk.score_factored(queries[:, 1:], factors, LAYERS, 2)
    with pytest.raises(ValueError, match=r"score_factored: factors \(20, 450\) must be \[N, 225\]: rank 1 of 4 layers"):
        lk.score_factored(queries, factors, LAYERS, 1)
    encoded = lk.quantize_rows(factors, "int4")
    with pytest.raises(ValueError, match=r"score_factored: factors \(20, 450\) must be \[N, 225\]: rank 1 of 4 layers"):
        lk.score_factored(queries, encoded, LAYERS, 1)
    with pytest.raises(ValueError, match="score_factored: queries are fp64; for factors in int4"):
        lk.score_factored(queries.double(), encoded, LAYERS, 2)
    with pytest.raises(ValueError, match="score_factored: rank is 9; it must be 1 to 8"):
        lk.score_factored(queries, factors, LAYERS, 9)
    with pytest.raises(ValueError, match="score_factored: align is 0; it must be at least 1"):
        lk.score_factored(queries, factors, LAYERS, 2, align=0)
    with pytest.raises(ValueError, match=r"\(20, 450\) must be \[N, 652\]: rank 2 of 4 layers at multiples of 128"):
        lk.score_factored(queries, factors, LAYERS, 2, align=128)
    with pytest.raises(ValueError, match=r"score_factored: layers hold \(20, 33, 1\)"):
        lk.score_factored(queries, factors, [(20, 33, 1)], 2)
    with pytest.raises(ValueError, match=r"score_factored: queries are torch.bfloat16; for torch.float32 factors"):
        lk.score_factored(queries.bfloat16(), factors, LAYERS, 2)
    with pytest.raises(ValueError, match="score_factored: factors is torch.int8"):
        lk.score_factored(queries, factors.to(torch.int8), LAYERS, 2)


def test_unavailable_backend_raises():
    with pytest.raises(RuntimeError, match="score_factored: backend 'cublas' is not available here"):
        lk.score_factored(*case(3, 20, 2, LAYERS), LAYERS, 2, backend="cublas")
