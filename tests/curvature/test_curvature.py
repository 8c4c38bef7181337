"""Every curvature and its factorised solve against the dense textbook formulas in fp64."""

import pytest
import torch
from curvature.dense import block, damped

from logra_kernels.curvature import CURVATURES, Damping, RawFisher
from logra_kernels.curvature.solver import CholeskySolver, KroneckerSolver, SpectralSolver
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore

LAYERS = {"a": (3, 4), "b": (2, 5)}
WIDTHS = [12, 10]
FROM_ROWS = [kind for kind in CURVATURES if kind not in ("kfac", "ekfac", "fisher", "fisher-fp64")]
DAMPINGS = [None, 1e-3, 10.0, Damping(relative=0.7)]


def make_store(path, count: int = 37, rows: torch.Tensor | None = None) -> tuple[GradientStore, torch.Tensor]:
    rows = torch.randn(count, 22) * torch.linspace(0.1, 3, 22) if rows is None else rows
    with GradientStore.create(path, LAYERS, rows_per_shard=8) as writer:
        writer.append(rows, [f"r{i}" for i in range(len(rows))])
    return GradientStore.open(path), rows.double()


def dense(kind: str, rows: torch.Tensor, damping) -> torch.Tensor:
    if kind == "identity":
        return torch.eye(22, dtype=torch.float64)
    parts = zip(rows.split(WIDTHS, dim=1), LAYERS.values(), strict=True)
    return torch.block_diag(*[damped(block(kind, part, shape), damping) for part, shape in parts])


@pytest.mark.parametrize("count", [37, 7], ids=["more rows than dims", "fewer"])
@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
@pytest.mark.parametrize("kind", FROM_ROWS)
def test_solve_whiten_and_quadratic(tmp_path, kind, damping, count):
    store, rows = make_store(tmp_path / "s", count)
    factor = CURVATURES[kind].of(store).factorize(damping)
    inverse = torch.linalg.inv(dense(kind, rows, damping))
    queries = torch.randn(4, 22)
    exact = queries.double() @ inverse
    torch.testing.assert_close(factor.solve(queries).double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    products = exact @ queries.double().T
    white = factor.whiten(queries).double()
    torch.testing.assert_close(white @ white.T, products, rtol=1e-5, atol=1e-5 * products.abs().max().item())
    torch.testing.assert_close(factor.quadratic(queries), products.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", FROM_ROWS)
@pytest.mark.parametrize("count", [37, 7])
def test_kept_beside_the_store_and_following_the_rows(tmp_path, kind, count):
    store, _ = make_store(tmp_path / "s", count)
    queries = torch.randn(4, 22)
    first = CURVATURES[kind].of(store).factorize().solve(queries)
    seen: list[int] = []
    again = CURVATURES[kind].of(GradientStore.open(store.path), progress=seen.append)
    few = kind in ("raw", "raw-fp64", "shrunk") and count == 7  # the rows themselves are what would be kept
    assert seen == ([7] if few else []), "the kept one was measured again"
    assert torch.equal(again.factorize().solve(queries), first)
    with GradientStore.open(store.path, mode="append") as writer:
        writer.append(torch.randn(5, 22), [f"more{i}" for i in range(5)])
    grown = CURVATURES[kind].of(GradientStore.open(store.path))
    assert grown.rows == count + 5
    assert kind == "identity" or not torch.equal(grown.factorize().solve(queries), first)


def test_raw_fisher_is_symmetric_to_the_bit_and_counts_its_rows(tmp_path):
    store, rows = make_store(tmp_path / "s")
    seen: list[int] = []
    fisher = RawFisher.of(store, progress=seen.append)
    for (name, h), part in zip(fisher.blocks.items(), rows.split(WIDTHS, dim=1), strict=True):
        torch.testing.assert_close(h.double(), part.T @ part / 37, rtol=1e-5, atol=1e-6)
        assert torch.equal(h, h.T), name
    assert sum(seen) == fisher.rows == 37


def test_few_rows_take_the_dual_form(tmp_path):
    store, _ = make_store(tmp_path / "s", 11)
    fisher = RawFisher.of(store)
    assert (list(fisher.blocks), list(fisher.thin)) == (["b"], ["a"])
    assert isinstance(fisher.solver("a", Damping()), SpectralSolver)
    assert isinstance(fisher.solver("b", Damping()), CholeskySolver)


def test_repeated_rows_do_not_upset_the_dual_form(tmp_path):
    row = torch.randn(1, 22)
    store, rows = make_store(tmp_path / "s", rows=torch.cat([row, row, 2 * row, torch.randn(2, 22)]))
    exact = torch.linalg.inv(dense("raw", rows, None))
    queries = torch.randn(3, 22).double()
    got = RawFisher.of(store).factorize().solve(queries).double()
    torch.testing.assert_close(got, queries @ exact, rtol=1e-5, atol=1e-5)


def test_a_kronecker_product_is_found_exactly(tmp_path):
    left, right = torch.randn(3, 3).double(), torch.randn(4, 4).double()
    g = torch.stack([left[:, [o]] @ right[:, [i]].T for o in range(3) for i in range(4)]) * 12**0.5
    rows = torch.cat([g.flatten(1), torch.randn(12, 10).double()], dim=1).float()
    store, rows64 = make_store(tmp_path / "s", rows=rows)
    fisher = rows64[:, :12].T @ rows64[:, :12] / 12
    torch.testing.assert_close(fisher, torch.kron(left @ left.T, right @ right.T), rtol=1e-5, atol=1e-5)
    queries = torch.randn(2, 22)
    exact = queries[:, :12].double() @ torch.linalg.inv(damped(fisher, 0.1))
    for kind in ("kronecker", "corrected-kronecker"):
        got = CURVATURES[kind].of(store).factorize(0.1).solve(queries)[:, :12].double()
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["raw", "diagonal", "kronecker", "corrected-kronecker", "shrunk"])
def test_singular_without_damping_is_an_error(tmp_path, kind):
    rows = torch.randn(37, 22)
    rows[:, :4] = 0
    store, _ = make_store(tmp_path / "s", rows=rows)
    with pytest.raises(LograError, match="layer 'a' is (singular|not positive definite); use a larger damping"):
        CURVATURES[kind].of(store).factorize(0.0)
    with pytest.raises(LograError, match="must not be negative"):
        CURVATURES[kind].of(store).factorize(-1.0)


def test_too_few_rows_without_damping_is_an_error(tmp_path):
    store, _ = make_store(tmp_path / "s", 5)
    with pytest.raises(LograError, match="singular; use a larger damping, or log more rows"):
        RawFisher.of(store).factorize(0.0)


def test_solvers_agree_on_one_matrix():
    u_out, u_in = (torch.linalg.qr(torch.randn(k, k).double())[0] for k in (3, 4))
    values = torch.rand(3, 4).double()
    basis = torch.kron(u_out, u_in)
    h = basis @ values.flatten().diag() @ basis.T
    rows = torch.randn(5, 12).double()
    solvers = [
        CholeskySolver("a", h, 0.1),
        SpectralSolver("a", basis, values.flatten(), 0.1),
        KroneckerSolver("a", u_out, u_in, values, 0.1),
    ]
    for solver in solvers[1:]:
        torch.testing.assert_close(solver.power(rows, -1), solvers[0].power(rows, -1))
        torch.testing.assert_close(solver.quadratic(rows), solvers[0].quadratic(rows))


def test_wrong_width_and_empty_store(tmp_path):
    store, _ = make_store(tmp_path / "s")
    with pytest.raises(ValueError, match=r"rows \(2, 5\) must be \[N, 22\]"):
        RawFisher.of(store).factorize().solve(torch.randn(2, 5))
    GradientStore.create(tmp_path / "e", LAYERS).close()
    with pytest.raises(LograError, match="has no rows"):
        RawFisher.of(GradientStore.open(tmp_path / "e"))
