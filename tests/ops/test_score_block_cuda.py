"""score_block's CUDA C++ kernels, run on a CPU by tests/ops/cuda_on_cpu."""

import pytest
import torch
from ops.cuda_sources import COMPILER, OnCpu, is_built, stacks
from ops.score_on_cpu import EARLY_COPIES, LATE_COPIES, bound_block, on_a_device
from ops.views import VIEWS
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops import FORMATS, EncodedRows, _dispatch
from logra_kernels.ops._native import encoded, matrix, row_major
from logra_kernels.ops._queries import as_multiplied
from logra_kernels.ops.score_block import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]  # queries and rows
SCALED = [name for name in FORMATS if lk.RowFormat.of(name).scaled]
WHOLE = [name for name in SCALED if name != "fp8"]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return OnCpu("score_block", tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def arch(request):
    return request.param


def native(rows):
    return matrix(rows) if isinstance(rows, torch.Tensor) else encoded(rows)


def run(kernels, arch, queries, rows, tile, piece, timing=LATE_COPIES):
    """The kernels' scores, written over NaN."""
    (q, d), n = queries.shape, len(rows)
    pieces = -(-d // piece)
    out, partial = torch.full((q, n), float("nan")), torch.full((pieces, q, n), float("nan"))
    queries, rows = (v if isinstance(v, torch.Tensor) else row_major(v) for v in (queries, rows))
    call = bound_block(kernels, lambda *_: tile, timing)
    call(arch, native(queries), native(rows), out.data_ptr(), partial.data_ptr(), q, n, d, piece, pieces, 7)
    return out


def check(kernels, arch, queries, rows, tile=16, piece=1 << 20):
    got = run(kernels, arch, queries, rows, tile, piece)
    asked, numbers = (
        v if isinstance(v, torch.Tensor) else lk.dequantize_rows(v, backend="reference") for v in (queries, rows)
    )
    naive = reference.score_block(asked.float(), numbers.float())
    assert_as_good_as_naive(got, asked.double() @ numbers.double().T, naive)
    again = run(kernels, arch, queries, rows, tile, piece, EARLY_COPIES)
    assert torch.equal(again, got)  # no race between barriers


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize(("queries", "rows"), PAIRS, ids=str)
def test_matches_fp64(kernels, arch, queries, rows, tile):
    if tile < 128 or queries == rows == BF16:
        check(kernels, arch, torch.randn(tile - 3, 200).to(queries), torch.randn(133, 200).to(rows), tile)


@pytest.mark.parametrize("numbers", [F32, BF16, F16], ids=str)
def test_long_sums_do_not_shrink(kernels, arch, numbers):
    """Tensor cores cut their sums off towards zero; one after the other, thousands of them would add up to a bias."""
    queries, rows = (torch.rand(n, 9000).to(numbers) for n in (2, 40))
    got = run(kernels, arch, queries, rows, 16, 1 << 20)
    exact = queries.double() @ rows.double().T
    assert ((got - exact) / exact).mean().abs() < 1e-6


@pytest.mark.parametrize("queries", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_codes(kernels, arch, name, queries):
    form = lk.RowFormat.of(name, 128, "fp16" if queries == BF16 else "fp32")
    check(kernels, arch, torch.randn(5, 205).to(queries), lk.quantize_rows(torch.randn(130, 205), form))


@pytest.mark.parametrize("block", [32, 64, 128, 1024])
@pytest.mark.parametrize("name", WHOLE)
def test_int8_queries(kernels, arch, name, block):
    span = lk.RowFormat.of("int8", min(block, 512), "fp16" if block == 64 else "fp32")
    rows = lk.quantize_rows(torch.randn(130, 1307) * torch.logspace(-2, 2, 1307), lk.RowFormat.of(name, block))
    check(kernels, arch, lk.quantize_rows(torch.randn(5, 1307), span), rows, piece=768)


@pytest.mark.parametrize("tile", [64, 128])
def test_int8_queries_by_wider_tiles(kernels, arch, tile):
    coded = lk.quantize_rows(torch.randn(tile + 3, 270), lk.RowFormat.of("int8"))
    check(kernels, arch, coded, lk.quantize_rows(torch.randn(140, 270), lk.RowFormat.of("int4")), tile)


def test_sums_of_the_largest_codes_are_exact(kernels, arch):
    codes = torch.full((1, 512), 127, dtype=torch.int8)
    rows = EncodedRows(lk.RowFormat.of("int8", 512), 512, codes, torch.ones(1, 1))
    assert run(kernels, arch, rows, rows, 16, 512).item() == 512 * 127**2


@pytest.mark.parametrize("block", [32, 64, 512])
def test_blocks_of_scales_and_pieces(kernels, arch, block):
    rows = lk.quantize_rows(torch.randn(40, 700) * torch.logspace(-2, 2, 700), lk.RowFormat.of("int4", block))
    check(kernels, arch, torch.randn(20, 700), rows, 64, piece=256)
    check(kernels, arch, torch.randn(20, 700), torch.randn(40, 700), 64, piece=256)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(kernels, arch, view):
    for queries, rows in PAIRS:
        check(kernels, arch, VIEWS[view](torch.randn(3, 77).to(queries)), VIEWS[view](torch.randn(9, 77).to(rows)))


def test_rows_of_codes_apart(kernels, arch):
    for name in SCALED:
        check(kernels, arch, torch.randn(3, 77), lk.quantize_rows(torch.randn(19, 77), lk.RowFormat.of(name))[1::3])


def test_every_fp8_code(kernels, arch):
    rows = lk.quantize_rows(torch.randn(1, 256), lk.RowFormat.of("fp8", 32))
    rows.codes.copy_(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    values = lk.dequantize_rows(rows)
    got = run(kernels, arch, torch.eye(256), rows, 64, 256)[:, 0]
    wrong = values[0].isnan()
    assert got.isnan().all()  # one NaN code reaches every score of its row
    rows.codes.view(torch.uint8)[0, wrong] = 0
    assert torch.equal(run(kernels, arch, torch.eye(256), rows, 64, 256)[:, 0], lk.dequantize_rows(rows)[0])


def test_what_is_not_finite_stays_in_its_row(kernels, arch):
    queries, rows = torch.randn(5, 100), torch.randn(50, 100)
    queries[2, 1], rows[7, 3], rows[9, 4] = float("nan"), float("inf"), 3e38
    queries[:, 4] = 1
    bad = ~run(kernels, arch, queries, rows, 16, 128).isfinite()
    assert bad[2].all()
    assert bad[:, 7].all()
    bad[2], bad[:, 7] = False, False
    assert not bad.any()


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize(("queries", "rows"), PAIRS, ids=str)
def test_infinite_numbers(kernels, arch, queries, rows, tile):
    asked, stored = (torch.randint(-2, 3, (n, 300)).to(dtype) for n, dtype in ((tile - 3, queries), (133, rows)))
    asked[3, 5], asked[tile - 4, 250] = float("inf"), -float("inf")
    stored[8, 5], stored[9, 290], stored[132, 17], stored[80, 2] = (float(v) for v in ("inf", "-inf", "inf", "nan"))
    for piece in (128, 384):
        got = run(kernels, arch, asked, stored, tile, piece)
        torch.testing.assert_close(got, asked.float() @ stored.float().T, rtol=0, atol=0, equal_nan=True)


def test_largest_numbers(kernels, arch):
    most = torch.finfo(F32).max  # infinity in bf16
    got = run(kernels, arch, torch.tensor([[most, 1]]), torch.tensor([[0.5, 0.0], [1, 0], [0, 3]]), 16, 128)
    assert got.tolist() == [[most / 2, most, 3]]


@pytest.mark.skipif(_dispatch.cuda_error() is not None, reason="logra_kernels._C_cuda is not built")
class TestLauncher:
    """ops/score_block/cuda.py on CPU tensors, its kernels' binding replaced by the kernels on a CPU."""

    @pytest.fixture(params=[(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
    def cuda(self, kernels, monkeypatch, request):
        from logra_kernels.ops.score_block import cuda

        tile, self.archs = cuda.scores.__globals__["_C_cuda"].score_tile, []
        bound = bound_block(kernels, lambda *of: tile(*of)[0], archs=self.archs)
        on_a_device(monkeypatch, request.param, score_block=bound)
        self.arch = 10 * request.param[0]
        return cuda

    @pytest.mark.parametrize("q", [3, 20])
    def test_numbers_and_codes(self, cuda, q):
        queries, rows = torch.randn(q, 3000), torch.randn(30, 3000)
        from logra_kernels.ops._score_cuda import Operands

        assert Operands.of("score_block", queries, rows, 0).cut()[1] > 1
        exact = queries.double() @ rows.double().T
        assert_as_good_as_naive(cuda.launch(queries, rows), exact, queries @ rows.T)
        codes = lk.quantize_rows(rows, lk.RowFormat.of("int8"))
        numbers = lk.dequantize_rows(codes)
        exact = queries.double() @ numbers.double().T
        assert_as_good_as_naive(cuda.launch_encoded(queries, codes, 0), exact, queries @ numbers.T)
        assert set(self.archs) == {self.arch}

    @pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
    def test_int8_queries(self, cuda, name):
        rows = lk.quantize_rows(torch.randn(30, 700), lk.RowFormat.of(name))
        queries = torch.randn(70, 700)
        rounded = as_multiplied(queries, rows.format, 1)
        numbers = lk.dequantize_rows(rows)
        exact = rounded.double() @ numbers.double().T
        from logra_kernels.ops._score_cuda import Operands

        coded = Operands.of("score_block", queries, rows, 1)
        assert isinstance(coded.queries, torch.Tensor) == (name == "fp8")
        assert_as_good_as_naive(cuda.launch_encoded(queries, rows, 1), exact, rounded @ numbers.T)

    def test_empty(self, cuda):
        assert cuda.launch(torch.zeros(0, 8), torch.zeros(5, 8)).shape == (0, 5)
        assert cuda.launch(torch.zeros(2, 8), torch.zeros(0, 8)).shape == (2, 0)
        assert not cuda.launch(torch.zeros(2, 0), torch.zeros(5, 0)).any()
        nothing = lk.quantize_rows(torch.zeros(5, 0), lk.RowFormat.of("int8"))
        assert not cuda.launch_encoded(torch.zeros(2, 0), nothing, 1).any()

    def test_fp64_is_refused(self, cuda):
        with pytest.raises(RuntimeError, match="score_block: backend 'cuda' has no fp64 kernel"):
            cuda.launch(*torch.zeros(2, 3, 4, dtype=torch.float64))


@is_built
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_sums_stay_in_registers(arch):
    spilled = stacks("score_block", arch)
    assert len(spilled) == 2 * (2 * 9 + 3) + 1  # of 9 pairs of formats, 3 have one part on both sides
    assert not any(spilled.values())
