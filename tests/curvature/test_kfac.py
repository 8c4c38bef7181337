"""KFAC and EKFAC of a session against the dense formulas from autograd, with and without projection."""

import pytest
import torch
from torch import nn

import logra_kernels as lk
from logra_kernels.errors import LograError

N, T = 20, 4
IDS = [f"row{i}" for i in range(N)]


def make_case():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = (torch.randn(N, T, d, generator=generator) for d in (5, 3))
    return model, x, y


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y, reduction="sum")


def sides(model, x, y):
    """[(inputs [N*T, d_in], output gradients [N*T, d_out]) of both layers] in fp64."""
    double = nn.Sequential(*[type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in model])
    double.load_state_dict(model.state_dict())
    double.double()
    h = double[0](x.double()).requires_grad_()
    hidden = torch.tanh(h)
    out = double[2](hidden)
    loss = nn.functional.mse_loss(out, y.double(), reduction="sum")
    dh, dout = torch.autograd.grad(loss, [h, out])
    return [(x.double().flatten(0, 1), dh.flatten(0, 1)), (hidden.detach().flatten(0, 1), dout.flatten(0, 1))]


def dense_scores(model, x, y, rows, queries, kind, damping, factors):
    """sum over layers of q^T (H + lambda I)^-1 g with H written out, [Q, N]."""
    total, at = 0, 0
    for (a, b), (p_in, p_out) in zip(sides(model, x, y), factors, strict=True):
        a, b = a if p_in is None else a @ p_in.double().T, b if p_out is None else b @ p_out.double().T
        positions = len(a)
        s_in, u_in = torch.linalg.eigh(a.T @ a / positions)
        s_out, u_out = torch.linalg.eigh(b.T @ b / positions)
        d = len(s_in) * len(s_out)
        g, q = rows[:, at : at + d].double(), queries[:, at : at + d].double()
        basis = torch.kron(u_out, u_in)
        values = torch.kron(s_out, s_in) * positions / N if kind == "kfac" else (g @ basis).square().mean(0)
        lam = 0.1 * values.mean() if damping is None else damping
        h = basis @ (values + lam).diag() @ basis.T
        total = total + q @ torch.linalg.solve(h, g.T)
        at += d
    return total


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("projection", [lk.Projection(kind="identity"), lk.Projection(rank=3)], ids=["whole", "rank 3"])
@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_scores_equal_the_dense_formula(tmp_path, kind, damping, projection, order):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model, projection=projection, curvature=kind) as run:

        def observe():
            for part in (slice(0, 8), slice(8, N)):
                with run.observe():
                    loss_of(model, x[part], y[part]).backward()

        if order == "before":
            observe()
        with run.log(IDS):
            loss_of(model, x, y).backward()
        if order == "after":
            run.commit()
            observe()
        with run.query(["q0", "q1"]) as query:
            loss_of(model, x[:2] + 1, y[:2]).backward()
        got = run.scores(query, damping=damping).double()
        rows, factors = run.store.read(0, N), list(run.taps.factors.values())
        exact = dense_scores(model, x, y, rows, query.rows, kind, damping, factors)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    with lk.Run(tmp_path / "s", model, curvature=kind) as again:
        torch.testing.assert_close(again.scores(query, damping=damping).double(), got, rtol=1e-6, atol=1e-6)


def test_positions_of_weight_zero_do_not_count(tmp_path):
    model, x, y = make_case()
    mask = torch.ones(N, T)
    mask[:, 3:] = 0
    with lk.capture(model) as taps:
        with taps.covariances() as masked:
            taps.reset(weights=mask)
            loss_of(model, torch.where(mask[..., None] == 0, 7.0, x), y).backward()
        taps.reset()
        with taps.covariances() as cut:
            loss_of(model, x[:, :3], y[:, :3]).backward()
    for name, sums in cut.layers.items():
        assert masked.layers[name].positions == sums.positions == 3 * N
        torch.testing.assert_close(masked.layers[name].a, sums.a)
        torch.testing.assert_close(masked.layers[name].b, sums.b)


def test_new_observations_replace_what_was_computed(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model, curvature="ekfac") as run:
        with run.log(IDS):
            loss_of(model, x, y).backward()
        run.commit()
        with run.observe():
            loss_of(model, x, y).backward()
        with run.query(["q"]) as query:
            loss_of(model, x[:1], y[:1]).backward()
        first = run.scores(query)
        with run.observe():
            loss_of(model, 3 * x.flip(2), y).backward()
        assert not torch.allclose(run.scores(query), first)


def test_without_observations_it_says_how_to_get_them(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model, curvature="kfac") as run:
        with run.log(IDS):
            loss_of(model, x, y).backward()
        with run.query(["q"]) as query:
            loss_of(model, x[:1], y[:1]).backward()
        with pytest.raises(LograError, match="has no covariances.*with run.observe"):
            run.scores(query)
        with pytest.raises(LograError, match="2 of 2 layers received no gradient"), run.observe():
            pass
