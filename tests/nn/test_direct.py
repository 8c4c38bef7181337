"""Taps that are no nodes of the graph: everything that a probe in the graph gives, they give too."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from oracle import assert_equal_rows, exact_rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import logra_kernels as lk
from logra_kernels.errors import LograError

SMALL = lk.Projection(rank=4)
N, T, WIDTH = 3, 7, 12


class Net(nn.Module):
    """A bias and none, a layer used twice, in-place code behind a view, a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)
        self.again, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.again.weight
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = x + self.down(self.up(x).relu_())
        return self.head(self.tied(torch.tanh(self.again(self.again(x)))))


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target, reduction="sum")


@pytest.fixture
def case():
    return Net(), torch.randn(N, T, WIDTH), torch.randn(N, T, 5)


def directly_tapped(model, x) -> set[str]:
    """The layers whose outputs carry a hook and no node of a tap."""
    found = set()

    def look(name):
        def hook(module, args, y):
            if (y._base if y._is_view() else y)._backward_hooks is not None:
                found.add(name)

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def test_equals_autograd_and_the_tap_in_the_graph(case):
    model, x, target = case
    found = []
    for in_graph in (False, True):
        with lk.capture(model, SMALL, in_graph=in_graph) as taps:
            assert directly_tapped(model, x) == (set() if in_graph else {"up", "down", "again", "tied", "head"})
            taps.reset()
            loss_of(model, x, target).backward()
            found.append(taps.rows())
            assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x, target))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5 * found[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(N, WIDTH), (N, 2, 3, WIDTH)])
def test_dtypes_and_position_dimensions(case, dtype, shape):
    model = case[0].to(dtype)
    x, target = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 5, dtype=dtype)
    with lk.capture(model, SMALL) as taps:
        assert directly_tapped(model, x)
        taps.reset()
        loss_of(model, x, target).backward()
        assert_equal_rows(
            taps.grads, exact_rows(loss_of, model, taps, x, target), 1e-12 if dtype == torch.float64 else 0.1
        )


def test_bf16_projection_of_an_fp32_model(case):
    model, x, target = case
    with lk.capture(model, SMALL, projection_dtype=torch.bfloat16) as taps:
        loss_of(model, x, target).backward()
        exact = exact_rows(loss_of, model, taps, x, target)
        assert_equal_rows(taps.grads, exact, 3e-2)
        assert any((taps.grads[name] - exact[name]).norm() > 1e-5 * exact[name].norm() for name in exact)


def test_gradients_add_up_over_forwards_and_over_retained_graphs(case):
    model, x, target = case
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
        once = taps.rows().clone()
        loss = loss_of(model, x, target)
        loss.backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(taps.rows(), 3 * once)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        taps.reset()
        (loss_of(model, x, target) + loss_of(model, x, target)).backward()
        torch.testing.assert_close(taps.rows(), 2 * once)


def test_a_batch_that_was_reset_meanwhile_gets_nothing(case):
    model, x, target = case
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
        once = taps.rows().clone()
        stale = loss_of(model, x, target)
        taps.reset()
        loss_of(model, x, target).backward()
        stale.backward()
        torch.testing.assert_close(taps.rows(), once)


def test_gradients_of_something_else_do_not_count(case):
    model, x, target = case
    x.requires_grad_()
    with lk.capture(model, SMALL) as taps:
        loss = loss_of(model, x, target)
        torch.autograd.grad(loss, x, retain_graph=True)
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward(inputs=[x], retain_graph=True)
        with pytest.raises(LograError, match="received no gradient"):
            _ = taps.grads
        loss.backward()
        assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x, target))


def test_hooks_on_outputs_change_what_is_gathered_as_they_change_the_weights_gradient():
    model, x = nn.Linear(WIDTH, 5), torch.randn(N, WIDTH)
    for shape in ((N, WIDTH), (N, 1, WIDTH)):
        model.zero_grad()
        with lk.capture(model, SMALL) as taps:
            y = model(x.view(shape))
            y.register_hook(lambda dy: 3 * dy)
            y.sum().backward()
        p_in, p_out = taps.factors[""]
        torch.testing.assert_close(taps.grads[""].sum(0), p_out @ model.weight.grad @ p_in.T)


def test_second_derivatives_are_refused(case):
    model, x, target = case
    x.requires_grad_()
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward(create_graph=True)
        assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x, target))
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            x.grad.square().sum().backward()
    for leaf in (x, *model.parameters()):
        leaf.grad = None


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("alone", [False, True], ids=["beside the loss", "alone"])
def test_a_gradient_penalty_is_refused_not_half_captured(case, alone, frozen, in_graph):
    model, x, target = case[0].requires_grad_(not frozen), case[1].requires_grad_(), case[2]
    with lk.capture(model, SMALL, in_graph=in_graph):
        loss = loss_of(model, x, target)
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*gradient penalty"):
            (dx.square().sum() + (0 if alone else loss)).backward()


def test_two_captures_of_one_model(case):
    model, x, target = case
    with lk.capture(model, SMALL) as first, lk.capture(model, lk.Projection(rank=3, seed=1)) as second:
        loss_of(model, x, target).backward()
        for taps in (first, second):
            got = taps.grads
            first.active = second.active = False
            exact = exact_rows(loss_of, model, taps, x, target)
            first.active = second.active = False
            assert_equal_rows(got, exact)


def test_taps_in_the_graph_where_a_hook_would_not_do(case):
    model, x, target = case
    with lk.capture(model, SMALL) as taps:
        taps.reset(weights=torch.ones(N, T))
        assert not directly_tapped(model, x)
        taps.reset()
        with torch.autograd.graph.save_on_cpu():
            assert not directly_tapped(model, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "up" not in directly_tapped(model, x)
        taps.reset()
        y = checkpoint(model, x, use_reentrant=False)
        nn.functional.mse_loss(y, target, reduction="sum").backward()
        assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x, target))


def test_transposed_inputs_other_factors_and_other_weights(case):
    model, x, target = case
    with lk.capture(model, SMALL) as taps:
        for seed in range(2):
            taps.project(lk.Projection(rank=4, seed=seed))
            loss_of(model, x.mT.contiguous().mT, target).backward()
            assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x, target))
        model.up.weight = nn.Parameter(torch.randn(20, WIDTH))
        model.double()
        x, target = x.double(), target.double()
        model.float()
        taps.reset()
        loss_of(model, x.float(), target.float()).backward()
        assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x.float(), target.float()))


@pytest.mark.parametrize("learns", [False, True])
def test_a_model_made_fp64_and_back_between_batches(case, learns):
    model, x, target = case[0].requires_grad_(learns), case[1].requires_grad_(), case[2]
    with lk.capture(model, SMALL) as taps:
        for dtype in (torch.float32, torch.float64, torch.float32):
            model.to(dtype)
            taps.reset()
            loss_of(model, x.to(dtype), target.to(dtype)).backward()
            assert all(g.dtype == torch.float32 for g in taps.grads.values())
            assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x.detach().to(dtype), target.to(dtype)))


def test_inputs_are_free_after_the_backward_though_the_loss_lives(case):
    model, x, _ = case
    with lk.capture(model, SMALL):
        y = model.up(x)
        kept = (y._base._backward_hooks[-1]).args[0]
        y.sum().backward()
    assert kept == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frozen_weights(case, dtype):
    model, x, target = case[0].to(dtype).requires_grad_(False), case[1].to(dtype), case[2].to(dtype)
    with lk.capture(model, SMALL) as taps:
        assert "up" not in directly_tapped(model, x)  # its output gets a gradient by the probe alone
        x.requires_grad_()
        assert directly_tapped(model, x) == {"up", "down", "again", "tied", "head"}
        for leaf in (x, x.detach()):
            taps.reset()
            loss = loss_of(model, leaf, target)
            loss.backward(retain_graph=True)
            loss.backward()
            got = {name: g / 2 for name, g in taps.grads.items()}
            rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)
            assert_equal_rows(got, exact_rows(loss_of, model, taps, x.detach(), target), rtol)


def test_weights_frozen_and_freed_between_batches(case):
    model, x, target = case
    x.requires_grad_()
    with lk.capture(model, SMALL, projection_dtype=torch.bfloat16) as taps:
        for learns in (True, False, True):
            model.requires_grad_(learns)
            taps.reset()
            loss_of(model, x, target).backward()
            assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x.detach(), target), 3e-2)


def test_gradients_of_something_else_do_not_count_beside_frozen_weights(case):
    model, x, target = case[0].requires_grad_(False), case[1].requires_grad_(), case[2]
    shift = torch.zeros(WIDTH, requires_grad=True)
    with lk.capture(model, SMALL) as taps:
        hidden = x + shift
        loss = loss_of(model, hidden, target)
        for wanted in (x, hidden, [x, shift]):
            torch.autograd.grad(loss, wanted, retain_graph=True)
        loss.backward(inputs=[x], retain_graph=True)
        with pytest.raises(LograError, match="received no gradient"):
            _ = taps.grads
        loss.backward()
        assert_equal_rows(taps.grads, exact_rows(loss_of, model, taps, x.detach(), target))


class Branches(nn.Module):
    """`one` has x below it, `both` has x and a shift, and `around` has both too, by way of `one` and of the shift."""

    def __init__(self, order) -> None:
        super().__init__()
        self.one, self.both, self.around = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.order = order

    def forward(self, x, shift):
        y = {name: getattr(self, name)(x + shift if name == "both" else 2 * x) for name in self.order}
        return y["both"].square() + y["one"].square() + self.around(y["one"] * shift).square()


@pytest.mark.parametrize("order", [("one", "both"), ("both", "one")])
def test_gradients_of_some_leaves_count_for_the_layers_that_have_no_others_below(order):
    model, x = Branches(order).requires_grad_(False), torch.randn(N, T, WIDTH, requires_grad=True)
    shift = torch.randn(WIDTH, requires_grad=True)
    with lk.capture(model, SMALL) as taps:
        model(x, shift).sum().backward()
        whole = taps.grads
        for wanted, heard in (([x], {"one"}), ([shift], set()), ([x, shift], set(whole)), (None, set(whole))):
            taps.reset()
            model(x, shift).sum().backward(inputs=wanted)
            got = {name: probe.leaf.grad for name, probe in taps._probes.items() if probe.leaf.grad is not None}
            assert set(got) == heard
            for name, grad in got.items():
                torch.testing.assert_close(grad, whole[name])


class Holder:
    """What a node of the graph keeps."""


class Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fails):
        ctx.held, ctx.fails = Holder(), fails
        Holding.last = weakref.ref(ctx.held)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        if ctx.fails:
            raise ArithmeticError
        return dy, None


@pytest.mark.parametrize("fails", [False, True])
def test_a_backward_pass_leaves_nothing_of_its_graph_behind(case, fails):
    model, x = case[0].requires_grad_(False), case[1].requires_grad_()
    with lk.capture(model, SMALL):
        y = model.up(Holding.apply(x, fails))
        with pytest.raises(ArithmeticError) if fails else nullcontext():
            y.sum().backward()
        del y
        assert Holding.last() is None


def test_second_derivatives_are_refused_beside_frozen_weights(case):
    model, x, target = case[0].requires_grad_(False), case[1].requires_grad_(), case[2]
    with lk.capture(model, SMALL):
        loss_of(model, x, target).backward(create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            x.grad.square().sum().backward()
    x.grad = None


def test_what_frozen_layers_keep_goes_with_the_graph(case):
    model, x = case[0].requires_grad_(False), case[1].requires_grad_()
    for backward in (False, True):
        with lk.capture(model, SMALL):
            y = model.up(x)
            (a,) = y._base._backward_hooks[-1].args[0]
            gone = weakref.ref(a)
            assert a.shape == (N, T, 4)
            del a
            if backward:
                y.sum().backward()
                assert gone() is None
            del y
        assert gone() is None


def test_probes_without_the_graph_are_refused(case):
    with lk.capture(case[0], SMALL) as taps, pytest.raises(LograError, match="in_graph=True"):
        _ = taps.probes


def test_a_frozen_layers_input_that_is_written_to():
    """Projected it may be; kept as it is, autograd must notice."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = torch.tanh(x) * 1.0
            y = self.up(h)
            h.add_(1.0)
            return y + h

    model, x = Writing().requires_grad_(False), torch.randn(3, 7, WIDTH, requires_grad=True)
    model(x).square().sum().backward()
    with lk.capture(model, SMALL) as taps:
        model(x).square().sum().backward()
    dy, h = 2 * model(x).detach(), torch.tanh(x).detach()
    p_in, p_out = taps.factors["up"]
    exact = (dy @ p_out.T).mT @ (h @ p_in.T)
    assert_equal_rows(taps.grads, {"up": exact.double()})
    with lk.capture(model, lk.Projection(kind="identity")), pytest.raises(RuntimeError, match="inplace operation"):
        model(x).square().sum().backward()
