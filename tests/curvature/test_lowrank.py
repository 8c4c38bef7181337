"""The randomised streaming SVD against the dense eigendecomposition."""

import pytest
import torch
from session.models import make_run

import logra_kernels as lk
from logra_kernels.curvature import LowRank
from logra_kernels.store import GradientStore

LAYERS = {"a": (10, 12), "b": (6, 8)}
N, D = 300, 168


def make_store(path):
    spectrum = torch.cat([0.8 ** torch.arange(d, dtype=torch.float32) for d in (120, 48)])
    mixed = torch.block_diag(*[torch.linalg.qr(torch.randn(d, d))[0] for d in (120, 48)])
    rows = (torch.randn(N, D) * spectrum) @ mixed
    with GradientStore.create(path, LAYERS, rows_per_shard=64) as writer:
        writer.append(rows, [str(i) for i in range(N)])
    return GradientStore.open(path), rows.double()


def truncated(part, rank, damping):
    values, vectors = torch.linalg.eigh(part.T @ part / N)
    added = 0.1 * values.mean() if damping is None else damping
    values[:-rank] = 0
    return vectors @ (values + added).diag() @ vectors.T


@pytest.mark.parametrize("damping", [None, 1e-3])
def test_the_largest_eigenvalues_and_the_woodbury_solve(tmp_path, damping):
    store, rows = make_store(tmp_path / "s")
    curvature = LowRank.of_rank(8, passes=5).of(store)
    factor = curvature.factorize(damping)
    queries = torch.randn(5, D)
    for part, solved, asked in zip(
        rows.split([120, 48], 1),
        factor.solve(queries).split([120, 48], 1),
        queries.double().split([120, 48], 1),
        strict=True,
    ):
        exact = torch.linalg.solve(truncated(part, 8, damping), asked.T).T
        torch.testing.assert_close(solved.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
    white = factor.whiten(queries).double()
    torch.testing.assert_close((white @ white.T).diagonal(), factor.quadratic(queries), rtol=1e-5, atol=0)
    again = LowRank.of_rank(8, passes=5).of(GradientStore.open(store.path))
    assert torch.equal(again.factorize(damping).solve(queries), factor.solve(queries))


def test_the_ones_found_in_two_passes_are_close_and_more_passes_closer(tmp_path):
    store, rows = make_store(tmp_path / "s")
    top = torch.linalg.eigvalsh(rows[:, :120].T @ rows[:, :120] / N)[-20:]
    errors = [
        float((LowRank.of_rank(20, passes).of(store).values["a"] - top).abs().max() / top.max()) for passes in (2, 4)
    ]
    assert errors[0] < 1e-3
    assert errors[1] < errors[0]


def test_in_a_session_and_misuse(tmp_path):
    options = {"projection": lk.Projection(kind="identity"), "curvature": LowRank.of_rank(60)}
    run, query = make_run(tmp_path / "s", **options)
    with run, lk.Run(run.path, run.model, curvature="raw") as raw:
        torch.testing.assert_close(run.scores(query), raw.scores(query), rtol=1e-5, atol=1e-6)
    for bad in ({"rank": 0}, {"rank": 3, "passes": 1}):
        with pytest.raises(ValueError, match="must be at least 1 and 2"):
            LowRank.of_rank(**bad)
