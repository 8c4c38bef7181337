"""Influence against the truth: leave-one-out retraining of a convex model to its exact optimum.

L2-regularised softmax regression, mean cross-entropy + (l2 / 2) |W|^2, on scikit-learn's breast cancer data: Newton's
method in fp64 finds the optimum without each row. To first order removing row z changes a query's loss by
g_q^T H^-1 g_z / N, H the Hessian of the whole objective: the Fisher of the model's own predictions plus l2 I. The raw
Fisher, of the true labels, is not that Hessian: it weighs a row by how wrong the model is on it.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import logra_kernels as lk

N, Q, L2, CLASSES = 400, 40, 0.03, 2
OUT = slice(0, N, 5)  # the rows that are left out in turn; their order is random


def data() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_breast_cancer()
    x, y = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: N + Q]
    x = x[order]
    return (x - x.mean(0)) / x.std(0), y[order]


def fit(x: Tensor, y: Tensor, w: Tensor, count: int) -> Tensor:
    """The optimum of sum cross-entropy / count + (l2 / 2) |W|^2, by Newton's method from w."""
    identity = torch.eye(w.numel(), dtype=w.dtype)
    for _ in range(50):
        p = torch.softmax(x @ w.T, 1)
        gradient = (p - F.one_hot(y, CLASSES)).T @ x / count + L2 * w
        of_logits = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        blocks = [[x.T @ (x * of_logits[:, c, k, None]) for k in range(CLASSES)] for c in range(CLASSES)]
        hessian = torch.cat([torch.cat(line, dim=1) for line in blocks]) / count + L2 * identity
        step = torch.linalg.solve(hessian, gradient.flatten()).view_as(w)
        w = w - step
        if step.abs().max() < 1e-10:  # and the next one would be its square
            return w
    raise AssertionError("Newton's method did not converge")


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.fixture(scope="module")
def truth():
    """(model at the optimum, x, y, change of every query's loss when a row of OUT is left out [Q, N / 5])."""
    x, y = data()
    rows, labels = x[:N], y[:N]
    w = fit(rows, labels, torch.zeros(CLASSES, x.shape[1], dtype=torch.float64), N)
    keep = ~torch.eye(N, dtype=torch.bool)
    changes = []
    for mask in keep[OUT]:
        moved = fit(rows[mask], labels[mask], w, N)
        losses = [F.cross_entropy(x[N:] @ v.T, y[N:], reduction="none") for v in (moved, w)]
        changes.append(losses[0] - losses[1])
    model = nn.Sequential(nn.Linear(x.shape[1], CLASSES, bias=False)).double()
    model[0].weight.data = w
    return model, x, y, torch.stack(changes, dim=1)


def scores(path, truth, curvature: str, draws: int = 0) -> Tensor:
    model, x, y, _ = truth
    projection = lk.Projection(kind="identity")
    with lk.Run(path, model, projection=projection, curvature=curvature, damping=L2) as run:
        with run.log([str(i) for i in range(N)]):
            F.cross_entropy(model(x[:N]), y[:N], reduction="sum").backward()
        probability = torch.softmax(model(x[:N]).detach(), 1)
        for label in range(CLASSES if not draws else 0):
            with run.observe_fisher():
                losses = F.cross_entropy(model(x[:N]), torch.full((N,), label), reduction="none")
                (losses * (CLASSES * probability[:, label]).sqrt()).sum().backward()
        for _ in range(draws):
            with run.observe_fisher():
                F.cross_entropy(model(x[:N]), probability.multinomial(1)[:, 0], reduction="sum").backward()
        with run.query([f"q{i}" for i in range(Q)]) as query:
            F.cross_entropy(model(x[N:]), y[N:], reduction="sum").backward()
        return run.scores(query)[:, OUT].double() / N


def test_the_fisher_of_the_models_predictions_predicts_retraining(tmp_path, truth):
    got, exact = scores(tmp_path / "s", truth, "fisher"), truth[3]
    assert correlation(got, exact) >= 0.99
    assert 0.95 <= float((exact / got).median()) <= 1.05, "influence is not of retraining's size"


def test_labels_drawn_from_the_model_come_close_and_true_labels_do_not(tmp_path, truth):
    drawn = correlation(scores(tmp_path / "drawn", truth, "fisher", draws=30), truth[3])
    raw = correlation(scores(tmp_path / "raw", truth, "raw"), truth[3])
    assert drawn >= 0.98
    assert raw < 0.9, "true labels would do: say so where the curvatures are explained"
