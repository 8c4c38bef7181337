"""The raw Fisher and its factorised solve against the dense textbook formulas in fp64."""

import pytest
import torch

from logra_kernels.curvature import Factor, RawFisher
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore

LAYERS = {"a": (3, 4), "b": (2, 5)}
WIDTHS = [12, 10]


@pytest.fixture
def store(tmp_path):
    rows = torch.randn(37, 22) * torch.linspace(0.1, 3, 22)
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as writer:
        writer.append(rows, [f"r{i}" for i in range(37)])
    return GradientStore.open(tmp_path / "s"), rows.double()


def dense(rows, damping=None):
    """[D, D] block-diagonal H + lambda I."""
    blocks = []
    for part in rows.split(WIDTHS, dim=1):
        h = part.T @ part / len(part)
        lam = 0.1 * h.trace() / len(h) if damping is None else damping
        blocks.append(h + lam * torch.eye(len(h), dtype=h.dtype))
    return torch.block_diag(*blocks)


def test_fisher_is_the_mean_outer_product(store):
    store, rows = store
    fisher = RawFisher.of(store)
    for (name, block), part in zip(fisher.blocks.items(), rows.split(WIDTHS, dim=1), strict=True):
        torch.testing.assert_close(block.double(), part.T @ part / 37, rtol=1e-5, atol=1e-6)
        assert torch.equal(block, block.T), name
    assert fisher.rows == 37


@pytest.mark.parametrize("damping", [None, 1e-3, 10.0])
def test_solve_and_quadratic(store, damping):
    store, rows = store
    factor = RawFisher.of(store).factorize(damping)
    h = dense(rows, damping)
    queries = torch.randn(4, 22)
    exact = torch.linalg.solve(h, queries.double().T).T
    torch.testing.assert_close(factor.solve(queries).double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    own = (queries.double() @ torch.linalg.inv(h) * queries.double()).sum(1)
    torch.testing.assert_close(factor.quadratic(queries), own, rtol=1e-4, atol=0)


def test_fisher_is_kept_and_follows_the_rows(store, monkeypatch):
    store, _ = store
    first = RawFisher.of(store)
    seen = []
    kept = RawFisher.of(GradientStore.open(store.path), progress=seen.append)
    assert seen == [], "the kept one was computed again"
    assert all(torch.equal(kept.blocks[name], first.blocks[name]) for name in LAYERS)
    with GradientStore.open(store.path, mode="append") as writer:
        writer.append(torch.randn(5, 22), [f"more{i}" for i in range(5)])
    grown = RawFisher.of(GradientStore.open(store.path))
    assert grown.rows == 42
    assert not torch.equal(grown.blocks["a"], first.blocks["a"])


def test_fewer_rows_than_dims_are_damped():
    rows = torch.randn(3, 12).double()
    factor = Factor({"a": rows.T @ rows / 3})
    assert factor.quadratic(rows).isfinite().all()


def test_errors_say_what_to_do():
    with pytest.raises(LograError, match="gradients of layer 'a' are zero; exclude it"):
        Factor({"a": torch.zeros(4, 4)})
    with pytest.raises(LograError, match="must not be negative"):
        Factor({"a": torch.eye(4)}, damping=-1.0)
    g = torch.zeros(4, 4)
    g[0, 0] = 1.0
    with pytest.raises(LograError, match="layer 'a' is not positive definite; use a larger damping"):
        Factor({"a": g}, damping=0.0)
    with pytest.raises(ValueError, match=r"rows \(2, 5\) must be \[N, 4\]"):
        Factor({"a": torch.eye(4)}).solve(torch.randn(2, 5))


def test_empty_store(tmp_path):
    GradientStore.create(tmp_path / "s", LAYERS).close()
    with pytest.raises(LograError, match="has no rows"):
        RawFisher.of(GradientStore.open(tmp_path / "s"))
