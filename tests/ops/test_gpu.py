"""What only a GPU shows: streams, devices, memory that is never taken."""

import pytest
import torch
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops import _device, _dispatch
from logra_kernels.ops.project_grad import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_a_side_stream(op, *args: torch.Tensor) -> torch.Tensor:
    """op's answer where its arguments are written on the same side stream, late."""
    late = [torch.full_like(a, float("nan")) for a in args]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for a, b in zip(late, args, strict=True):
            a.copy_(b)
        got = op(*late)
    torch.cuda.synchronize()
    return got


@pytest.mark.parametrize("op", [lk.project_rows, lk.score_block])
def test_two_matrices_on_the_current_stream(op):
    a, b = torch.randn(2, 70, 64, device="cuda")
    assert torch.equal(on_a_side_stream(op, a, b), op(a, b))


def test_project_grad_on_the_current_stream():
    x, dy, p_in, p_out = (torch.randn(s, device="cuda") for s in ((3, 50, 64), (3, 50, 48), (16, 64), (8, 48)))
    assert torch.equal(on_a_side_stream(lk.project_grad, x, dy, p_in, p_out), lk.project_grad(x, dy, p_in, p_out))


def test_score_topk_on_the_current_stream():
    queries, rows = torch.randn(3, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    late = on_a_side_stream(lambda q, r: torch.stack(lk.score_topk(q, r, 5)), queries, rows)
    assert torch.equal(late, torch.stack(lk.score_topk(queries, rows, 5)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current():
    a, b = torch.randn(2, 70, 64, device="cuda:1")
    assert lk.score_block(a, b).device == a.device
    torch.testing.assert_close(lk.score_block(a, b), a @ b.T)


def extra_memory(call) -> int:
    """Bytes at the peak of the call beyond those before it, in a second run, when nothing is left to compile."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_score_topk_takes_no_memory_for_all_scores():
    queries = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(1 << 21, 32, device="cuda", dtype=torch.bfloat16)
    assert extra_memory(lambda: lk.score_topk(queries, rows, 100)) < 64 * (1 << 21) * 4 / 2


def test_project_grad_takes_no_memory_for_projected_positions():
    """Beside the result there are sums of chunks, at most a sixteenth of what is read."""
    x, dy = (torch.randn(4, 4096, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    p_in, p_out = (torch.randn(64, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    allowed = 4 * 64 * 64 * 4 + (x.nbytes + dy.nbytes) / 16 + 4096
    assert allowed < 0.6 * 2 * 4 * 4096 * 64 * 2  # both sides' projected positions in bf16
    assert extra_memory(lambda: lk.project_grad(x, dy, p_in, p_out)) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [16, 64, 128])
def test_project_grad_of_every_tile_at_full_size(dtype, k):
    """Many long samples, for which no block is made smaller, so that the tables' tiles are launched as they stand."""
    x, dy = (torch.randn(48, 1024, d, device="cuda").to(dtype) for d in (256, 320))
    p_in, p_out = ((torch.randn(k, d, device="cuda") / d**0.5).to(dtype) for d in (256, 320))
    got = lk.project_grad(x, dy, p_in, p_out, backend="triton")
    exact = reference.project_grad(*(a.double() for a in (x, dy, p_in, p_out)), None, None)
    assert_as_good_as_naive(got, exact, reference.project_grad(x, dy, p_in, p_out, None, None))
    assert torch.equal(lk.project_grad(x, dy, p_in, p_out, backend="triton"), got)


def test_in_a_cuda_graph():
    """Ops are recorded and replayed: they wait for nothing and read nothing back."""
    x, dy = (torch.randn(3, 200, d, device="cuda").bfloat16() for d in (256, 320))
    p_in, p_out = (torch.randn(64, d, device="cuda").bfloat16() for d in (256, 320))
    queries, rows = torch.randn(5, 4096, device="cuda"), lk.quantize_rows(torch.randn(300, 4096, device="cuda"), "int8")

    def calls():
        g = lk.project_grad(x, dy, p_in, p_out)
        return lk.project_rows(x, p_in), g, lk.score_block(queries, rows), *lk.score_topk(queries, rows, 7)

    with torch.cuda.stream(torch.cuda.Stream()):
        expected = calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = calls()
    for out in recorded:
        out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(recorded, expected, strict=True))


@pytest.mark.skipif(_dispatch.cuda_error() is not None, reason="logra_kernels._C_cuda is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_sums_in_cuda_do_not_shrink(dtype):
    """Tensor cores cut their sums off towards zero; one after the other, thousands of them would add up to a bias."""
    queries, rows = (torch.rand(n, 98304, device="cuda").to(dtype) for n in (64, 512))
    got = lk.score_block(queries, rows, backend="cuda")
    exact = queries.double() @ rows.double().T
    assert ((got - exact) / exact).mean().abs() < 4e-6


@pytest.mark.skipif(_dispatch.cuda_error() is not None, reason="logra_kernels._C_cuda is not built")
@pytest.mark.parametrize("path", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [16, 64, 128, 200])
def test_project_grad_in_cuda_by_either_path(monkeypatch, path, dtype, k):
    from logra_kernels.ops.project_grad import cuda

    if path == "sm_90a" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(_device, "CUDA_PATH", path)
    for lengths in ([512] * 16, [8192], [5000, 12, 700, 0, 1800, 680]):
        args = [torch.randn(s, device="cuda").to(dtype) for s in ((sum(lengths), 1024), (sum(lengths), 520))]
        args += [(torch.randn(k, d, device="cuda") / d**0.5).to(dtype) for d in (1024, 520)]
        offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
        assert cuda.arch_of(*args, dtype) == (90 if path == "sm_90a" else 80)
        got = lk.project_grad(*args, offsets, backend="cuda")
        exact = reference.project_grad(*(a.double() for a in args), offsets, None)
        assert_as_good_as_naive(got, exact, reference.project_grad(*args, offsets, None))
        for cluster in (0, 1, 2, 4):
            monkeypatch.setattr(cuda, "CLUSTER", cluster)
            assert torch.equal(lk.project_grad(*args, offsets, backend="cuda"), got)


@pytest.mark.skipif(_dispatch.cuda_error() is not None, reason="logra_kernels._C_cuda is not built")
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2", "sign"])
def test_codes_scored_in_cuda(name, query_dtype):
    for q, n, d in ((3, 1000, 5000), (200, 70, 98304)):
        queries = torch.randn(q, d, device="cuda").to(query_dtype)
        rows = lk.quantize_rows(torch.randn(n, d, device="cuda"), lk.RowFormat.of(name))
        numbers = lk.dequantize_rows(rows)
        got = lk.score_block(queries, rows, backend="cuda")
        naive = queries.float() @ numbers.T
        assert_as_good_as_naive(got, queries.double() @ numbers.double().T, naive)
        assert torch.equal(lk.score_block(queries, rows, backend="cuda"), got)


def test_more_than_2_to_31_elements():
    x = torch.zeros(3, 1 << 14, 1 << 16, device="cuda", dtype=torch.bfloat16)
    x[2, -1] = 1
    p = torch.ones(4, 1 << 16, device="cuda", dtype=torch.bfloat16)
    got = lk.project_rows(x, p)
    assert (got[2, -1] == 1 << 16).all()
    assert got.count_nonzero() == 4
