"""A tapped weight that is used outside of its layers: refused where the loss depends on that, in a first batch."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_equal_rows, projected_autograd
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

import logra_kernels as lk
from logra_kernels.errors import LograError

SMALL = lk.Projection(rank=4)
N, WIDTH = 3, 8


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Calls its layers, and uses the weight of the first by itself as well."""

    def __init__(self, use) -> None:
        super().__init__()
        self.first, self.last, self.use = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5), use

    def forward(self, x):
        return self.last(torch.tanh(self.use(self.first.weight, self.first(x))))


USES = {
    "linear": lambda w, y: F.linear(y, w),
    "linear by name": lambda w, y: F.linear(input=y, weight=w),
    "transposed": lambda w, y: y @ w.T,
    "operator": lambda w, y: y * w[0],
    "norm": lambda w, y: y / w.norm(),
}
OTHERS = {
    "no use": lambda w, y: y,
    "dtype and shape": lambda w, y: y.to(w.dtype) * w.shape[0] / w.numel(),
    "detached norm": lambda w, y: y / w.norm().detach(),
    "checkpointed": lambda w, y: checkpoint(lambda w, y: y / w.norm().detach(), w, y, use_reentrant=False),
    "without gradients": lambda w, y: y * torch.no_grad()(torch.norm)(w),
    "writing to it": lambda w, y: (torch.no_grad()(w.mul_)(1.0), y)[1],
}


def loss_of(model, x):
    return model(x).square().sum()


def exact_of(model, taps, x):
    return projected_autograd(model, taps, [lambda i=i: loss_of(model, x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("use", USES)
def test_refused(use, frozen):
    model, x = Net(USES[use]).requires_grad_(not frozen), torch.randn(N, 7, WIDTH)
    with lk.capture(model, SMALL), pytest.raises(LograError, match=r"'first' is used outside.*exclude the layer"):
        loss_of(model, x).backward()
    with lk.capture(model, SMALL, exclude=["first"]) as taps:
        loss_of(model, x).backward()
    assert_equal_rows(taps.grads, exact_of(model, taps, x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("use", OTHERS)
def test_uses_without_a_gradient(use, frozen):
    model, x = Net(OTHERS[use]).requires_grad_(not frozen), torch.randn(N, 7, WIDTH)
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x).backward()
    assert_equal_rows(taps.grads, exact_of(model, taps, x))


def test_another_modules_use_of_a_tied_weight_is_its_own():
    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20, bias=False)
            self.head.weight = self.wte.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.wte(ids)))

    model, ids = LM(), torch.randint(0, 20, (N, 7))
    with lk.capture(model, SMALL) as taps:
        loss_of(model, ids).backward()
    assert list(taps.grads) == ["head"]
    with lk.capture(model, SMALL, kinds=["linear", "embedding"]) as taps:
        loss_of(model, ids).backward()
    assert_equal_rows(taps.grads, exact_of(model, taps, ids))


def test_optimizer_steps_and_gradients_of_weights_inside():
    model, x = Net(OTHERS["no use"]), torch.randn(N, 7, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.autograd.grad(loss_of(model, x), [model.first.weight])
        got = {name: grad.clone() for name, grad in taps.grads.items()}
        taps.active = False
        exact = exact_of(model, taps, x)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_rows(got, exact)


def test_only_a_first_batch_is_watched(tmp_path):
    model, x = Net(OTHERS["no use"]), torch.randn(N, 7, WIDTH)
    run = lk.Run(tmp_path / "s", model, projection=SMALL)
    looked = []

    def use(w, y):
        looked.append(_get_current_function_mode() is not None)
        return y

    model.use = use
    for batch in range(2):
        with run.log([f"{batch}{i}" for i in range(N)]):
            loss_of(model, x).backward()
            torch.no_grad()(model)(x)
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x).backward()
        taps.reset(N)
        loss_of(model, x).backward()
    assert looked == [True, False, False, False, True, False]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_penalty_in_the_loss_is_no_samples_and_no_error():
    model, x = Net(OTHERS["no use"]), torch.randn(N, 7, WIDTH)
    with lk.capture(model, SMALL) as taps:
        (loss_of(model, x) + sum(p.square().sum() for p in model.parameters())).backward()
    assert_equal_rows(taps.grads, exact_of(model, taps, x))


def test_a_model_that_fails_or_calls_itself():
    model, x = Net(OTHERS["no use"]), torch.randn(N, 7, WIDTH)

    def use(w, y):
        raise ZeroDivisionError

    def again(w, y):
        model.use = OTHERS["no use"]
        return F.linear(y, w) * model(x).mean()

    with lk.capture(model, SMALL):
        model.use = use
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert _get_current_function_mode() is None
        model.use = again
        with pytest.raises(LograError, match="is used outside"):
            loss_of(model, x).backward()
        assert _get_current_function_mode() is None


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_watched(way):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5))
    with lk.capture(model, SMALL) as taps:
        copied = way(model)
        loss_of(copied, torch.randn(N, WIDTH)).backward()
        assert not taps._watch.seen


def test_a_run_stores_nothing_of_such_a_batch_and_says_so_again(tmp_path):
    model, x = Net(USES["transposed"]), torch.randn(N, 7, WIDTH)
    run = lk.Run(tmp_path / "s", model, projection=SMALL)
    for _ in range(2):
        with pytest.raises(LograError, match=r"'first' is used outside.*\(by 'T'\)"), run.log(["a", "b", "c"]):
            loss_of(model, x).backward()
    assert all(p.requires_grad for p in model.parameters())
    assert _get_current_function_mode() is None
    model.use = OTHERS["no use"]
    with run.log(["a", "b", "c"]):
        loss_of(model, x).backward()
    assert len(run.commit()) == N


def test_compiled_models_are_not_compiled_twice(tmp_path):
    model, x = Net(OTHERS["no use"]), torch.randn(N, 7, WIDTH)
    run = lk.Run(tmp_path / "s", model, projection=SMALL)
    compiled = torch.compile(model, backend="eager")
    with run.log(["a", "b", "c"]):
        assert _get_current_function_mode() is None
        loss_of(compiled, x).backward()


def test_compiled_inside():
    model, x = Net(OTHERS["no use"]), torch.randn(N, 7, WIDTH)
    with lk.capture(model, SMALL) as taps:
        taps.reset(N)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for _ in range(2):
            loss_of(compiled, x).backward()
            got = {name: grad.clone() for name, grad in taps.grads.items()}
            taps.reset(N)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert_equal_rows(got, exact_of(model, taps, x))
