"""score_block's CUDA C++ kernels, run on a CPU by tests/ops/cuda_on_cpu."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
from ops.cuda_sources import COMPILER, NVCC, OnCpu, machine_code
from ops.views import VIEWS
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops import FORMATS, _dispatch
from logra_kernels.ops._native import encoded, matrix, row_major
from logra_kernels.ops.score_block import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]  # queries and rows
SCALED = [name for name in FORMATS if lk.RowFormat.of(name).scaled]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return OnCpu("score_block", tmp_path_factory.mktemp("cuda_on_cpu"))


def call(kernels, tile, descending, queries, rows, codes, *sizes):
    def numbers(of):
        return None if of is None else (ctypes.c_int64 * len(of))(*map(int, of))

    native = map(ctypes.c_int64, sizes)
    kernels(tile, int(descending), numbers(queries), numbers(rows), numbers(codes), *native)


def run(kernels, queries, rows, tile, piece, descending=False):
    """The kernels' scores, written over NaN."""
    (q, d), n = queries.shape, rows.shape[0]
    pieces = -(-d // piece)
    out, partial = torch.full((q, n), float("nan")), torch.full((pieces, q, n), float("nan"))
    plain = isinstance(rows, torch.Tensor)
    given = (matrix(rows), None) if plain else (None, encoded(row_major(rows)))
    sizes = (out.data_ptr(), partial.data_ptr(), q, n, d, piece, pieces)
    call(kernels, tile, descending, matrix(queries), *given, *sizes)
    return out


def check(kernels, queries, rows, tile=16, piece=1 << 20):
    got = run(kernels, queries, rows, tile, piece)
    numbers = rows if isinstance(rows, torch.Tensor) else lk.dequantize_rows(rows, backend="reference")
    naive = reference.score_block(queries.float(), numbers.float())
    assert_as_good_as_naive(got, queries.double() @ numbers.double().T, naive)
    assert torch.equal(run(kernels, queries, rows, tile, piece, descending=True), got)  # no race between barriers


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize(("queries", "rows"), PAIRS, ids=str)
def test_matches_fp64(kernels, queries, rows, tile):
    check(kernels, torch.randn(tile - 3, 200).to(queries), torch.randn(133, 200).to(rows), tile)


@pytest.mark.parametrize("queries", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_codes(kernels, name, queries):
    form = lk.RowFormat.of(name, 128, "fp16" if queries == BF16 else "fp32")
    check(kernels, torch.randn(5, 205).to(queries), lk.quantize_rows(torch.randn(130, 205), form))


@pytest.mark.parametrize("block", [32, 64, 512])
def test_blocks_of_scales_and_pieces(kernels, block):
    rows = lk.quantize_rows(torch.randn(40, 700) * torch.logspace(-2, 2, 700), lk.RowFormat.of("int4", block))
    check(kernels, torch.randn(20, 700), rows, 64, piece=192)
    check(kernels, torch.randn(20, 700), torch.randn(40, 700), 64, piece=192)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(kernels, view):
    for queries, rows in PAIRS:
        check(kernels, VIEWS[view](torch.randn(3, 77).to(queries)), VIEWS[view](torch.randn(9, 77).to(rows)))


def test_rows_of_codes_apart(kernels):
    for name in SCALED:
        check(kernels, torch.randn(3, 77), lk.quantize_rows(torch.randn(19, 77), lk.RowFormat.of(name))[1::3])


def test_every_fp8_code(kernels):
    rows = lk.quantize_rows(torch.randn(1, 256), lk.RowFormat.of("fp8", 32))
    rows.codes.copy_(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    values = lk.dequantize_rows(rows)
    got = run(kernels, torch.eye(256), rows, 64, 256)[:, 0]
    wrong = values[0].isnan()
    assert got.isnan().all()  # one NaN code reaches every score of its row
    rows.codes.view(torch.uint8)[0, wrong] = 0
    assert torch.equal(run(kernels, torch.eye(256), rows, 64, 256)[:, 0], lk.dequantize_rows(rows)[0])


def test_what_is_not_finite_stays_in_its_row(kernels):
    queries, rows = torch.randn(5, 100), torch.randn(50, 100)
    queries[2, 1], rows[7, 3], rows[9, 4] = float("nan"), float("inf"), 3e38
    queries[:, 4] = 1
    bad = ~run(kernels, queries, rows, 16, 128).isfinite()
    assert bad[2].all()
    assert bad[:, 7].all()
    bad[2], bad[:, 7] = False, False
    assert not bad.any()


@pytest.mark.skipif(_dispatch.cuda_error() is not None, reason="logra_kernels._C_cuda is not built")
class TestLauncher:
    """ops/score_block/cuda.py on CPU tensors, its kernels' binding replaced by the kernels on a CPU."""

    @pytest.fixture
    def cuda(self, kernels, monkeypatch):
        from logra_kernels.ops.score_block import cuda

        def bound(queries, rows, out, partial, q, n, d, piece, pieces, stream):
            assert stream == 7
            assert (pieces - 1) * piece < d <= pieces * piece
            given = (rows, None) if len(rows) == 4 else (None, rows)
            call(kernels, tile(q)[0], False, queries, *given, out, partial, q, n, d, piece, pieces)

        tile = cuda._C_cuda.score_block_tile
        monkeypatch.setattr(cuda, "_C_cuda", SimpleNamespace(score_block=bound, score_block_tile=tile))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
        monkeypatch.setattr(cuda, "programs_of", lambda tensor: 8)
        return cuda

    @pytest.mark.parametrize("q", [3, 20])
    def test_numbers_and_codes(self, cuda, q):
        queries, rows = torch.randn(q, 3000), torch.randn(30, 3000)
        assert cuda.cut(q, 30, 3000, 8)[1] > 1
        exact = queries.double() @ rows.double().T
        assert_as_good_as_naive(cuda.launch(queries, rows), exact, queries @ rows.T)
        codes = lk.quantize_rows(rows, lk.RowFormat.of("int8"))
        numbers = lk.dequantize_rows(codes)
        exact = queries.double() @ numbers.double().T
        assert_as_good_as_naive(cuda.launch_encoded(queries, codes, False), exact, queries @ numbers.T)

    def test_empty(self, cuda):
        assert cuda.launch(torch.zeros(0, 8), torch.zeros(5, 8)).shape == (0, 5)
        assert cuda.launch(torch.zeros(2, 8), torch.zeros(0, 8)).shape == (2, 0)
        assert not cuda.launch(torch.zeros(2, 0), torch.zeros(5, 0)).any()

    def test_fp64_is_refused(self, cuda):
        with pytest.raises(RuntimeError, match="'cuda' has no fp64 kernel"):
            cuda.launch(*torch.zeros(2, 3, 4, dtype=torch.float64))


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_compiles(tmp_path):
    spilled, _ = machine_code("score_block", "80", tmp_path / "x.cubin")
    assert len(spilled) == 2 * (len(PAIRS) + 3) + 1
    assert not any(spilled.values())
