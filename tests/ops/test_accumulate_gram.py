import pytest
import torch
from ops.views import VIEWS, far_apart
from tolerance import assert_as_good_as_naive

import logra_kernels as lk
from logra_kernels.ops.accumulate_gram import op, reference

SHAPES = [(1, 16), (37, 24), (150, 131), (301, 20), (9, 1), (3, 70)]  # N d


def case(n, d, dtype=torch.float32, device="cpu"):
    """Rows, and the sum of earlier ones (symmetric to the last bit)."""
    g, earlier = torch.randn(n, d, device=device).to(dtype), torch.randn(d, d, device=device)
    return g, (earlier + earlier.T).to(torch.float64 if dtype == torch.float64 else torch.float32)


def check(target, g, out):
    exact, naive, got = out.double(), out.clone(), out.clone()
    reference.accumulate_gram(g.double(), exact)
    naive += (g.T @ g).to(out.dtype)
    assert lk.accumulate_gram(g, got, backend=target.backend) is None
    assert_as_good_as_naive(got, exact, naive)
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_matches_fp64(target, dtype, shape):
    check(target, *case(*shape, dtype, target.device))


def test_stays_symmetric_to_the_last_bit(kernel, dtype):
    got = check(kernel, *case(150, 131, dtype, kernel.device))
    assert torch.equal(got, got.T)


def test_adds_to_an_asymmetric_sum(target):
    g, _ = case(20, 40, device=target.device)
    check(target, g, torch.randn(40, 40, device=target.device))


@pytest.mark.parametrize("view", VIEWS)
def test_strides(target, dtype, view):
    g, out = case(29, 37, dtype, target.device)
    check(target, VIEWS[view](g), out)


def test_unaligned_sum(target):
    g, out = case(29, 37, device=target.device)
    exact = out.double() + g.double().T @ g.double()
    unaligned = VIEWS["unaligned"](out)
    lk.accumulate_gram(g, unaligned, backend=target.backend)
    torch.testing.assert_close(unaligned, exact.float(), rtol=1e-5, atol=1e-4)


def test_expanded(target):
    g, out = case(1, 37, device=target.device)
    check(target, g.expand(20, 37), out)


def test_far_apart_rows(target):
    g, out = case(2100, 16, device=target.device)
    check(target, far_apart(g), out)


def test_empty(target):
    g, out = case(0, 16, device=target.device)
    before = out.clone()
    lk.accumulate_gram(g, out, backend=target.backend)
    assert torch.equal(out, before)
    lk.accumulate_gram(g[:, :0], out[:0, :0].contiguous(), backend=target.backend)


def test_nan_row_is_seen(target):
    g, out = case(20, 16, device=target.device)
    g[7, 3] = float("nan")
    lk.accumulate_gram(g, out, backend=target.backend)
    bad = out.isnan()
    assert bad[3].all()
    assert bad[:, 3].all()
    assert bad.sum() == 31


def test_same_bits_for_any_thread_count(dtype, threads):
    g, out = case(211, 96, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(out.clone())
        lk.accumulate_gram(g, results[-1], backend="cpp")
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_same_bits_again(target, dtype):
    g, out = case(65, 70, dtype, target.device)
    first, second = out.clone(), out.clone()
    for sum_ in (first, second):
        lk.accumulate_gram(g, sum_, backend=target.backend)
    assert torch.equal(first, second)


def test_does_not_depend_on_the_batch(target):
    g, whole = case(60, 40, device=target.device)
    parts = whole.clone()
    lk.accumulate_gram(g, whole, backend=target.backend)
    for start in range(0, 60, 20):
        lk.accumulate_gram(g[start : start + 20], parts, backend=target.backend)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_registration(device, dtype):
    torch.library.opcheck(op._op, (*case(7, 20, dtype, device), "auto"))


def test_compiles_without_a_graph_break(device):
    compiled = torch.compile(lk.accumulate_gram, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 17):
        g, got = case(n, 12, device=device)
        want = got.clone()
        compiled(g, got)
        lk.accumulate_gram(g, want)
        torch.testing.assert_close(got, want)


def test_bad_input_raises():
    g, out = case(5, 8)
    with pytest.raises(ValueError, match=r"accumulate_gram: g \(5, 8\) .* out \(7, 8\)"):
        lk.accumulate_gram(g, out[1:])
    with pytest.raises(ValueError, match=r"accumulate_gram: g \(1, 5, 8\)"):
        lk.accumulate_gram(g[None], out)
    with pytest.raises(ValueError, match=r"accumulate_gram: out is torch.float32; it must be torch.float64"):
        lk.accumulate_gram(g.double(), out)
    with pytest.raises(ValueError, match="accumulate_gram: out must be contiguous"):
        lk.accumulate_gram(g, torch.zeros(8, 16)[:, ::2])
    with pytest.raises(ValueError, match=r"accumulate_gram: g is torch.complex64"):
        lk.accumulate_gram(g.to(torch.complex64), out)
    with pytest.raises(ValueError, match="accumulate_gram: out is on meta"):
        lk.accumulate_gram(g, out.to("meta"))


def test_unavailable_backend_raises():
    with pytest.raises(RuntimeError, match="accumulate_gram: backend 'cublas' is not available here"):
        lk.accumulate_gram(*case(5, 8), backend="cublas")
