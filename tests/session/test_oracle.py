"""Nothing projected: every curvature, damping and mode of a session equals the textbook formula on fp64 gradients."""

from itertools import pairwise

import pytest
import torch
from curvature.dense import block, damped, positions_block
from torch import nn

import logra_kernels as lk
from logra_kernels.curvature import CURVATURES, Damping
from logra_kernels.influence import MODES

T, Q = 3, 4
SIZES = {  # name: (rows, widths)
    "90 rows, 72 parameters": (90, (6, 8, 3)),
    "40 rows, 1,600 parameters": (40, (20, 40, 20)),
    "30 rows, 5,000 parameters": (30, (40, 42, 40, 41)),
}
DAMPINGS = [None, 0.3, Damping(relative=1.5)]


def make_case(size: str):
    n, widths = SIZES[size]
    torch.manual_seed(5)
    layers = [part for d_in, d_out in pairwise(widths) for part in (nn.Linear(d_in, d_out), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double()
    x, y = (torch.randn(n + Q, T, d, dtype=torch.float64) for d in (widths[0], widths[-1]))
    return model, x, y


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y, reduction="sum")


def sides(model, x, y):
    """(x [n, T, d_in], dy [n, T, d_out]) of every layer, by autograd; a row is sum_t dy[t] (x) x[t]."""
    given, before = [], []
    for layer in model:
        if isinstance(layer, nn.Linear):
            given.append(x.detach())
            x = layer(x)
            before.append(x)
        else:
            x = layer(x)
    dy = torch.autograd.grad(nn.functional.mse_loss(x, y, reduction="sum"), before)
    return list(zip(given, dy, strict=True))


def scores_by_the_book(model, x, y, kind):
    """(damping, mode) -> [Q, N]; layers add up in every product and norm (Barshan et al. 2020)."""
    n = len(x) - Q
    blocks, rows = [], []
    for a, dy in sides(model, x, y):
        g = torch.einsum("nto,nti->noi", dy, a)
        rows.append(g.flatten(1))
        if kind in ("kfac", "ekfac"):
            blocks.append(positions_block(kind, rows[-1][:n], a[:n].flatten(0, 1), dy[:n].flatten(0, 1)))
        else:
            blocks.append(block(kind, rows[-1][:n], tuple(g.shape[1:])))
    found = {}
    for damping in DAMPINGS:
        dot, own, length = 0, 0, 0
        for h, g in zip(blocks, rows, strict=True):
            lower = torch.linalg.cholesky(h if kind == "identity" else damped(h, damping))
            solved = torch.cholesky_solve(g[:n].T, lower)
            dot = dot + g[n:] @ solved
            own = own + (g[:n] * solved.T).sum(1)
            length = length + solved.square().sum(0)
        found |= {(damping, "dot"): dot, (damping, "relatif"): dot / own.sqrt(), (damping, "l2"): dot - own / 2}
        found[damping, "theta-relatif"] = dot / length.sqrt()
    return found


def worst_conditions(model, x, y, kind):
    """Damping -> that of the layers' H + lambda I."""
    n, found = len(x) - Q, dict.fromkeys(DAMPINGS, 0.0)
    for a, dy in sides(model, x, y):
        g = torch.einsum("nto,nti->noi", dy, a)[:n]
        h = block(kind, g.flatten(1), tuple(g.shape[1:]))
        eigenvalues = torch.linalg.eigvalsh(h)
        for damping in DAMPINGS:
            shifted = eigenvalues + (damped(h, damping) - h)[0, 0]
            found[damping] = max(found[damping], float(shifted[-1] / shifted[0]))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", CURVATURES)
def test_every_damping_and_mode(tmp_path, kind, size):
    model, x, y = make_case(size)
    n = len(x) - Q
    exact = scores_by_the_book(model, x, y, kind)
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(kind="identity"), curvature=kind) as run:
        for part in (slice(0, n // 2), slice(n // 2, n)):
            if kind in ("kfac", "ekfac"):
                with run.observe():
                    loss_of(model, x[part], y[part]).backward()
            if kind.startswith("fisher"):
                with run.observe_fisher():
                    loss_of(model, x[part], y[part]).backward()
            with run.log([str(i) for i in range(part.start, part.stop)]):
                loss_of(model, x[part], y[part]).backward()
        with run.query([f"q{i}" for i in range(Q)]) as query:
            loss_of(model, x[n:], y[n:]).backward()
        few = n < max(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
        # sums of gradients that were only observed are solved with as they are, even if those are fewer than dims: in
        # fp32 their rounding, 2^-24, grows by the condition of H + lambda I
        conditions = worst_conditions(model, x, y, kind) if kind == "fisher" and few else None
        for damping in DAMPINGS:
            most = 1e-6 if conditions is None else 2**-22 * conditions[damping]
            for mode in MODES:
                wanted = exact[damping, mode]
                got = run.scores(query, mode, damping).double()
                error = float((got - wanted).abs().max() / wanted.abs().max())
                assert error <= most, f"{damping}, {mode}: {error:.1e} > {most:.1e}"
