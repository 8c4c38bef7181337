"""Subclasses whose forward is their own: tapped where they compute what their kind does, refused where they do not."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equal_rows, projected_autograd
from torch import nn

import logra_kernels as lk

pytestmark = pytest.mark.usefixtures("each_device")
SMALL = lk.Projection(rank=4)


class ToyScaledWordEmbedding(nn.Embedding):
    """As Gemma's."""

    def __init__(self, *shape: int, scale: float) -> None:
        super().__init__(*shape)
        self.register_buffer("embed_scale", torch.tensor(scale))

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class ShiftedPositions(nn.Embedding):
    """As BART's: ids [N, T] come in, and positions are looked up."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]).expand(ids.shape) + 2)


class CausalConv(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Counted(nn.Linear):
    """Somebody's own, which computes what a linear layer does."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Normed(nn.Linear):
    def forward(self, x):
        return super().forward(F.normalize(x, dim=-1) * 3)


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits.softmax(-1), logits


class DoubledWeights(nn.Conv1d):
    """Its forward is the kind's, and what that calls is not."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class ChannelsFirstNorm(nn.LayerNorm):
    """As ConvNeXt's; a square image hides that the last dimension is not the channels'."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GainFromOne(nn.LayerNorm):
    """As Nemotron's."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class SizedPositions(nn.Embedding):
    """As Pegasus's: a shape comes in."""

    def forward(self, shape):
        return super().forward(torch.arange(shape[1]).expand(shape))


class Net(nn.Module):
    def __init__(self, layer: nn.Module, wrap=lambda y: y) -> None:
        super().__init__()
        self.layer, self.wrap = layer, wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


def loss_of(y):
    return y.double().square().sum()


def check(model, x, **settings):
    with lk.capture(model, SMALL, **settings) as taps:
        loss_of(model(x)).backward()
    exact = projected_autograd(model, taps, [lambda i=i: loss_of(model(x[i : i + 1])) for i in range(len(x))])
    assert_equal_rows(taps.grads, exact)


@pytest.mark.parametrize("scale", [1.0, 5.65685])
def test_scaled_embeddings(scale):
    check(Net(ToyScaledWordEmbedding(20, 8, scale=scale)), torch.randint(0, 20, (3, 9)), kinds=["embedding"])


def test_scaled_embedding_tied_to_the_head():
    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.head = ToyScaledWordEmbedding(20, 8, scale=3.0), nn.Linear(8, 20, bias=False)
            self.head.weight = self.wte.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.wte(ids)))

    check(LM(), torch.randint(0, 20, (3, 9)), kinds=["linear", "embedding"])


def test_a_subclass_that_computes_the_same():
    model = Net(Counted(6, 5))
    check(model, torch.randn(3, 7, 6))
    assert model.layer.calls == 1 + 3


@pytest.mark.parametrize("norm", [nn.LayerNorm, GainFromOne])
def test_norms_whose_gains_count_from_0_or_from_1(norm):
    model, x = Net(norm(6)), torch.randn(3, 7, 6)
    nn.init.normal_(model.layer.weight), nn.init.normal_(model.layer.bias)
    with lk.capture(model, lk.Projection(kind="identity"), kinds=["norm"]) as taps:
        loss_of(model(x)).backward()
    for i, row in enumerate(taps.grads["layer"]):
        (dw,) = torch.autograd.grad(loss_of(model(x[i : i + 1])), [model.layer.weight])
        torch.testing.assert_close(row[:, 0], dw, rtol=1e-4, atol=1e-4)


def put_in_place(forward):
    layer = nn.Linear(6, 5)
    layer.forward = lambda x: forward(layer, x)
    return layer


def test_a_forward_put_on_an_instance_that_computes_the_same():
    check(Net(put_in_place(nn.Linear.forward)), torch.randn(3, 7, 6))


def test_a_forward_put_on_an_instance_that_computes_something_else_is_refused():
    model = Net(put_in_place(lambda layer, x: F.linear(2 * x, layer.weight, layer.bias)))
    with lk.capture(model, SMALL), pytest.raises(ValueError, match=r"'layer' is a Linear with a forward.*exclude it"):
        model(torch.randn(3, 7, 6))


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_in_any_dtype(gradient):
    model = Net(Counted(64, 32)).to(gradient)
    with lk.capture(model, SMALL) as taps:
        loss_of(model(torch.randn(3, 7, 64, dtype=gradient))).backward()
    assert taps.grads["layer"].isfinite().all()


@pytest.mark.parametrize(
    ("layer", "x", "wrap"),
    [
        (ShiftedPositions(20, 8), torch.randint(0, 9, (3, 9)), None),
        (ShiftedPositions(20, 8), torch.randint(80, 90, (3, 9)), None),  # ids beyond the table, as Whisper's
        (CausalConv(4, 6, 3), torch.randn(3, 4, 11), None),
        (Normed(6, 5), torch.randn(3, 7, 6), None),
        (Router(6, 5), torch.randn(3, 7, 6), lambda y: y[0]),
        (DoubledWeights(4, 6, 3), torch.randn(3, 4, 11), None),
        (ChannelsFirstNorm(6), torch.randn(3, 6, 6, 6), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_computes_something_else_is_refused(layer, x, wrap):
    model = Net(layer, wrap or (lambda y: y))
    taps = lk.capture(model, SMALL, kinds=["linear", "conv", "embedding", "norm"])
    with taps, pytest.raises(ValueError, match=f"'layer' is a {type(layer).__name__}.*exclude it"):
        model(x)


def test_torch_compile_needs_an_eager_batch_first():
    model, x = Net(Counted(6, 5)), torch.randn(3, 7, 6)
    with lk.capture(model, SMALL) as taps:
        taps.reset(3)
        with pytest.raises(Exception, match="run one batch eagerly"):
            torch.compile(model, fullgraph=True, backend="eager")(x)
        torch._dynamo.reset()
        loss_of(model(x)).backward()
        eager = taps.grads["layer"].clone()
        taps.reset(3)
        loss_of(torch.compile(model, fullgraph=True, backend="eager")(x)).backward()
        torch.testing.assert_close(taps.grads["layer"], eager)


def test_a_head_with_a_bias_tied_to_an_embedding():
    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.mlp, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
            self.head.weight = self.wte.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.mlp(self.wte(ids))))

    model, ids = LM(), torch.randint(0, 20, (3, 9))
    whole = lk.Projection(kind="identity")
    with lk.capture(model, whole, kinds=["linear", "embedding"], bias=True) as taps:
        loss_of(model(ids)).backward()
    assert taps.layers == {"wte": (20, 8), "mlp": (8, 9)}
    for i in range(3):
        dw, dw_mlp, db_mlp = torch.autograd.grad(
            loss_of(model(ids[i : i + 1])), [model.wte.weight, model.mlp.weight, model.mlp.bias]
        )
        torch.testing.assert_close(taps.grads["wte"][i], dw, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(taps.grads["mlp"][i], torch.cat([dw_mlp, db_mlp[:, None]], 1), rtol=1e-5, atol=1e-5)


def test_an_embedding_that_is_given_a_shape():
    model = Net(SizedPositions(20, 8))
    with (
        lk.capture(model, SMALL, kinds=["embedding"]),
        pytest.raises(ValueError, match="got ids of type Size.*exclude"),
    ):
        model(torch.Size([3, 9]))
