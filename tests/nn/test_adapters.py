"""Layer kinds beyond the plain linear one, each against one-sample autograd of its own weight."""

import copy

import pytest
import torch
from oracle import assert_equal_rows
from torch import nn

import logra_kernels as lk

pytestmark = pytest.mark.usefixtures("each_device")
SMALL = lk.Projection(rank=4)


def loss_of(y, target):
    return nn.functional.mse_loss(y.double(), target, reduction="sum")


def as_matrix(layer: nn.Module, grads: dict[str, torch.Tensor], bias: bool) -> torch.Tensor:
    """The [d_out, d_in] matrix that a layer's projected gradient is a projection of."""
    dw = grads["weight"].double()
    if dw.dim() == 1:
        return dw[:, None]
    dw = dw.flatten(1)
    return torch.cat([dw, grads["bias"].double()[:, None]], dim=1) if bias else dw


def check(model, x, *, kinds, bias=False, projection=SMALL, include=None, rtol=1e-5, weights=None):
    model = model.to(torch.get_default_device()).train()
    with torch.no_grad():
        target = torch.randn_like(model(x).double())

    def one(i):
        y = model(x[i : i + 1])
        if weights is None:
            return loss_of(y, target[i : i + 1])
        error = (y.double() - target[i : i + 1]).square().sum(1 if y.dim() == 4 else -1)
        return (error * weights[i : i + 1]).sum()

    with lk.capture(model, projection, include, kinds=kinds, bias=bias) as taps:
        taps.reset(weights=weights)
        loss_of(model(x), target).backward()
    exact: dict[str, torch.Tensor] = {}
    for name in taps.layers:
        layer = model.get_submodule(name)
        parts = [p for p in ("weight", "bias") if getattr(layer, p, None) is not None]
        rows = []
        for i in range(len(x)):
            found = torch.autograd.grad(one(i), [getattr(layer, p) for p in parts])
            dw = as_matrix(layer, dict(zip(parts, found, strict=True)), bias)
            p_in, p_out = (None if p is None else p.double() for p in taps.factors[name])
            g = dw if p_out is None else p_out @ dw
            rows.append(g if p_in is None else g @ p_in.T)
        exact[name] = torch.stack(rows)
    assert_equal_rows(taps.grads, exact, rtol)
    return taps


@pytest.mark.parametrize("kind", ["orthonormal", "identity"])
def test_bias_is_one_more_input_column(kind):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False))
    projection = lk.Projection(rank=4, kind=kind)
    with lk.capture(model, lk.Projection(kind="identity"), bias=True) as taps:
        assert taps.layers == {"0": (8, 7), "2": (5, 8)}
    check(model[:2], torch.randn(3, 7, 6), kinds=["linear"], bias=True, projection=projection)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (4, 11)),
    "1d stride dilation": (nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1), (4, 15)),
    "2d": (nn.Conv2d(3, 6, 3, padding=1), (3, 8, 7)),
    "2d stride dilation": (nn.Conv2d(3, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(0, 1)), (3, 9, 8)),
    "2d groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 6, 5)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 6, 5)),
    "2d same": (nn.Conv2d(3, 5, 3, padding="same"), (3, 6, 5)),
    "2d reflect": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 6, 5)),
    "2d pointwise": (nn.Conv2d(3, 5, 1), (3, 6, 5)),
    "2d pointwise stride": (nn.Conv2d(5, 6, 1, stride=(2, 3)), (5, 6, 8)),
    "2d pointwise padded": (nn.Conv2d(5, 6, 1, padding=1), (5, 3, 4)),
    "2d pointwise groups": (nn.Conv2d(8, 6, 1, groups=2), (8, 3, 4)),
    "1d pointwise same": (nn.Conv1d(5, 6, 1, padding="same"), (5, 7)),
    "1d groups circular": (nn.Conv1d(8, 12, 3, groups=4, padding=1, padding_mode="circular"), (8, 9)),
    "3d": (nn.Conv3d(2, 5, 2), (2, 4, 5, 3)),
    "3d groups": (nn.Conv3d(4, 6, 2, groups=2, stride=2), (4, 4, 5, 4)),
}


@pytest.mark.parametrize("kind", ["orthonormal", "identity"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, kind):
    conv, shape = CONVOLUTIONS[name]
    model = nn.Sequential(conv, nn.Tanh())
    taps = check(model, torch.randn(3, *shape), kinds=["conv"], projection=lk.Projection(rank=4, kind=kind))
    if kind == "identity":
        assert taps.layers["0"] == (conv.out_channels, conv.weight[0].numel())


@pytest.mark.parametrize("kind", ["orthonormal", "identity"])
@pytest.mark.parametrize("name", ["2d", "2d groups", "2d depthwise", "2d pointwise"])
def test_a_convolution_of_no_samples(name, kind):
    conv, shape = CONVOLUTIONS[name]
    conv = conv.to(torch.get_default_device())
    with lk.capture(nn.Sequential(conv), lk.Projection(rank=3, kind=kind)) as taps:
        conv(torch.randn(0, *shape)).sum().backward()
    assert taps.grads["0"].shape == (0, *taps.layers["0"])


@pytest.mark.parametrize("kind", ["orthonormal", "identity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["2d stride dilation", "2d groups", "2d depthwise", "2d pointwise stride"])
def test_convolutions_in_other_dtypes_and_under_autocast(name, dtype, kind):
    layer, shape = CONVOLUTIONS[name]
    conv, x = copy.deepcopy(layer).to(torch.get_default_device()), torch.randn(3, *shape)
    with lk.capture(nn.Sequential(conv), lk.Projection(rank=3, kind=kind)) as taps:
        conv(x).tanh().double().square().sum().backward()
        exact = taps.grads["0"].clone()
        taps.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = conv(x)
        y.double().tanh().square().sum().backward()
        assert_equal_rows({"": taps.grads["0"]}, {"": exact.double()}, 0.05)
    conv.to(dtype)
    with lk.capture(nn.Sequential(conv), lk.Projection(rank=3, kind=kind)) as taps:
        conv(x.to(dtype)).double().tanh().square().sum().backward()
        assert_equal_rows({"": taps.grads["0"]}, {"": exact.double()}, 0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weights_on_the_positions_of_a_convolution(groups, kernel):
    model = nn.Sequential(nn.Conv2d(4, 8, kernel, groups=groups, padding=kernel // 2))
    check(model, torch.randn(3, 4, 5, 6), kinds=["conv"], weights=torch.rand(3, 5, 6))


class TinyLM(nn.Module):
    def __init__(self, tied: bool, padding: int | None = None) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 8, padding_idx=padding)
        self.mlp, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids)
        return self.head(self.norm(x + torch.tanh(self.mlp(x))))


@pytest.mark.parametrize("kind", ["orthonormal", "identity"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
def test_embedding_and_tied_head(tied, padding, kind):
    model, ids = TinyLM(tied, padding), torch.randint(0, 20, (3, 9))
    ids[:, 0] = 3
    taps = check(model, ids, kinds=["linear", "embedding"], projection=lk.Projection(rank=4, kind=kind))
    assert list(taps.layers) == (["wte", "mlp"] if tied else ["wte", "mlp", "head"])


def test_norm_gains():
    class HuggingFaceRMSNorm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width)), 1e-6

        def forward(self, hidden_states):
            scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * (hidden_states * scale)

    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 8), HuggingFaceRMSNorm(8))
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 2)
        model[2].weight.uniform_(0.5, 2)
    taps = check(model, torch.randn(3, 7, 8), kinds=["norm"])
    assert taps.layers == {"0": (4, 1), "2": (4, 1), "4": (4, 1)}
    check(model, torch.randn(3, 7, 8), kinds=["norm", "linear"], projection=lk.Projection(kind="identity"))


def test_all_kinds_compiled():
    class Net(TinyLM):
        def __init__(self):
            super().__init__(tied=True)
            self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)

        def forward(self, ids):
            x = self.wte(ids)
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
            return self.head(self.norm(x + torch.tanh(self.mlp(x))))

    model, ids = Net(), torch.randint(0, 20, (3, 9))
    target = torch.randn(3, 9, 20, dtype=torch.float64)
    kinds = ["linear", "conv", "embedding", "norm"]
    with lk.capture(model, SMALL, kinds=kinds, bias=True) as taps:
        loss_of(model(ids), target).backward()
    eager = taps.grads
    with lk.capture(model, SMALL, kinds=kinds, bias=True) as taps:
        taps.reset(3)
        loss_of(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), target).backward()
    assert list(eager) == ["wte", "mlp", "norm", "conv"]
    for name, grad in taps.grads.items():
        torch.testing.assert_close(grad, eager[name], rtol=1e-5, atol=1e-6)


def test_what_is_tapped_by_default_and_on_request():
    class Net(TinyLM):
        def __init__(self):
            super().__init__(tied=False)
            self.conv = nn.Conv1d(8, 8, 3)

    assert list(lk.capture(Net()).layers) == ["mlp", "head", "conv"]
    assert list(lk.capture(Net(), kinds=["norm"]).layers) == ["norm"]
    with pytest.raises(ValueError, match=r"kinds \['lstm'\] are unknown"):
        lk.capture(Net(), kinds=["lstm"])


def test_wrong_inputs_are_named():
    conv = nn.Sequential(nn.Conv2d(3, 4, 1))
    with lk.capture(conv), pytest.raises(ValueError, match=r"layer '0' got an input \(3, 5, 5\).*samples first"):
        conv(torch.randn(3, 5, 5))
    norm = nn.Sequential(nn.LayerNorm(4))
    with lk.capture(norm, kinds=["norm"]), pytest.raises(ValueError, match="samples first"):
        norm(torch.randn(4))
