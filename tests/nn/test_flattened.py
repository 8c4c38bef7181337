"""Models that flatten samples and positions for some of their layers, as OPT and Qwen's mixtures do."""

import pytest
import torch
from oracle import assert_equal_rows, projected_autograd
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import logra_kernels as lk

pytestmark = pytest.mark.usefixtures("each_device")
SMALL = lk.Projection(rank=4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.gate = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(8, 1)

    def forward(self, x):
        n, t, _ = x.shape
        h = self.norm(torch.tanh(self.up(x)).reshape(n * t, -1))
        return torch.sigmoid(self.gate(x)) * self.down(h).reshape(n, t, -1)


def loss_of(model, x):
    return model(x).double().square().sum()


def data():
    return torch.randn(3, 5, 8)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("in_graph", [False, True])
def test_rows_of_all_samples_are_told_apart(frozen, in_graph):
    model, x = Net().requires_grad_(not frozen), data().requires_grad_()
    with lk.capture(model, SMALL, kinds=["linear", "norm"], in_graph=in_graph) as taps:
        taps.reset(3, sequence_length=5)
        loss_of(model, x).backward()
    exact = projected_autograd(
        model, lk.capture(model, SMALL, kinds=["linear"]), [lambda i=i: loss_of(model, x[i : i + 1]) for i in range(3)]
    )
    gains = [torch.autograd.grad(loss_of(model.requires_grad_(), x[i : i + 1]), model.norm.weight)[0] for i in range(3)]
    p_out = taps.factors["norm"][1]
    exact["norm"] = torch.stack([(p_out @ g)[:, None] for g in gains]).double()
    assert_equal_rows(taps.grads, {name: exact[name] for name in taps.layers})


def test_with_weights_of_positions():
    model, x, weights = Net(), data(), torch.rand(3, 5)

    def loss(part):
        return (model(x[part]).double().square().sum(-1) * weights[part]).sum()

    with lk.capture(model, SMALL) as taps:
        taps.reset(weights=weights, sequence_length=5)
        loss_of(model, x).backward()
    exact = projected_autograd(model, taps, [lambda i=i: loss(slice(i, i + 1)) for i in range(3)])
    assert_equal_rows(taps.grads, exact)


@pytest.mark.parametrize("told", ["T", "any"])
def test_compiled(told):
    torch._dynamo.reset()
    model, counter = Net(), CompileCounterWithBackend("aot_eager")
    with lk.capture(model, SMALL, kinds=["linear", "norm"]) as taps:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for n, t in ((3, 5), (4, 6), (7, 5), (2, 9), (5, 4)):
            x, rows = torch.randn(n, t, 8), []
            for run in (model, compiled):
                taps.reset(n, sequence_length=t if told == "T" else "any")
                loss_of(run, x).backward()
                rows.append(taps.rows())
            torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2  # the first shape, then any


def test_what_is_refused():
    model, x = Net(), data()
    with lk.capture(model, SMALL) as taps:
        with pytest.raises(ValueError, match=r"'down' sees 15 samples where 3 were begun.*give sequence_length"):
            loss_of(model, x).backward()
        taps.reset(3, sequence_length=4)
        with pytest.raises(ValueError, match="'down' sees 15 samples"):
            loss_of(model, x).backward()
        with pytest.raises(ValueError, match="sequence_length 5 without batch_size"):
            taps.reset(sequence_length=5)
        with pytest.raises(ValueError, match="sequence_length 5 beside offsets"):
            taps.reset(3, offsets=torch.tensor([0, 5, 10, 15]), sequence_length=5)


def test_frames_of_a_convolution_are_no_positions():
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2)

        def forward(self, x):
            return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    with lk.capture(Frames(), SMALL) as taps:
        taps.reset(2, sequence_length=3)
        with pytest.raises(ValueError, match="'conv' sees 6 samples where 2"):
            taps._layers[0].holders[0][0](torch.randn(6, 3, 4, 4)).sum().backward()


def test_a_whole_run(tmp_path):
    model, x = Net(), data()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=4, kind="pca")) as run:
        with run.observe(weights=torch.ones(3, 5), sequence_length=5):
            loss_of(model, x).backward()
        with run.log(["a", "b", "c"], sequence_length=5):
            loss_of(model, x).backward()
        run.finalize()
        with run.query(["q"], sequence_length=5) as query:
            loss_of(model, x[1:2]).backward()
        scores = run.scores(query, mode="dot")
        with run.tokens(query, weights=torch.ones(3, 5), sequence_length=5) as tokens:
            loss_of(model, x).backward()
        assert run.topk(query, k=1).ids == [["b"]]
    torch.testing.assert_close(tokens.shares.sum(-1), scores, rtol=1e-4, atol=1e-4 * float(scores.abs().max()))
