"""The summed loss against torch's cross entropy, and how much memory it takes beside the logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from logra_kernels.integrations import next_token
from logra_kernels.integrations.next_token import summed_nll

N, T, V, IGNORED = 3, 7, 11, -100


def _labels():
    labels = torch.randint(V, (N, T))
    labels[0, 4:] = IGNORED
    labels[1, :3] = IGNORED
    labels[2] = IGNORED
    return labels


def _defined(logits, labels):
    each = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(len(labels), -1).sum(dim=1)


@pytest.fixture(params=[1, 3, 1000], ids=lambda rows: f"{rows}rows")
def at_a_time(request, monkeypatch):
    monkeypatch.setitem(next_token._BYTES, "cpu", request.param * V * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_is_the_cross_entropy(at_a_time, dtype):
    labels, weights = _labels(), torch.rand(N, dtype=torch.float64)
    logits = (4 * torch.randn(N, T, V)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    nll, wanted = summed_nll(logits, labels, IGNORED), _defined(exact, labels)
    assert nll.dtype is torch.promote_types(dtype, torch.float32)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(nll.double(), wanted, **tolerance)
    (nll * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert logits.grad.dtype is dtype
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype)
    if step is not None:
        tolerance = {"rtol": step, "atol": 1e-6}
    torch.testing.assert_close(logits.grad.double(), exact.grad, **tolerance)
    assert not logits.grad[2].any()
    assert not logits.grad[:, -1].any()


def test_of_logits_that_are_a_view():
    labels = _labels()
    whole = torch.randn(T, N, 2 * V, dtype=torch.float64, requires_grad=True)
    logits = whole.transpose(0, 1)[:, :, ::2]
    summed_nll(logits, labels, IGNORED).sum().backward()
    grad, whole.grad = whole.grad, None
    _defined(whole.transpose(0, 1)[:, :, ::2], labels).sum().backward()
    torch.testing.assert_close(grad, whole.grad)


def test_nothing_predicted():
    logits = torch.randn(N, T, V, requires_grad=True)
    nll = summed_nll(logits, torch.full((N, T), IGNORED), IGNORED)
    assert torch.equal(nll, torch.zeros(N))
    nll.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(N, T, V))


def test_nan_stays_where_it_is(at_a_time):
    labels = _labels()
    logits = torch.randn(N, T, V)
    clean = summed_nll(logits, labels, IGNORED)
    logits[0, 1, 2] = float("nan")
    logits[0, 5] = logits[2] = float("inf")  # not predicted
    logits.requires_grad_()
    nll = summed_nll(logits, labels, IGNORED)
    assert nll[0].isnan()
    assert torch.equal(nll[1:], clean[1:])
    nll.sum().backward()
    assert logits.grad[0, 1].isnan().all()
    assert logits.grad[0, 2:].isfinite().all()
    assert logits.grad[1:].isfinite().all()


class _Made(TorchDispatchMode):
    """How many storages of at least `bytes` are made."""

    def __init__(self, bytes):
        super().__init__()
        self.bytes, self.seen = bytes, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() >= self.bytes:
                self.seen.add(one.untyped_storage().data_ptr())
        return out


def test_one_tensor_beside_the_logits(monkeypatch):
    monkeypatch.setitem(next_token._BYTES, "cpu", 4 * V)
    logits, labels = torch.randn(N, T, V, requires_grad=True), _labels()
    at_hand = logits.detach().untyped_storage().data_ptr()
    with _Made(logits.nbytes // 2) as made:
        nll = summed_nll(logits, labels, IGNORED)
        assert not made.seen - {at_hand}
        nll.sum().backward()
        assert len(made.seen - {at_hand}) == 1
