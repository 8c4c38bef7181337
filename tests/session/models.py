"""Tiny models and runs that the session's tests share."""

import torch
from torch import nn

import logra_kernels as lk

N, T = 20, 5


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def make_data(n: int = N, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, T, 6, generator=generator), torch.randn(n, T, 3, generator=generator)


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target, reduction="sum")


def log_all(run, order=None):
    x, target = make_data()
    order = list(range(N)) if order is None else order
    for start in range(0, len(order), 7):
        part = order[start : start + 7]
        with run.log([f"row{i}" for i in part], columns={"source": [f"s{i % 3}" for i in part]}):
            loss_of(run.model, x[part], target[part]).backward()


def ask(run, n: int = 3) -> lk.Query:
    x, target = make_data(n, seed=2)
    with run.query([f"q{i}" for i in range(n)]) as query:
        loss_of(run.model, x, target).backward()
    return query


def make_run(path, seed: int = 0, order=None, **options) -> tuple[lk.Run, lk.Query]:
    run = lk.Run(path, make_model(seed), **options)
    log_all(run, order)
    run.commit()
    return run, ask(run)


def observe_all(run):
    """All that curvatures are made of beside rows, of the training data in one batch."""
    x, target = make_data()
    for watched in (run.observe, run.observe_fisher):
        with watched():
            loss_of(run.model, x, target).backward()
