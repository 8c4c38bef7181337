"""Documents packed in token rows: one gradient each from one pass, against autograd of every document by itself."""

from itertools import pairwise

import pytest
import torch
from oracle import assert_equal_rows, projected_autograd
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import logra_kernels as lk

pytestmark = pytest.mark.usefixtures("each_device")
SMALL = lk.Projection(rank=4)
CUTS = [0, 5, 5, 9, 16, 24]  # over 2 token rows of 12; the second is empty, the fourth runs on into the second row
ALL = ["linear", "conv", "embedding", "norm"]


class Net(nn.Module):
    """Every kind of layer, and nothing that lets positions see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.norm = nn.Embedding(20, 8, padding_idx=0), nn.LayerNorm(8)
        self.up, self.mix, self.head = nn.Linear(8, 12), nn.Conv1d(12, 8, 1, groups=2), nn.Linear(8, 20, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.norm(self.wte(ids))
        return self.head(x + torch.tanh(self.mix(torch.tanh(self.up(x)).transpose(1, 2))).transpose(1, 2))


def token_loss(model, ids, target):
    """The loss of each position, [B, T]."""
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), target.flatten(), reduction="none").view(ids.shape)


def data():
    return torch.randint(0, 20, (2, 12)), torch.randint(0, 20, (2, 12))


def one_by_one(model, taps_of, ids, target, weights):
    """{layer: [N, k_out, k_in]} from every document that is not empty alone, as one token row without offsets."""
    rows = []
    for a, b in (cut for cut in pairwise(CUTS) if cut[0] < cut[1]):
        with taps_of() as taps:
            part = slice(a, b)
            loss = token_loss(model, ids.flatten()[None, part], target.flatten()[None, part])
            (loss * weights.flatten()[None, part]).sum().backward()
        rows.append(taps.grads)
    return {name: torch.cat([row[name] for row in rows]).double() for name in rows[0]}


@pytest.mark.parametrize("kind", ["orthonormal", "identity"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_kind_of_layer_and_weights_of_positions(kind, weighted, dtype):
    model, (ids, target) = Net(), data()
    weights = torch.rand(2, 12) if weighted else torch.ones(2, 12)
    weights[0, 6:8] = 0 if weighted else 1

    def taps_of():
        return lk.capture(model, lk.Projection(rank=4, kind=kind), kinds=ALL, bias=True)

    exact = one_by_one(model, taps_of, ids, target, weights)
    with taps_of() as taps:
        taps.reset(weights=weights if weighted else None, offsets=torch.tensor(CUTS, dtype=dtype))
        token_loss(model, ids, target).sum().backward()
    assert list(taps.grads) == ["wte", "norm", "up", "mix"]
    for name, grad in taps.grads.items():
        assert not grad[1].any(), "an empty document has no gradient"
        assert_equal_rows({name: grad[[0, 2, 3, 4]]}, {name: exact[name]})


def test_against_autograd_and_probes_and_frozen_weights():
    model, x, target = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(2, 12, 6), None
    target = torch.randn(2, 12, 5)

    def loss_of(a, b):
        return nn.functional.mse_loss(model(x.flatten(0, 1)[a:b]), target.flatten(0, 1)[a:b], reduction="sum")

    model.requires_grad_(False)
    with lk.capture(model, SMALL, in_graph=True) as taps:
        taps.reset(offsets=torch.tensor([0, 5, 9, 16, 24]))
        loss = nn.functional.mse_loss(model(x), target, reduction="sum")
        grads = torch.autograd.grad(loss, list(taps.probes.values()))
    losses = [lambda a=a, b=b: loss_of(a, b) for a, b in ((0, 5), (5, 9), (9, 16), (16, 24))]
    assert_equal_rows(dict(zip(taps.probes, grads, strict=True)), projected_autograd(model, taps, losses))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_limits_on_the_host_are_checked_once_for_all_layers(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).cuda()
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append(self.device.type), tolist(self))[1])
    with lk.capture(model, SMALL) as taps:
        taps.reset(offsets=torch.tensor(CUTS))
        model(torch.randn(2, 12, 6, device="cuda")).square().sum().backward()
    assert len(taps.grads) == 3
    assert reads == ["cpu", "cuda"]


def test_a_layer_that_sees_flattened_positions():
    """Variable-length attention code often runs without a batch dimension."""
    model, (ids, target) = Net(), data()
    grads = []
    for shape in ((2, 12), (1, 24)):
        with lk.capture(model, SMALL, include=["up"]) as taps:
            taps.reset(offsets=torch.tensor(CUTS))
            token_loss(model, ids.view(shape), target.view(shape)).sum().backward()
        grads.append(taps.grads["up"])
    flat = nn.Sequential(model.up)
    with lk.capture(flat, SMALL) as taps:
        taps.reset(offsets=torch.tensor(CUTS))
        flat(torch.randn(24, 8)).square().sum().backward()
    torch.testing.assert_close(grads[0], grads[1])
    assert taps.grads["0"].shape == (5, 4, 4)


def test_a_document_of_nan_leaves_its_neighbours_alone():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(2, 12, 6)
    poisoned = x.clone()
    poisoned[0, 5:9] = torch.nan
    rows = []
    for of in (x, poisoned):
        with lk.capture(model, SMALL) as taps:
            taps.reset(offsets=torch.tensor(CUTS))
            model(of).square().sum().backward()
        rows.append(taps.rows())
    assert not rows[1][2].isfinite().any()
    keep = [0, 1, 3, 4]
    assert torch.equal(rows[0][keep], rows[1][keep])


def test_compiled_without_a_graph_break_and_with_other_cuts():
    torch._dynamo.reset()
    model, counter = Net(), CompileCounterWithBackend("aot_eager")
    with lk.capture(model, SMALL, kinds=ALL) as taps:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for cuts in (CUTS, [0, 11, 28], [0, 3, 4, 34], [0, 24, 24, 24, 24]):
            (ids, target), rows = torch.randint(0, 20, (2, 2, cuts[-1] // 2)), []
            for run in (model, compiled):
                taps.reset(offsets=torch.tensor(cuts))
                token_loss(run, ids, target).sum().backward()
                rows.append(taps.rows())
            torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2  # the first numbers of documents and of positions, then any


def test_token_shares_of_a_document_add_up_to_its_score():
    model, (ids, target) = Net().double(), data()
    with lk.capture(model, SMALL, kinds=ALL) as taps:
        taps.reset(offsets=torch.tensor(CUTS))
        token_loss(model, ids, target).sum().backward()
        rows = taps.rows()
        m = torch.randn(2, rows.shape[1], dtype=rows.dtype)
        taps.reset()
        with taps.tokens(m) as tokens:
            token_loss(model, ids, target).sum().backward()
    flat = tokens.shares.flatten(1)
    sums = torch.stack([flat[:, a:b].sum(1) for a, b in pairwise(CUTS)], dim=1)
    torch.testing.assert_close(sums, (m @ rows.T).cpu(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 9, 5, 24]), "offsets decrease from 9 to 5 at document 1"),
        (torch.tensor([2, 24]), "offsets begin at 2; they must begin at 0"),
        (torch.tensor([0, 5, 30]), r"offsets end at 30 and layer 'up' has \(2, 12\) = 24 positions"),
        (torch.tensor([0, 5, 23]), r"offsets end at 23 and layer 'up' has \(2, 12\) = 24 positions"),
        (torch.tensor([0.0, 24.0]), r"offsets \(2,\) torch.float32 must be \[N\+1\] int64"),
        (torch.tensor([[0, 24]]), r"offsets \(1, 2\) torch.int64 must be"),
        (torch.tensor([], dtype=torch.int64), r"offsets \(0,\)"),
    ],
)
def test_bad_offsets_are_named(offsets, message):
    model, (ids, _) = Net(), data()
    with lk.capture(model, SMALL, include=["up"]) as taps, pytest.raises(ValueError, match=message):
        taps.reset(offsets=offsets)
        model(ids).sum().backward()


def test_offsets_that_do_not_fit_samples_or_weights_are_named():
    model, (ids, _) = Net(), data()
    with lk.capture(model, SMALL, include=["up"]) as taps:
        with pytest.raises(ValueError, match="offsets cut 5 documents where 4 samples were begun"):
            taps.reset(4, offsets=torch.tensor(CUTS))
        taps.reset(weights=torch.ones(5, 3), offsets=torch.tensor(CUTS))
        with pytest.raises(ValueError, match=r"weights \(5, 3\) do not fit the \(2, 12\) positions"):
            model(ids).sum().backward()
