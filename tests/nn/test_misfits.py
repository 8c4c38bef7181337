"""Calls with something else than the batch's samples: refused where a gradient comes back, with what to do."""

import pytest
import torch
from oracle import assert_equal_rows, projected_autograd
from torch import nn

import logra_kernels as lk
from logra_kernels.errors import LograError

SMALL = lk.Projection(rank=4)
N, WIDTH = 3, 8


class Net(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.first, self.last, self.run = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5), forward

    def forward(self, x):
        return self.run(self, x)


def loss_of(model, x):
    return model(x).square().sum()


def by_its_norm(model, x):
    """As PEFT's DoRA: the weight's norm, computed by way of the identity, is detached."""
    norm = model.first(torch.eye(WIDTH, dtype=x.dtype)).norm()
    return model.last(model.first(x) / norm.detach())


def broadcast(model, x):
    return model.last(model.first(torch.ones(1, 1, WIDTH)) + x)


def twice_as_many(model, x):
    return model.last(model.first(x) + model.first(x.repeat(2, 1, 1))[: len(x)])


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("width", [N, WIDTH])
def test_a_call_whose_result_is_detached(width, frozen, in_graph):
    model = Net(by_its_norm).requires_grad_(not frozen)
    x = torch.randn(width, 7, WIDTH, requires_grad=True)
    taps = lk.capture(model, SMALL, in_graph=in_graph)
    taps.reset(width)
    with taps:
        loss_of(model, x).backward()
    exact = projected_autograd(model, taps, [lambda i=i: loss_of(model, x[i : i + 1]) for i in range(width)])
    assert_equal_rows(taps.grads, exact)


@pytest.mark.parametrize(
    "settings", [{"batch_size": N, "weights": torch.ones(N, 7)}, {"offsets": torch.tensor([0, 4, 9, 21])}]
)
def test_with_weights_or_limits_of_positions(settings):
    model, x = Net(by_its_norm), torch.randn(N, 7, WIDTH)
    with lk.capture(model, SMALL) as taps:
        taps.reset(**settings)
        loss_of(model, x).backward()
        assert taps.grads["first"].any()
        taps.reset(**settings)
        with pytest.raises(ValueError, match=r"offsets end at 21|do not fit the \(3, 3\) positions"):
            loss_of(model, x[:, :3]).backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            broadcast,
            r"'last' sees 3 samples where 1 were begun by layer 'first', as reset\(batch_size\) was not called; ",
        ),
        (twice_as_many, r"'first' sees 6 samples where 3 were begun by layer 'first'"),
    ],
)
def test_a_gradient_is_refused_and_who_began_is_named(forward, message, frozen):
    model, x = Net(forward).requires_grad_(not frozen), torch.randn(N, 7, WIDTH)
    with lk.capture(model, SMALL), pytest.raises(ValueError, match=message):
        loss_of(model, x).backward()


def test_in_a_run_the_ids_say_how_many(tmp_path):
    run = lk.Run(tmp_path / "s", (model := Net(broadcast)), projection=SMALL)
    x = torch.randn(N, 7, WIDTH)
    with pytest.raises(ValueError, match="'first' sees 1 samples where 3 were begun; "), run.log(["a", "b", "c"]):
        loss_of(model, x).backward()
    run = lk.Run(tmp_path / "s", model, projection=SMALL, exclude=["first"])
    with run.log(["a", "b", "c"]):
        loss_of(model, x).backward()
    assert len(run.commit()) == N


# --- inputs and layers that no tap is made for ---


class Named(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden[0] if isinstance(hidden, tuple) else hidden)


def test_a_subclass_with_other_arguments_is_named():
    for forward, message in (
        (lambda model, x: model.layer(hidden=x), r"'layer', a Named, got hidden by name where .*exclude it"),
        (lambda model, x: model.layer((x,)), r"'layer', a Named, got a tuple where .*exclude it"),
    ):
        model = Net(forward)
        model.layer = Named(WIDTH, 5)
        with lk.capture(model, SMALL), pytest.raises(ValueError, match=message):
            model(torch.randn(N, WIDTH))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", ["nested", "jagged", "sparse_coo"])
def test_tensors_of_other_layouts_are_named(layout, frozen):
    model = nn.Linear(WIDTH, 5).requires_grad_(not frozen)
    if layout == "sparse_coo":
        x = torch.randn(N, WIDTH).relu().to_sparse()
    else:
        kind = torch.strided if layout == "nested" else torch.jagged
        x = torch.nested.nested_tensor([torch.randn(4, WIDTH), torch.randn(6, WIDTH)], layout=kind)
    name = "sparse_coo" if layout == "sparse_coo" else "nested"
    with lk.capture(model, SMALL), pytest.raises(ValueError, match=f"got a {name} tensor; pad it"):
        model(x)


def test_torch_func_is_refused():
    model, x = Net(lambda model, x: model.last(model.first(x))), torch.randn(N, WIDTH)
    params = dict(model.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    with lk.capture(model, SMALL) as taps:
        with pytest.raises(ValueError, match=r"inside of torch\.func"):
            torch.func.grad(loss)(params, x)
        with pytest.raises(ValueError, match=r"inside of torch\.func"):
            torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
        taps.reset()
        loss(params, x).backward()
    assert taps.grads["last"].any()


def test_layers_without_a_shape_complex_ones_and_offloaded_ones_are_named():
    with pytest.raises(ValueError, match=r"'0.weight' is yet without a shape: run the model"):
        lk.capture(nn.Sequential(nn.LazyConv1d(4, 3), nn.Conv1d(4, 4, 1)))
    model = nn.Sequential(nn.Linear(WIDTH, 5, dtype=torch.complex64), nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"'0' is torch.complex64; it must be real: exclude"):
        lk.capture(model)
    assert list(lk.capture(model, exclude=["0"]).layers) == ["1"]
    model = nn.Linear(WIDTH, 5, device="meta")
    with lk.capture(model, SMALL), pytest.raises(ValueError, match=r"'' was on meta when .*move the model before"):
        model.to_empty(device="cpu")(torch.randn(N, WIDTH))


def test_what_a_silent_layer_may_be_is_said():
    model = Net(lambda model, x: model.last(x))
    with lk.capture(model, SMALL) as taps:
        loss_of(model, torch.randn(N, WIDTH)).backward()
    with pytest.raises(LograError, match=r"\(first\): .*use_reentrant=False.*does not call"):
        _ = taps.grads


class WithPositions(nn.Module):
    """Embeddings of tokens, and of positions or of their distances, which all samples share."""

    def __init__(self, relative):
        super().__init__()
        self.tokens, self.places, self.relative = nn.Embedding(20, 6), nn.Embedding(20, 6), relative

    def forward(self, ids):
        steps = torch.arange(ids.shape[1])
        if not self.relative:
            return self.tokens(ids) + self.places(steps)
        return self.tokens(ids) + self.places(steps[:, None] - steps + len(steps)).sum(1)


@pytest.mark.parametrize("relative", [False, True])
def test_positions_as_many_as_samples_are_no_samples(relative):
    model = WithPositions(relative)
    ids = torch.randint(0, 20, (5, 5))
    with lk.capture(model, SMALL, kinds=["embedding"], include=["places"]) as taps:
        taps.reset(5)
        with pytest.raises(ValueError, match="'places' got ids .* that count positions"):
            model(ids).square().sum().backward()
    with lk.capture(model, SMALL, kinds=["embedding"], include=["tokens"]) as taps:
        taps.reset(5)
        model(ids).square().sum().backward()
        assert taps.rows().isfinite().all()


def test_positions_as_many_as_samples_beside_layers_of_sequences_first():
    class Model(WithPositions):
        def __init__(self):
            super().__init__(relative=False)
            self.block = nn.TransformerEncoderLayer(6, 1, 8, dropout=0.0)

        def forward(self, ids):
            return self.block(super().forward(ids).transpose(0, 1))

    model = Model()
    with lk.capture(model, SMALL, kinds=["linear", "embedding"], include=["places", "block.*"]) as taps:
        taps.reset(5)
        with pytest.raises(ValueError, match="'places' got ids .* that count positions"):
            model(torch.randint(0, 20, (5, 5))).square().sum().backward()


def test_ids_of_the_samples_need_only_another_order():
    model = nn.Embedding(20, 6)
    with lk.capture(nn.Sequential(model), SMALL, kinds=["embedding"]) as taps:
        for ids in (torch.tensor([0, 2, 1]), torch.arange(3)):
            taps.reset(3)
            model(ids).square().sum().backward()
            assert taps.rows().isfinite().all()
