import pytest
import torch
from ops.views import VIEWS

import logra_kernels as lk
from logra_kernels.ops._factored import dense_dim, parts
from logra_kernels.ops.factor_rows import op

LAYERS = [(20, 33), (7, 3), (1, 5)]
EXCESS = 1e-3  # of a layer's error over the least possible one, relative
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float64: 1e-14}  # of a layer's norm


def random_rows(n, layers, dtype=torch.float32, device="cpu"):
    return torch.randn(n, dense_dim(layers)).to(device, dtype)


def decaying_rows(n, k_out, k_in, power):
    """Singular values 1, 2^-power, 3^-power, ... between random directions."""
    k = min(k_out, k_in)
    left = torch.linalg.qr(torch.randn(n, k_out, k, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, k_in, k, dtype=torch.float64)).Q
    return (left * torch.arange(1, k + 1) ** -float(power) @ right.mT).flatten(1)


def check(rows, layers, rank, backend):
    """Each layer's error is the least one, that of the truncated SVD in fp64; both factors are equally long."""
    factors = lk.factor_rows(rows, layers, rank, backend=backend)
    assert not factors.isnan().any()
    rebuilt, exact = lk.rebuild_rows(factors.double(), layers, rank), rows.double()
    for (k_out, k_in), (dense, left, right) in zip(layers, parts(layers, rank), strict=True):
        g = exact[:, dense].reshape(-1, k_out, k_in)
        least = torch.linalg.svdvals(g)[:, rank:].norm(dim=1)
        error = (rebuilt[:, dense] - exact[:, dense]).norm(dim=1)
        rounding = ROUNDING[rows.dtype] * g.flatten(1).norm(dim=1)
        assert bool((error <= (1 + EXCESS) * least + rounding).all()), ((error - least) / least).max()
        u, v = (factors[:, part].double().reshape(rows.shape[0], rank, -1).norm(dim=2) for part in (left, right))
        torch.testing.assert_close(u, v, rtol=1e-4, atol=1e-6 * u.max().item())
        assert bool((u[:, :-1] >= u[:, 1:] * (1 - 1e-4)).all())
    return factors


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_error_is_the_least(dtype, rank):
    for backend in ("cpp", "reference"):
        check(random_rows(19, LAYERS, dtype), LAYERS, rank, backend)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (40, 130)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_error_is_the_least_at_the_sizes_of_use(size, rank):
    """Matrices of independent numbers have the slowest spectrum; gradients fall faster."""
    check(random_rows(20, [size]), [size], rank, "cpp")
    check(decaying_rows(8, *size, 1).float(), [size], rank, "cpp")
    check(decaying_rows(8, *size, 4).float(), [size], rank, "cpp")


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 1), (torch.float64, 3)])
def test_triton(kernel, dtype, rank):
    if kernel.backend == "triton":
        check(random_rows(1, [(20, 33)], dtype, kernel.device), [(20, 33)], rank, kernel.backend)


def test_gradients_of_a_layer():
    """Sums of a few outer products with a common direction, as the gradients of a sequence are."""
    dy, x = torch.randn(12, 9, 48), torch.randn(12, 9, 64) + 2 * torch.randn(64)
    rows = torch.einsum("nto,nti->noi", dy, x).flatten(1)
    for rank in (1, 4):
        check(rows, [(48, 64)], rank, "cpp")


def test_rank_deficient_and_zero_rows(kernel):
    """Factors beyond the rank are 0 up to rounding, also where every vector of the start is in the null space."""
    g = torch.randn(4, 20, 1) @ torch.randn(4, 1, 33)
    g[1] = 0
    g[2, 1:] = 0
    rows = g.flatten(1).to(kernel.device)[: 2 if kernel.backend == "triton" else 4]
    factors = check(rows, [(20, 33)], 2, kernel.backend)
    assert not factors[1].any()
    assert bool((factors[:, 20:40].norm(dim=1) <= 1e-2 * factors[:, :20].norm(dim=1)).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_scales(scale):
    rows = random_rows(5, [(20, 33)])
    ones, scaled = (lk.factor_rows(rows * s, [(20, 33)], 2, backend="cpp") for s in (1.0, scale))
    torch.testing.assert_close(
        lk.rebuild_rows(scaled, [(20, 33)], 2) / scale, lk.rebuild_rows(ones, [(20, 33)], 2), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_layer(target, bad):
    layers = LAYERS[1:] if target.backend == "triton" else LAYERS
    rows = random_rows(1 if target.backend == "triton" else 2, layers, device=target.device)
    clean = lk.factor_rows(rows[:, :-5], layers[:-1], 1, backend=target.backend)
    rows[-1, -1] = bad
    got = lk.factor_rows(rows, layers, 1, backend=target.backend)
    assert got[-1, -6:].isnan().all()
    assert torch.equal(got[:, :-6], clean)
    assert got[:-1].isfinite().all()


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    rows = random_rows(9, LAYERS)
    got = lk.factor_rows(VIEWS[view](rows), LAYERS, 2, backend="cpp")
    assert torch.equal(got, lk.factor_rows(rows, LAYERS, 2, backend="cpp"))


def test_same_bits_for_any_thread_count_and_batch(dtype, threads):
    rows = random_rows(53, LAYERS, dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(lk.factor_rows(rows, LAYERS, 3, backend="cpp"))
    results.append(torch.cat([lk.factor_rows(rows[i : i + 7], LAYERS, 3, backend="cpp") for i in range(0, 53, 7)]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty(target):
    got = lk.factor_rows(torch.zeros(0, 10, device=target.device), [(2, 5)], 2, backend=target.backend)
    assert got.shape == (0, 14)


def test_registration(device, dtype):
    torch.library.opcheck(op._op, (random_rows(3, LAYERS[1:], dtype, device), [7, 3, 1, 5], 2, "auto"))


def test_compiles_without_a_graph_break(device):
    compiled = torch.compile(lk.factor_rows, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 9):
        rows = random_rows(n, LAYERS, device=device)
        assert torch.equal(compiled(rows, LAYERS, 2), lk.factor_rows(rows, LAYERS, 2))


def test_bad_input_raises():
    rows = random_rows(3, LAYERS)
    with pytest.raises(ValueError, match=r"factor_rows: rows \(3, 685\) must be \[N, 686\], as 3 layers"):
        lk.factor_rows(rows[:, 1:], LAYERS, 1)
    with pytest.raises(ValueError, match="factor_rows: rank is 0; it must be 1 to 8"):
        lk.factor_rows(rows, LAYERS, 0)
    with pytest.raises(ValueError, match="factor_rows: rows is torch.int32"):
        lk.factor_rows(rows.int(), LAYERS, 1)
    with pytest.raises(ValueError, match=r"rebuild_rows: factors \(3, 686\) must be \[N, 69\]"):
        lk.rebuild_rows(rows, LAYERS, 1)
