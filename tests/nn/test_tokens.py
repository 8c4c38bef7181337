"""Token shares: every position's part, against one-position autograd, and their sum against the whole gradient."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import logra_kernels as lk
from logra_kernels.errors import LograError

N, T, Q = 3, 7, 2
SMALL = lk.Projection(rank=4)
ALL = ["linear", "conv", "embedding", "norm"]


class TinyTransformer(nn.Module):
    """Tied embedding and head, one block used twice, causal attention, a convolution over positions."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 8, padding_idx=padding)
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.mlp = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.wte.weight

    def block(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + torch.relu_(self.mlp(x)) + self.conv(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, ids):
        return self.head(self.block(self.block(self.wte(ids))))


def lm_loss(model, ids, mask=None):
    nll = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nll if mask is None else nll * mask.flatten()).sum()


def both(model, ids, projection=SMALL, weights=None, f=lm_loss, **options):
    """(rows [N, D], what they are multiplied with [Q, D], shares [Q, N, T])."""
    with lk.capture(model, projection, **options) as taps:
        taps.reset(weights=weights)
        f(model, ids).backward()
        rows = taps.rows()
        m = torch.randn(Q, rows.shape[1], dtype=rows.dtype)
        taps.reset(weights=weights)
        with taps.tokens(m) as tokens:
            f(model, ids).backward()
        assert taps.mode is None
    return rows, m, tokens


@pytest.mark.parametrize("kind", ["orthonormal", "identity"])
@pytest.mark.parametrize("padding", [None, 3])
def test_shares_add_up_for_every_kind_of_layer_tied_and_reused(kind, padding):
    model, ids = TinyTransformer(padding).double(), torch.randint(0, 20, (N, T + 1))
    ids[0, :3] = 3
    rows, m, tokens = both(model, ids, lk.Projection(rank=4, kind=kind), kinds=ALL, bias=True)
    assert list(tokens.layers) == ["wte", "qkv", "out", "norm", "conv", "mlp"]
    assert tokens.shares.shape == (Q, N, T)
    torch.testing.assert_close(tokens.shares.sum(-1), m @ rows.T, rtol=1e-10, atol=1e-10)


def test_fp32_masked_positions_to_1e_4():
    model, ids = TinyTransformer(), torch.randint(0, 20, (N, T + 1))
    mask = torch.ones(N, T)
    mask[0, 4:], mask[2, 6:] = 0, 0
    rows, m, tokens = both(model, ids, kinds=ALL, f=lambda model, ids: lm_loss(model, ids, mask))
    exact = m.double() @ rows.double().T
    assert float((tokens.shares.sum(-1) - exact).abs().max()) <= 1e-4 * float(exact.abs().max())
    assert not tokens.shares[:, 0, 6:].any(), "position 3 is the last that counts, and two convolutions look 2 ahead"


def test_each_share_is_the_gradient_of_that_position_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, target = torch.randn(N, T, 6).double(), torch.randn(N, T, 3).double()
    _, m, tokens = both(model, x, f=lambda model, x: ((model(x) - target) ** 2).sum())
    with lk.capture(model, SMALL) as taps:
        for t in range(T):
            taps.reset()
            ((model(x[:, t]) - target[:, t]) ** 2).sum().backward()
            torch.testing.assert_close(tokens.shares[:, :, t], m @ taps.rows().T, rtol=1e-9, atol=1e-9)


def test_weighted_positions_count_by_weight_even_where_they_are_nan():
    model, (x, target) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, N, T, 6)
    target = target[..., :3]
    weights = torch.rand(N, T)
    weights[1, 3:] = 0
    x = torch.where(weights[..., None] == 0, torch.nan, x)
    rows, m, tokens = both(model, x, weights=weights, f=lambda model, x: ((model(x) - target) ** 2).nan_to_num().sum())
    torch.testing.assert_close(tokens.shares.sum(-1), m @ rows.T, rtol=1e-4, atol=1e-4)
    assert not tokens.shares[:, 1, 3:].any()


def test_checkpointed_blocks():
    class Checkpointed(TinyTransformer):
        def block(self, x):
            return checkpoint(super().block, x, use_reentrant=False)

    rows, m, tokens = both(Checkpointed().double(), torch.randint(0, 20, (N, T + 1)), kinds=ALL)
    torch.testing.assert_close(tokens.shares.sum(-1), m @ rows.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("whole", [True, False])
def test_bf16_model_and_autocast(whole):
    model, ids = TinyTransformer(), torch.randint(0, 20, (N, T + 1))

    def autocast_loss(model, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not whole):
            logits = model(ids[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    rows, m, tokens = both(model.bfloat16() if whole else model, ids, kinds=ALL, f=autocast_loss)
    assert tokens.shares.dtype == torch.float32
    exact = m @ rows.T
    assert float((tokens.shares.sum(-1) - exact).abs().max()) <= 2e-3 * float(exact.abs().max())


def test_layers_with_other_positions_than_others():
    """A classifier behind a pooling, and images: each layer has its own shares, and some of them can be summed."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Flatten(1), nn.Linear(T * 8, 3)).double()
    x = torch.randn(N, T, 6).double()
    with lk.capture(model, SMALL) as taps:
        model(x).square().sum().backward()
        rows, widths = taps.rows(), [o * i for o, i in taps.layers.values()]
        m = torch.randn(2, rows.shape[1]).double()
        taps.reset()
        with taps.tokens(m) as tokens:
            model(x).square().sum().backward()
    parts = [a @ b.T for a, b in zip(m.split(widths, 1), rows.split(widths, 1), strict=True)]
    for part, exact in zip(tokens.layers.values(), parts, strict=True):
        torch.testing.assert_close(part.sum(-1), exact)
    assert [part.shape[-1] for part in tokens.layers.values()] == [T, T, 1]
    torch.testing.assert_close(tokens.of(["0", "2"]).sum(-1), parts[0] + parts[1])
    with pytest.raises(ValueError, match=r"positions of a sample, 7 \('0'\), 1 \('4'\).*tokens.of"):
        _ = tokens.shares
    for patterns in (["0", "5"], []):
        with pytest.raises(ValueError, match="match none of 0, 2, 4"):
            tokens.of(patterns)


def test_pixels_are_positions():
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)).double(),
        torch.randn(N, 3, 5, 6).double(),
    )
    with lk.capture(model, SMALL) as taps:
        model(x).square().sum().backward()
        rows = taps.rows()
        m = torch.randn(2, rows.shape[1]).double()
        for weights in (None, torch.ones(N, 12)):
            taps.reset(N, weights)
            with taps.tokens(m) as tokens:
                model(x).square().sum().backward()
            assert tokens.shares.shape == (2, N, 12)
            torch.testing.assert_close(tokens.shares.sum(-1), m @ rows.T)


def test_a_layer_of_queries_and_of_the_keys_of_another_sequence():
    model, x, z = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(N, T, 8), torch.randn(N, 4, 8)
    with lk.capture(model, SMALL) as taps:
        model(x.double(), z.double(), z.double())[0].square().sum().backward()
        rows = taps.rows()
        m = torch.randn(2, rows.shape[1]).double()
        taps.reset()
        with taps.tokens(m) as tokens:
            model(x.double(), z.double(), z.double())[0].square().sum().backward()
    assert [part.shape for part in tokens.layers.values()] == [(2, N, T + 4), (2, N, T)]
    torch.testing.assert_close(sum(part.sum(-1) for part in tokens.layers.values()), m @ rows.T)


def test_misuse_is_an_error_that_says_what_to_do():
    model = nn.Sequential(nn.Linear(6, 8))
    with lk.capture(model, SMALL) as taps:
        with pytest.raises(ValueError, match=r"rows \(2, 5\) must be \[Q, 16\]"), taps.tokens(torch.randn(2, 5)):
            pass
        with taps.tokens(torch.randn(2, 16)) as tokens, pytest.raises(LograError, match="1 of 1 layers received no"):
            _ = tokens.shares
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        taps.reset(N)
        with taps.tokens(torch.randn(2, 16)), pytest.raises(Exception, match="run the model itself"):
            compiled(torch.randn(N, T, 6))


def test_parameters_as_a_matrix():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(transformers.Conv1D(8, 6), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(1, T, 6)
    with lk.capture(model, lk.Projection(kind="identity"), bias=True, in_graph=True) as taps:
        loss = model(x).square().sum()
        for name, probe in taps.probes.items():
            ((module, adapter),) = taps.holders[name]
            grads = torch.autograd.grad(loss, [*adapter.parameters(module), probe], retain_graph=True)
            torch.testing.assert_close(adapter.matrix(list(grads[:-1])), grads[-1][0])
