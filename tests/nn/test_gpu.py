"""What the other tests of taps, which run on each device, leave out: compiled models on a GPU, models on several."""

import pytest
import torch
from torch import nn

import logra_kernels as lk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_model():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_without_a_graph_break(backend, frozen):
    model, x = make_model().cuda(), torch.randn(3, 50, 64, device="cuda")
    model.requires_grad_(not frozen)
    model[0].weight.requires_grad_(True)
    with lk.capture(model, lk.Projection(rank=16)) as taps:
        model(x).square().sum().backward()
        eager = taps.rows().clone()
        taps.reset(3)
        torch.compile(model, fullgraph=True, backend=backend)(x).square().sum().backward()
        torch.testing.assert_close(taps.rows(), eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_two_devices():
    model, x = make_model(), torch.randn(3, 50, 64)
    with lk.capture(model, lk.Projection(rank=16)) as taps:
        model(x).square().sum().backward()
    one = taps.rows()
    model[0].cuda(0), model[2].cuda(1)
    with lk.capture(model, lk.Projection(rank=16)) as taps:
        model[2](model[1](model[0](x.cuda(0))).cuda(1)).square().sum().backward()
    torch.testing.assert_close(taps.rows().cpu(), one, rtol=1e-4, atol=1e-4 * one.abs().max().item())
