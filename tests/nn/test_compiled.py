"""Compiled models: the rows of eager ones, of batches of any size, and compiled no more often than without taps."""

import pytest
import torch
from oracle import assert_equal_rows, exact_rows
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import logra_kernels as lk
from logra_kernels.errors import LograError

pytestmark = pytest.mark.usefixtures("each_device")
SMALL = lk.Projection(rank=4)
SIZES = ((3, 7), (3, 7), (5, 9), (2, 4), (6, 4), (4, 4))


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 20), nn.Linear(20, 12), nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.norm(x + self.down(nn.functional.gelu(self.up(x)))))


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target, reduction="sum")


def data(n=3, t=7):
    return torch.randn(n, t, 12), torch.randn(n, t, 5)


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", None), ("inductor", True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_batches_of_any_size_without_a_graph_break(backend, dynamic, frozen):
    model, counter = Net().requires_grad_(not frozen), CompileCounterWithBackend(backend)
    with lk.capture(model, SMALL) as taps:
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
        counts = []
        for n, t in SIZES:
            x, target = data(n, t)
            taps.reset(batch_size=n)
            loss_of(compiled, x, target).backward()
            assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x, target))
            counts.append(counter.frame_count)
    # the first batch's shape, then any; asked to, any at once
    assert counts == ([1, 1, 2, 2, 2, 2] if dynamic is None else counts[:1] * 6)


def test_other_taps_come_and_go():
    model, counter = Net(), CompileCounterWithBackend("aot_eager")
    with lk.capture(model, SMALL) as taps:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for n in (3, 4, 5):
            with lk.capture(Net(), SMALL) as others:
                loss_of(others._model, *data()).backward()
            x, target = data(n)
            taps.reset(batch_size=n)
            loss_of(compiled, x, target).backward()
            assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x, target))
    assert counter.frame_count == 2


def test_weights_of_positions():
    model, counter = Net(), CompileCounterWithBackend("aot_eager")
    with lk.capture(model, SMALL) as taps:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for n, t in SIZES:
            x, target = data(n, t)
            rows = []
            for run in (model, compiled):
                taps.reset(n, torch.arange(1.0, 1 + n * t).view(n, t))
                loss_of(run, x, target).backward()
                rows.append(taps.rows())
            torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_blocks_share_what_is_compiled():
    """Compiled one by one, as models of many equal layers are."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Linear(12, 12), nn.ModuleList(Block() for _ in range(10))

        def forward(self, x):
            x = torch.tanh(self.stem(x))
            for block in self.blocks:
                x = block(x)
            return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x)))

    model, counter = Deep(), CompileCounterWithBackend("aot_eager")
    with lk.capture(model, SMALL) as taps:
        rows = {}
        for compiled in (False, True):
            for n in (3, 4, 5, 2):
                torch.manual_seed(n)
                taps.reset(batch_size=n)
                model(torch.randn(n, 7, 12)).square().sum().backward()
                rows[compiled, n] = taps.rows()
            for block in model.blocks:
                block.compile(backend=counter)
    for n in (3, 4, 5, 2):
        torch.testing.assert_close(rows[True, n], rows[False, n], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_what_torch_takes_for_constant_is_as_before_in_the_end(tmp_path):
    config = torch._dynamo.config
    before = config.force_nn_module_property_static_shapes
    model, (x, target) = Net(), data()
    with lk.capture(model, SMALL) as taps:
        for _ in range(2):
            taps.reset(batch_size=3)
        assert not config.force_nn_module_property_static_shapes
        with lk.capture(Net(), SMALL) as others:
            others.reset(batch_size=3)
        assert not config.force_nn_module_property_static_shapes
    assert config.force_nn_module_property_static_shapes is before
    with lk.Run(tmp_path / "s", model, projection=SMALL) as run:
        with pytest.raises(ZeroDivisionError), run.log(["a", "b", "c"]):
            assert not config.force_nn_module_property_static_shapes
            raise ZeroDivisionError
        assert config.force_nn_module_property_static_shapes is before
        with run.log(["a", "b", "c"]):
            loss_of(model, x, target).backward()
    assert config.force_nn_module_property_static_shapes is before


def test_before_the_taps_is_refused_not_silent():
    model, (x, target) = Net(), data()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with lk.capture(model, SMALL) as taps:
        taps.reset(batch_size=3)
        loss_of(compiled, x, target).backward()
    try:
        got = taps.grads
    except LograError as error:
        assert "compile the model after" in str(error)
    else:
        assert_equal_rows(got, exact_rows(loss_of, model, taps, x, target))
