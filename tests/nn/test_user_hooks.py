"""Hooks of the user's own on a tapped layer, before or after the taps: what the weight's gradient sees counts."""

import pytest
import torch
from oracle import assert_equal_rows, projected_autograd
from torch import nn

import logra_kernels as lk

SMALL = lk.Projection(rank=4)


def scaled(module, args, y):
    return 3 * y


def scaled_in_place(module, args, y):
    return y.mul_(3)


def clipped(module, args, y):
    if y.requires_grad:
        y.register_hook(lambda dy: dy / 2)


HOOKS = {
    "of y": lambda layer: layer.register_forward_hook(scaled),
    "of y in place": lambda layer: layer.register_forward_hook(scaled_in_place),
    "of x": lambda layer: layer.register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "of dy": lambda layer: layer.register_full_backward_pre_hook(lambda module, dy: (dy[0] / 2,)),
    "of dx": lambda layer: layer.register_full_backward_hook(lambda module, dx, dy: (dx[0] / 2,)),
    "on y": lambda layer: layer.register_forward_hook(clipped),
}


def loss_of(y):
    return y.double().square().sum()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("hook", HOOKS)
def test_linear_layers(hook, before, frozen):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 5, 6, requires_grad=True)
    model.requires_grad_(not frozen)
    if before:
        HOOKS[hook](model[0])
    with lk.capture(model, SMALL) as taps:
        if not before:
            HOOKS[hook](model[0])
        loss_of(model(x)).backward()
    exact = projected_autograd(model, taps, [lambda i=i: loss_of(model(x[i : i + 1])) for i in range(3)])
    assert_equal_rows(taps.grads, exact)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("hook", HOOKS)
def test_convolutions(hook, before):
    conv, x = nn.Conv1d(6, 8, 3), torch.randn(3, 6, 9, requires_grad=True)
    model = nn.Sequential(conv, nn.Tanh())
    if before:
        HOOKS[hook](conv)
    with lk.capture(model, SMALL) as taps:
        if not before:
            HOOKS[hook](conv)
        loss_of(model(x)).backward()
    p_in, p_out = (p.double() for p in taps.factors["0"])
    for i, row in enumerate(taps.grads["0"]):
        (dw,) = torch.autograd.grad(loss_of(model(x[i : i + 1])), [conv.weight])
        torch.testing.assert_close(row.double(), p_out @ dw.double().flatten(1) @ p_in.T, rtol=1e-4, atol=1e-5)
