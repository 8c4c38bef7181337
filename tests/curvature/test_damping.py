"""lambda of every layer, against the dense covariances of what was observed."""

import pytest
import torch
from torch import nn

import logra_kernels as lk
from logra_kernels.curvature import CURVATURES
from logra_kernels.errors import LograError

N, K = 40, 3
KINDS = ["raw", "shrunk", "kronecker", "corrected-kronecker", "diagonal", "kfac", "ekfac"]


def log(path, projection):
    """A store of N rows, and its layers' inputs and output gradients in fp64."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x = torch.randn(N, 7, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.1, 7)
    y = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    with lk.Run(path, model, projection=projection) as run:
        with run.observe():
            (model(x) - y).square().sum().backward()
        with run.log([str(i) for i in range(N)]):
            (model(x) - y).square().sum().backward()
    first = model[0](x).detach().requires_grad_()
    hidden = torch.tanh(first)
    out = model[2](hidden)
    d_first, d_out = torch.autograd.grad((out - y).square().sum(), [first, out])
    return lk.GradientStore.open(path), {"0": (x, d_first), "2": (hidden.detach(), d_out)}


def whole_over_kept(sides):
    """(trace(C) / d) / (sum of the K largest eigenvalues / K), multiplied over both sides."""
    ratio = 1.0
    for rows in sides:
        values = torch.linalg.eigvalsh(rows.T @ rows).flip(0)
        ratio *= float(values.mean() / values[:K].mean())
    return ratio


@pytest.mark.parametrize("kind", KINDS)
def test_after_pca_the_whole_layers_mean_eigenvalue_is_the_blocks_scaled_by_the_spread(tmp_path, kind):
    store, sides = log(tmp_path / "s", lk.Projection(rank=K, kind="pca"))
    curvature = CURVATURES[kind].of(store)
    own = curvature.factorize(lk.Damping(relative=1.0)).damping
    whole = curvature.factorize(lk.Damping(whole=2.0)).damping
    for name, pair in sides.items():
        assert whole[name] == pytest.approx(2 * own[name] * whole_over_kept(pair), rel=1e-5)
        assert whole_over_kept(pair) < 1
    assert curvature.factorize(None).damping == curvature.factorize(lk.Damping(whole=1.0)).damping
    again = CURVATURES[kind].of(lk.GradientStore.open(store.path))  # from its sidecar
    assert again.factorize(lk.Damping(whole=2.0)).damping == pytest.approx(whole)


def test_with_one_position_and_independent_sides_it_is_the_mean_over_all_directions(tmp_path):
    store, sides = log(tmp_path / "s", lk.Projection(rank=K, kind="pca"))
    got = CURVATURES["raw"].of(store).factorize(lk.Damping(whole=1.0)).damping
    for name, (x, dy) in sides.items():
        true = float((x.square().sum(1) * dy.square().sum(1)).mean()) / (x.shape[1] * dy.shape[1])
        assert got[name] == pytest.approx(true, rel=0.2)  # the two sides are not quite independent


def test_random_factors_keep_the_mean_eigenvalue(tmp_path):
    store, sides = log(tmp_path / "s", lk.Projection(rank=K))
    raw = CURVATURES["raw"].of(store)
    assert raw.factorize(lk.Damping(whole=1.0)).damping == raw.factorize(lk.Damping(relative=1.0)).damping
    assert raw.factorize(None).damping == raw.factorize(lk.Damping(relative=0.1)).damping
    x, dy = sides["0"]
    means = []
    for seed in range(300):
        p_in, p_out = (
            lk.Projection(rank=K, seed=seed).factor("0", side, d).double() for side, d in (("in", 7), ("out", 6))
        )
        means.append(float(((x @ p_in.T).square().sum(1) * (dy @ p_out.T).square().sum(1)).mean()) / K**2)
    true = float((x.square().sum(1) * dy.square().sum(1)).mean()) / (x.shape[1] * dy.shape[1])
    assert sum(means) / len(means) == pytest.approx(true, rel=0.1)


def test_bad_dampings():
    with pytest.raises(LograError, match="must not be negative"):
        lk.Damping(whole=-1.0)
    with pytest.raises(LograError, match="give one of them"):
        lk.Damping(absolute=1.0, whole=1.0)


def test_a_runs_own_damping_is_what_none_means(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(N, 7)
    with lk.Run(tmp_path / "s", model, damping=lk.Damping(3.0)) as run:
        with run.log([str(i) for i in range(N)]):
            model(x).square().sum().backward()
        with run.query(["q"]) as query:
            model(x[:1] + 1).square().sum().backward()
        torch.testing.assert_close(run.scores(query), run.scores(query, damping=lk.Damping(3.0)), rtol=0, atol=0)
        torch.testing.assert_close(run.self_influence(), run.self_influence(damping=lk.Damping(3.0)), rtol=0, atol=0)
        assert not torch.allclose(run.scores(query), run.scores(query, damping=lk.Damping(0.1)))
