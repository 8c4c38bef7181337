"""score_topk's CUDA C++ kernels, run on a CPU by tests/ops/cuda_on_cpu."""

import pytest
import torch
from ops.cuda_sources import COMPILER, OnCpu, is_built, stacks
from ops.score_on_cpu import EARLY_COPIES, LATE_COPIES, bound_topk, on_a_device

import logra_kernels as lk
from logra_kernels.ops import _dispatch
from logra_kernels.ops._native import encoded, matrix, row_major
from logra_kernels.ops.score_topk import reference

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return OnCpu("score_topk", tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def arch(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["largest", "smallest"])
def largest(request):
    return request.param


def small_integers(q, n, d):
    """Scores are exact in fp32 in whatever order they are summed, and many are equal."""
    return tuple(torch.randint(-2, 3, (count, d)).float() for count in (q, n))


def run(kernels, arch, queries, rows, k, scale=None, largest=True, first=None, capacity=None, piece=None,
        timing=LATE_COPIES):  # fmt: skip
    """The kernels' best rows, every buffer but the counts and the best filled with what is wrong."""
    (q, d), n = queries.shape, len(rows)
    first, piece = first or n, piece or -(-d // 128) * 128
    capacity, pieces = max(first, capacity or n), -(-d // piece)
    values, indices = torch.full((q, k), float("nan")), torch.full((q, k), -1)
    candidates, partial = torch.full((q, capacity), -1), torch.full((pieces, q, n), float("nan"))
    counts, best = torch.zeros(q, dtype=torch.int32), torch.zeros(q, k, dtype=torch.int64)
    buffers = [t.data_ptr() for t in (values, indices, candidates, counts, best, partial)]
    native = matrix(rows) if isinstance(rows, torch.Tensor) else encoded(row_major(rows))
    scaled = (0, 0) if scale is None else (scale.data_ptr(), scale.stride(0))
    call = bound_topk(kernels, lambda *_: 16 if q <= 16 else 64, timing)
    call(arch, matrix(queries), native, scaled, *buffers, q, n, d, k, largest, first, capacity, piece, pieces, 7)
    assert not counts.any()
    return values, indices


def check(kernels, arch, queries, rows, k, scale=None, largest=True, **options):
    want = reference.score_topk(queries, rows, k, scale, largest)
    for timing in (LATE_COPIES, EARLY_COPIES):  # threads append in either order
        got = run(kernels, arch, queries, rows, k, scale, largest, timing=timing, **options)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("k", [1, 7, 300])
def test_equal_scores_go_by_row_number(kernels, arch, largest, k):
    check(kernels, arch, *small_integers(3, 300, 20), k, largest=largest)


def test_blocks_of_rows(kernels, arch, largest):
    queries, rows = small_integers(5, 700, 20)
    rows[[36, 300, 650], 2] = float("nan")
    scale = torch.randint(0, 3, (700, 2)).float()[:, 0]
    for k, first, capacity in ((10, 130, 128), (10, 10, 250), (50, 20, 600), (1, 1, 333)):
        check(kernels, arch, queries, rows, k, scale, largest, first=first, capacity=capacity)


def test_more_candidates_than_are_sorted_at_once(kernels, largest):
    """Rows get better, so that every one of a later block is a candidate."""
    rows = (torch.arange(9000.0) if largest else -torch.arange(9000.0))[:, None]
    for k in (5, 2048):
        check(kernels, 80, torch.ones(1, 1), rows, k, None, largest, first=2100, capacity=6900)


def test_many_queries(kernels, arch):
    check(kernels, arch, *small_integers(70, 150, 9), 4, first=100, capacity=120)


def test_pieces_of_d(kernels, arch, largest):
    check(kernels, arch, *small_integers(3, 140, 300), 9, torch.rand(140).round(), largest, piece=128)


def test_nan_and_infinities(kernels, arch, largest):
    queries, rows = torch.ones(2, 1), torch.tensor([[0.0], [-torch.inf], [1.0], [torch.inf], [-torch.inf], [-0.0]])
    queries[1] = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(kernels, arch, queries.to(dtype), rows.to(dtype), 6, None, largest)


def test_nothing_to_sum(kernels, arch):
    check(kernels, arch, torch.zeros(2, 0), torch.zeros(5, 0), 3, torch.tensor([1.0, 1, float("nan"), 1, 1]), piece=128)


def test_codes(kernels, arch, largest):
    rows = lk.quantize_rows(torch.randn(150, 260), lk.RowFormat.of("int8"))
    queries, numbers = torch.randn(3, 260), lk.dequantize_rows(rows)
    values, index = run(kernels, arch, queries, rows, 150, None, largest)
    scores = queries.double() @ numbers.double().T
    torch.testing.assert_close(values.double(), scores.gather(1, index), rtol=1e-5, atol=1e-4)
    assert (values.diff(dim=1) * (-1 if largest else 1) >= 0).all()
    assert torch.equal(index.sort(dim=1).values, torch.arange(150).expand(3, -1))


@pytest.mark.skipif(_dispatch.cuda_error() is not None, reason="logra_kernels._C_cuda is not built")
class TestLauncher:
    """ops/score_topk/cuda.py on CPU tensors, its kernels' binding replaced by the kernels on a CPU."""

    @pytest.fixture(params=[(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
    def cuda(self, kernels, monkeypatch, request, tmp_path_factory):
        from logra_kernels.ops.score_topk import cuda

        tile = cuda._C_cuda.score_tile
        bound = bound_topk(kernels, lambda *of: tile(*of)[0])
        here = on_a_device(monkeypatch, request.param, score_topk=bound, score_block=by_reference)
        monkeypatch.setattr(cuda, "_C_cuda", here)
        monkeypatch.setattr(cuda, "FIRST_BLOCK", 100)
        monkeypatch.setattr(cuda, "CANDIDATES", 450)
        monkeypatch.setattr(cuda, "QUERIES_AT_ONCE", 3)
        return cuda

    @pytest.mark.parametrize("n", [70, 400])
    def test_best_rows(self, cuda, largest, n):
        queries, rows = small_integers(5, n, 30)
        scale = torch.randint(0, 3, (n,)).float()
        for k in (1, 20):
            got = cuda.launch(queries, rows, k, scale, largest)
            want = reference.score_topk(queries, rows, k, scale, largest)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])

    def test_codes(self, cuda):
        rows = lk.quantize_rows(torch.randn(60, 260), lk.RowFormat.of("int4"))
        rounded = lk.dequantize_rows(lk.quantize_rows(torch.randn(2, 260), lk.RowFormat.of("int8")))
        exact = reference.launch_encoded(rounded, rows, 10, None, True, 0)
        for digits in (0, 1):
            got = cuda.launch_encoded(rounded, rows, 10, None, True, digits)
            torch.testing.assert_close(got[0], exact[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(got[1], exact[1])

    def test_more_than_the_kernel_keeps(self, cuda):
        queries, rows = small_integers(2, 90, 5)
        got = cuda.launch(queries, rows, 30, None, True)
        want = reference.score_topk(queries, rows, 30)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])

    @pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)], ids=["Q", "N", "D"])
    def test_empty(self, cuda, shape):
        q, n, d = shape
        values, index = cuda.launch(torch.zeros(q, d), torch.zeros(n, d), 3, None, True)
        assert torch.equal(values, torch.zeros(q, min(3, n)))
        assert torch.equal(index, torch.arange(min(3, n)).expand(q, -1))


def by_reference(arch, queries, rows, out, partial, q, n, d, piece, pieces, stream):
    """_C_cuda.score_block by ctypes and torch, on fp32 matrices of neighbours."""
    import ctypes

    def view(address, count, width):
        return torch.frombuffer((ctypes.c_float * (count * width)).from_address(address), dtype=torch.float32)

    given = [view(of[0], count, d).view(count, d) for of, count in ((queries, q), (rows, n))]
    view(out, q, n).view(q, n).copy_(given[0] @ given[1].T)


@is_built
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_best_rows_stay_in_registers(arch):
    assert list(stacks("score_topk", arch).values()) == [0]
