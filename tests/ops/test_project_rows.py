import pytest
import torch
from ops.views import VIEWS, far_apart
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops.project_rows import op, reference

SHAPES = [(1, 1, 16, 16), (3, 37, 40, 24), (2, 70, 131, 1), (1, 5, 1, 7), (2, 9, 33, 150)]  # N T d k


def case(n, t, d, k, dtype=torch.float32, device="cpu"):
    x = torch.randn(n, t, d, device=device).to(dtype)
    return x, (torch.randn(k, d, device=device) / d**0.5).to(dtype)


def check(target, x, p):
    got = lk.project_rows(x, p, backend=target.backend)
    assert_as_good_as_naive(got, reference.project_rows(x.double(), p.double()), reference.project_rows(x, p))
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_fp64(target, dtype, shape):
    got = check(target, *case(*shape, dtype, target.device))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("rows", "factor"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=["rounded", "bf16-wide", "fp16-wide"],
)
@pytest.mark.parametrize("view", VIEWS)
def test_multiplies_in_the_dtype_of_p(target, rows, factor, view):
    x, p = (VIEWS[view](v) for v in case(3, 19, 137, 11, device=target.device))
    x, p = x.to(rows), p.to(factor)
    got = lk.project_rows(x, p, backend=target.backend)
    exact = reference.project_rows(x.to(factor).double(), p.double())
    assert_as_good_as_naive(got, exact, reference.project_rows(x, p))
    converted = lk.project_rows(x.to(factor), p, backend=target.backend)
    torch.testing.assert_close(got, converted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(target, dtype, view):
    check(target, *map(VIEWS[view], case(3, 19, 37, 11, dtype, target.device)))


@pytest.mark.parametrize("k", [16, 40, 80, 144, 290])
@pytest.mark.parametrize("d", [31, 1024, 2081])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=["rounded", "bf16"])
def test_whole_numbers_are_exact_however_rows_lie(rows, d, k):
    """Long rows and many columns are cut into pieces; sums of small whole numbers do not depend on how."""
    p = torch.randint(-2, 3, (k, d)).bfloat16()
    x = torch.randint(-3, 4, (3, 53, d)).to(rows)
    exact = (x.double() @ p.double().T).float()
    apart = torch.full((3, 61, d + 5), float("nan"), dtype=rows)[:, 4:57, 2 : d + 2].copy_(x)
    turned = torch.full((d, 3, 55), float("nan"), dtype=rows)[:, :, 1:54].permute(1, 2, 0).copy_(x)
    for lies in (x, apart, turned, x[:, :48], x[:1, :1]):
        got = lk.project_rows(lies, p, backend="cpp")
        assert torch.equal(got, exact[: lies.shape[0], : lies.shape[1]])


def test_expanded(target):
    x, p = case(1, 1, 37, 11, device=target.device)
    check(target, x.expand(3, 20, 37), p[:1].expand(11, 37))


def test_far_apart_rows(target):
    x, p = case(1, 2100, 16, 8, device=target.device)
    check(target, far_apart(x[0]).unsqueeze(0), p)


@pytest.mark.parametrize("shape", [(0, 5, 8, 4), (2, 0, 8, 4), (2, 5, 8, 0), (2, 5, 0, 4)], ids=["N", "T", "k", "d"])
def test_empty(target, shape):
    x, p = torch.zeros(*shape[:3], device=target.device), torch.zeros(shape[3], shape[2], device=target.device)
    got = lk.project_rows(x, p, backend=target.backend)
    assert got.shape == (*shape[:2], shape[3])
    assert not got.any()


def test_leading_dimensions(target):
    x, p = case(6, 4, 16, 5, device=target.device)
    whole = lk.project_rows(x, p, backend=target.backend)
    for shape in ((2, 3, 4, 16), (24, 16)):
        torch.testing.assert_close(lk.project_rows(x.view(shape), p).view(6, 4, 5), whole)
    torch.testing.assert_close(lk.project_rows(x[0, 0], p), whole[0, 0])


def test_nan_stays_in_its_row(target):
    x, p = case(2, 5, 16, 4, device=target.device)
    x[1, 2, 3] = float("nan")
    bad = lk.project_rows(x, p, backend=target.backend).isnan()
    assert bad[1, 2].all()
    assert bad.sum() == 4


def test_same_bits_for_any_thread_count(dtype, threads):
    args = case(3, 211, 96, 24, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(lk.project_rows(*args, backend="cpp"))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_same_bits_again(target, dtype):
    args = case(2, 65, 70, 20, dtype, target.device)
    first, second = (lk.project_rows(*args, backend=target.backend) for _ in range(2))
    assert torch.equal(first, second)


def test_does_not_depend_on_the_batch(target):
    x, p = case(4, 33, 40, 16, device=target.device)
    whole = lk.project_rows(x, p, backend=target.backend)
    parts = [lk.project_rows(x[i : i + 1], p, backend=target.backend) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-6)


WIDTHS = (16, 48, 64, 100, 24)


def test_columns_have_the_bits_of_their_factor_alone(kernel, dtype):
    """Whatever the factor is stacked with; fp64 as well."""
    x, p = case(2, 70, 500, sum(WIDTHS), dtype, kernel.device)
    if kernel == ("triton", "cpu"):
        p = p.mul(64).round().div(64)  # NumPy's products hang on where a column lies, unless they are exact
        x = x.mul(16).round().div(16)
    whole = lk.project_rows(x, p, backend=kernel.backend)
    for columns, part in zip(whole.split(WIDTHS, -1), p.split(WIDTHS), strict=True):
        assert torch.equal(columns, lk.project_rows(x, part, backend=kernel.backend))
        assert torch.equal(columns, lk.project_rows(x, part.clone(), backend=kernel.backend))


def test_tiles_are_the_same_for_any_k(monkeypatch):
    """On a GPU that decides which products are taken in which order."""
    triton = pytest.importorskip("logra_kernels.ops.project_rows.triton")
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(options)

    monkeypatch.setattr(triton, "_project_rows_kernel", Kernel())
    for k in (1, 16, 64, 200):
        triton.launch(*case(2, 70, 500, k))
    assert len(launched) == 4
    assert all(options == launched[0] for options in launched)


def test_nothing_is_promised_of_other_products(monkeypatch):
    assert op.columns_stand_alone("cpu")
    op.columns_stand_alone.cache_clear()
    monkeypatch.setattr(op, "launcher", lambda *_: reference.project_rows)
    assert not op.columns_stand_alone("cpu")
    op.columns_stand_alone.cache_clear()


def test_registration(device, dtype):
    torch.library.opcheck(op._op, (*case(3, 7, 16, 5, dtype, device), "auto"))


def test_compiles_without_a_graph_break(device):
    compiled = torch.compile(lk.project_rows, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, t in ((2, 9), (3, 17)):
        args = case(n, t, 16, 5, device=device)
        torch.testing.assert_close(compiled(*args), lk.project_rows(*args))


def test_bad_input_raises():
    x, p = case(2, 3, 8, 4)
    with pytest.raises(ValueError, match=r"project_rows: x \(2, 3, 8\) must be .* p \(4, 7\)"):
        lk.project_rows(x, p[:, 1:])
    with pytest.raises(ValueError, match=r"project_rows: x .* p"):
        lk.project_rows(x, p[0])
    with pytest.raises(ValueError, match=r"project_rows: x is torch.float32 and p is torch.float16"):
        lk.project_rows(x, p.half())
    with pytest.raises(ValueError, match=r"project_rows: x is torch.float64 and p is torch.bfloat16"):
        lk.project_rows(x.double(), p.bfloat16())
    with pytest.raises(ValueError, match=r"project_rows: x is torch.int64"):
        lk.project_rows(x.long(), p)
    with pytest.raises(ValueError, match="project_rows: p is on meta"):
        lk.project_rows(x, p.to("meta"))


def test_unavailable_backend_raises():
    with pytest.raises(RuntimeError, match="project_rows: backend 'cublas' is not available here"):
        lk.project_rows(*case(2, 3, 8, 4), backend="cublas")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prepared_for_many_batches(dtype):
    x, p = torch.randn(2, 3, 5, 40, dtype=dtype), torch.randn(7, 40, dtype=dtype)
    project = op.row_projector(x[0], p)
    assert project is not None
    for batch in x:
        torch.testing.assert_close(project(batch), lk.project_rows(batch, p), rtol=0, atol=0)
    with pytest.raises(ValueError, match="with one d"):
        op.row_projector(x[0], p[:, :3])


@pytest.mark.parametrize("p_dtype", [torch.float32, torch.bfloat16], ids=["p-fp32", "p-bf16"])
@pytest.mark.parametrize(
    ("n", "t", "d", "k"),
    [(3, 37, 40, 64), (3, 7, 40, 5), (2, 70, 33, 9), (1, 5, 40, 64), (2, 200, 64, 300), (2, 40, 20000, 24)],
)
def test_prepared_to_round(n, t, d, k, p_dtype):
    """Tiles that are whole or not, few columns, more columns than rows, several runs; numbers bf16 has no room for."""
    x, p = torch.randn(n, t, d), torch.randn(k, d).to(p_dtype)
    x[0, 0, 0], x[0, 1, 1], x[0, 2] = float("nan"), float("inf"), 3e38
    project = op.row_projector(x, p, torch.bfloat16)
    got, expected = project(x), lk.project_rows(x, p).to(torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
