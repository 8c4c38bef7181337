"""score_block and score_topk on rows with scales."""

import os
import subprocess
import sys

import pytest
import torch
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels import _C
from logra_kernels.ops import FORMATS
from logra_kernels.ops.score_block import op as block_op
from logra_kernels.ops.score_topk import op as topk_op

SCALED = [name for name in FORMATS if lk.RowFormat.of(name).scaled]
SHAPES = [(1, 1, 16), (3, 5, 300), (8, 9, 128), (9, 37, 700), (70, 29, 131)]  # Q N D


@pytest.fixture(params=SCALED)
def name(request):
    return request.param


def case(q, n, d, name, block=128, scale="fp32", dtype=torch.float32, device="cpu"):
    rows = lk.quantize_rows(torch.randn(n, d, device=device), lk.RowFormat.of(name, block, scale))
    return torch.randn(q, d, device=device).to(dtype), rows


def check(backend, queries, rows, **options):
    numbers = lk.dequantize_rows(rows, backend="reference")
    naive = queries @ numbers.to(queries.dtype).T
    got = lk.score_block(queries, rows, backend=backend, **options)
    assert got.dtype == torch.float32
    exact = queries.double() @ numbers.double().T
    if options.get("query_format") == "fp32" or backend != "cpp":
        assert_as_good_as_naive(got, exact, naive.float())
    else:
        within_sixteen_bits(got, exact, naive, queries, rows)
    return got


def within_sixteen_bits(got, exact, naive, queries, rows):
    """Error beyond what the docstring allows, sum_d max|q| |g_d| / 65000 with the maximum over numbers of one scale.

    Beside fp8 rows sum_d max|q| (|g_d| + max|g|) / 65000.
    """
    span = min(rows.format.block, 512)
    padded = torch.nn.functional.pad(queries.double().abs(), (0, -queries.shape[1] % span))
    largest = padded.unflatten(1, (-1, span)).amax(2).repeat_interleave(span, 1)[:, : queries.shape[1]]
    sizes = lk.dequantize_rows(rows, backend="reference").double().abs()
    if rows.format.name == "fp8":
        sizes += 448 * rows.scales.double().repeat_interleave(rows.format.block, 1)[:, : rows.dim]
    allowed = largest / 65000 @ sizes.T
    over = (got.double() - exact).abs() - allowed
    assert not got.isnan().any()
    slack = 2 * (naive.double() - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (over <= slack).all(), f"{over.max()=:.3e} {slack=:.3e}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_fp64(target, name, shape):
    check(target.backend, *case(*shape, name, device=target.device))


def test_fp32_queries_are_never_coarser(name):
    for shape in SHAPES:
        check("cpp", *case(*shape, name), query_format="fp32")


def test_queries_of_16_bits(target, name):
    for dtype in (torch.bfloat16, torch.float16):
        check(target.backend, *case(9, 37, 700, name, dtype=dtype, device=target.device))


@pytest.mark.parametrize(("block", "scale"), [(32, "fp32"), (256, "fp16"), (4096, "fp32")])
def test_blocks_and_scales(target, name, block, scale):
    for q in (2, 12):
        check(target.backend, *case(q, 5, 700, name, block, scale, device=target.device))


def test_few_and_many_queries_of_long_rows(name):
    """More units than are multiplied at a time, a unit that is not whole, every count of queries side by side."""
    for q in (1, 2, 3, 7, 17):
        check("cpp", *case(q, 9, 128 * 65 + 24, name))
    check("cpp", *case(4, 5, 8192, name, 1024, "fp16"))


@pytest.mark.parametrize(("block", "scale"), [(128, "fp32"), (256, "fp16"), (512, "fp32"), (4096, "fp16")])
def test_many_queries(name, block, scale):
    """Rows and queries that fill a tile, or several, or lack or exceed them by one; depths that end in a unit."""
    for q, n, d in (
        (15, 31, 128),
        (16, 33, 1000),
        (17, 64, 512),
        (33, 1, 1153),
        (64, 97, 128 * 21 + 60),
        (260, 40, 300),
    ):
        queries, rows = case(q, n, d, name, block, scale)
        queries[:, ::61] *= 1000
        check("cpp", queries, rows)
        check("cpp", queries, rows, query_format="fp32")


@pytest.mark.parametrize("span", [128, 256, 512])
def test_many_whole_numbers_are_exact(span):
    """Queries in int8 and codes up to their largest; every sum is below 2^24."""
    q, n, d = 40, 70, 8 * span - 4
    queries = torch.randint(-1, 2, (q, d)).float()
    queries[:, ::128] = torch.tensor([127.0, -127.0])[torch.randint(2, (q, (d + 127) // 128))]
    for name, most in (("int8", 127), ("int4", 7), ("int2", 1)):
        numbers = torch.randint(-most, most + 1, (n, d)).float()
        numbers[:, ::32] = most  # the scale is 1
        rows = lk.quantize_rows(numbers, lk.RowFormat.of(name, span))
        assert torch.equal(lk.dequantize_rows(rows), numbers)
        got = lk.score_block(queries, rows, query_format="int8", backend="cpp")
        assert torch.equal(got.double(), queries.double() @ numbers.double().T)


def check_the_largest(q, byte):
    """Rows of one code, and queries of the largest number of one sign or of the code's: fixed point is that close."""
    for name in ("int8", "int4", "int2", "sign"):
        for d, span in ((512, 512), (1300, 1024)):
            rows = lk.quantize_rows(torch.ones(5, d), lk.RowFormat.of(name, span, "fp32"))
            rows.codes.view(torch.uint8).fill_(byte)
            numbers = lk.dequantize_rows(rows, backend="reference").double()
            for queries in (torch.ones(q, d), -torch.ones(q, d), numbers[:1].sign().float().expand(q, d)):
                off = lk.score_block(queries, rows, backend="cpp").double() - queries.double() @ numbers.T
                allowed = numbers.abs().sum(1) / 65000 + 4 * torch.finfo(torch.float32).eps * d  # of codes of at most 1
                assert (off.abs() <= allowed).all(), f"{name} {d=} {off.abs().max()=:.3e}"


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0x81, 0xFF])
@pytest.mark.parametrize("q", [1, 3, 4, 40])
def test_sums_of_the_largest_codes_and_queries_do_not_overflow(q, byte):
    check_the_largest(q, byte)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_stay_in_their_row(name, bad):
    queries, rows = case(20, 40, 700, name)
    whole = lk.score_block(queries, rows, backend="cpp")
    rows.scales[33, 2] = bad
    got = lk.score_block(queries, rows, backend="cpp")
    assert not got[:, 33].isfinite().any()
    kept = [i for i in range(40) if i != 33]
    assert torch.equal(got[:, kept], whole[:, kept])


@pytest.mark.parametrize(("block", "scale"), [(128, "fp32"), (1024, "fp32"), (128, "fp16")])
def test_queries_of_fp8_in_parts(block, scale):
    """Rows and queries that fill no tile, sizes far apart in both, and queries of bf16, which leave no rest."""
    shapes = ((1, 35, 128 * 37 + 40), (2, 5, 127), (3, 301, 128 * 5), (7, 70, 128 * 300 + 1))  # as few of them
    for q, n, d in (*shapes, (9, 1, 128), (33, 35, 128 * 37 + 40), (65, 14, 128 * 9 + 1)):
        queries, rows = torch.randn(q, d), torch.randn(n, d)
        queries *= torch.logspace(-8, 8, q).unsqueeze(1)
        queries[:, ::61] *= 1000
        rows[:, ::47] *= 300
        rows = lk.quantize_rows(rows, lk.RowFormat.of("fp8", block, scale))
        check("cpp", queries, rows)
        check("cpp", queries.bfloat16(), rows)
        check("cpp", queries, rows, query_format="fp32")
        for query_format, allowed in ((None, 1e-4), ("int8", 0.02)):
            exact = queries.double() @ lk.dequantize_rows(rows).double().T
            got = lk.score_block(queries, rows, query_format=query_format).double()
            size = queries.double().norm(dim=1, keepdim=True) * lk.dequantize_rows(rows).double().norm(dim=1) / d**0.5
            assert ((got - exact) / size).abs().square().mean().sqrt() < allowed


@pytest.mark.parametrize(("block", "scale"), [(128, "fp32"), (512, "fp32"), (128, "fp16")])
def test_few_queries_of_signs(block, scale):
    """Rows that fill no vector, units of several runs, and queries of which one number outweighs its neighbours."""
    for q, n, d in ((1, 33, 128 * 250 + 40), (2, 70, 128 * 140 + 4), (5, 301, 128 * 50)):
        queries, rows = case(q, n, d, "sign", block, scale)
        queries[:, ::61] *= 1000
        check("cpp", queries, rows)


def test_few_queries_that_are_not_finite(name):
    queries, rows = case(3, 40, 700, name)
    queries[1, 300] = float("inf")
    got = lk.score_block(queries, rows, backend="cpp")
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa != _C.isa()])
def test_every_instruction_set(isa):
    script = """
import sys, torch, logra_kernels as lk
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/ops"]
from test_score_encoded import check_the_largest
from tolerance import assert_as_good_as_naive
for q in (1, 4, 40):
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        check_the_largest(q, byte)
for name in ("fp8", "int8", "int4", "int2", "sign"):
    for block, scale in ((64, "fp32"), (128, "fp32"), (256, "fp16"), (1024, "fp32")):
        for q, n, d in ((1, 27, 1000), (5, 70, 9100), (20, 25, 9000), (33, 70, 1300)):
            queries, rows = torch.randn(q, d), lk.quantize_rows(torch.randn(n, d), lk.RowFormat.of(name, block, scale))
            numbers = lk.dequantize_rows(rows, backend="reference")
            exact = queries.double() @ numbers.double().T
            got = lk.score_block(queries, rows, query_format="fp32", backend="cpp")
            assert_as_good_as_naive(got, exact, queries @ numbers.T)
            size = queries.norm() * numbers.norm() / d**0.5  # that of the scores of random rows
            for query_format, allowed in ((None, 1e-4), ("int8", 0.02)):
                got = lk.score_block(queries, rows, query_format=query_format, backend="cpp")
                assert (got - exact).norm() < allowed * size
"""
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"LOGRA_KERNELS_ISA": isa}
    subprocess.run([sys.executable, "-c", script, tests], env=environment, check=True)


@pytest.mark.parametrize("q", [2, 20])
def test_int8_queries(target, name, q):
    queries, rows = case(q, 30, 1200, name, device=target.device)
    span = lk.RowFormat.of("int8", 128)
    rounded = lk.dequantize_rows(lk.quantize_rows(queries, span))
    got = lk.score_block(queries, rows, query_format="int8", backend=target.backend)
    numbers = lk.dequantize_rows(rows)
    torch.testing.assert_close(got.double(), rounded.double() @ numbers.double().T, rtol=1e-5, atol=1e-4)
    error = (got.double() - queries.double() @ numbers.double().T).norm() / got.norm()
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_topk_is_the_order_of_the_scores(target, name, largest):
    queries, rows = case(3, 90, 260, name, device=target.device)
    scale = torch.rand(90, device=target.device) + 0.5
    scores = lk.score_block(queries, rows, backend=target.backend) * scale
    order = torch.sort(scores if largest else -scores, dim=1, descending=True, stable=True).indices[:, :7]
    values, index = lk.score_topk(queries, rows, 7, scale, largest=largest, backend=target.backend)
    assert torch.equal(index, order)
    torch.testing.assert_close(values, scores.gather(1, order), rtol=1e-6, atol=1e-6)


def test_equal_rows_come_in_their_order(target, name):
    queries, rows = case(2, 1, 200, name, device=target.device)
    if target.backend == "triton" and target.device == "cpu":
        queries[:, 1:] = 0  # the interpreter multiplies by BLAS, where the order of a sum depends on the column
    same = rows[torch.zeros(40, dtype=torch.int64, device=target.device)]
    assert torch.equal(
        lk.score_topk(queries, same, 40, backend=target.backend)[1].cpu(), torch.arange(40).expand(2, 40)
    )


@pytest.mark.parametrize("q", [3, 20, 70])
def test_same_bits_for_any_thread_count_and_block_of_rows(name, threads, q):
    queries, rows = case(q, 301, 900, name)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(lk.score_block(queries, rows, backend="cpp"))
    found.append(torch.cat([lk.score_block(queries, rows[i : i + 50], backend="cpp") for i in range(0, 301, 50)], 1))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("q", [3, 20])
def test_what_is_not_finite_stays_in_its_query(target, name, bad, q):
    queries, rows = case(q, 15, 200, name, device=target.device)
    queries[1, 7] = bad
    got = lk.score_block(queries, rows, backend=target.backend)
    wrong = ~got.isfinite()
    numbers = lk.dequantize_rows(rows)[:, 7]
    assert (wrong[1] == ((numbers != 0) | (bad != bad))).all() or wrong[1].all()
    wrong[1] = False
    assert not wrong.any()


def test_views_of_rows(target, name):
    queries, rows = case(4, 30, 200, name, device=target.device)
    whole = lk.score_block(queries, rows, backend=target.backend)
    got = lk.score_block(queries, rows[3:29:2], backend=target.backend)
    torch.testing.assert_close(got, whole[:, 3:29:2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)], ids=["Q", "N", "D"])
def test_empty(target, name, shape):
    queries, rows = case(*shape, name, device=target.device)
    got = lk.score_block(queries, rows, backend=target.backend)
    assert got.shape == shape[:2]
    assert not got.any()


def test_registration(device):
    queries, rows = case(3, 20, 200, "int4", device=device)
    encoded = (rows.codes, rows.scales, "int4", 128, "fp32")
    torch.library.opcheck(block_op._op_encoded, (queries, *encoded, 2, "auto"))
    torch.library.opcheck(topk_op._op_encoded, (queries, *encoded, 5, None, True, 2, "auto"))


def test_bad_input_raises():
    queries, rows = case(3, 20, 200, "int4")
    with pytest.raises(ValueError, match=r"score_block: queries \(3, 199\) and rows \(20, 200\)"):
        lk.score_block(queries[:, 1:], rows)
    with pytest.raises(ValueError, match="score_topk: queries are fp64; for rows in int4"):
        lk.score_topk(queries.double(), rows, 3)
    with pytest.raises(ValueError, match="query_format is 'int4'; it must be None or one of fp32, int8"):
        lk.score_block(queries, rows, query_format="int4")
    with pytest.raises(ValueError, match="query_format 'int8' is for rows with scales"):
        lk.score_block(queries, torch.randn(20, 200), query_format="int8")
    with pytest.raises(ValueError, match=r"row_scale \(19,\) torch.float32 must be \[20\] torch.float32"):
        lk.score_topk(queries, rows, 3, torch.ones(19))


@pytest.mark.parametrize("q", [1, 2, 3, 4])
@pytest.mark.parametrize("d", [64, 448, 1152])
def test_any_number_of_rows(name, q, d):
    """The last rows of a few streams through them are as many as there are left."""
    queries = torch.randn(q, d)
    for n in range(1, 36):
        rows = lk.quantize_rows(torch.randn(n, d), name)
        exact = queries.double() @ lk.dequantize_rows(rows).double().T
        junk = torch.full((q, n), torch.nan)
        del junk  # the memory that the scores are likely to get
        for query_format in (None, "int8"):
            got = lk.score_block(queries, rows, query_format=query_format).double()
            torch.testing.assert_close(got, exact, rtol=0, atol=0.03 * d**0.5)
        index = lk.score_topk(queries, rows, n)[1]
        assert sorted(index[0].tolist()) == list(range(n))
