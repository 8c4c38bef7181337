"""PyTorch's transformer layers as they are made by default, [T, N, d]: rows are each sample's all the same."""

import pytest
import torch
from torch import nn

import logra_kernels as lk

N, T, S, E = 3, 5, 4, 8
SMALL = lk.Projection(rank=4)


class Classifier(nn.Module):
    """Embeds [N, T] ids, encodes and decodes [T, N, d], and classifies [N, d]; or every position, by `head_at`."""

    def __init__(self, head_at="sample", **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head_at = nn.Embedding(11, E), head_at
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(E, 2, 12, dropout=0.0, **settings), 2, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoderLayer(E, 2, 12, dropout=0.0, **settings)
        self.head = nn.Linear(E, 3)

    def forward(self, ids, asked, padding=None):
        x, z = (self.embedding(one).transpose(0, 1) for one in (ids, asked))
        h = self.encoder(x, src_key_padding_mask=padding)
        y = self.decoder(z, h, memory_key_padding_mask=padding)
        return self.head({"sample": y.mean(0), "position first": y, "sample first": y.transpose(0, 1)}[self.head_at])


def batch_of(n=N, t=T):
    torch.manual_seed(1)
    padding = torch.zeros(n, t, dtype=torch.bool)
    padding[1, t - 2 :] = True
    return torch.randint(0, 11, (n, t)), torch.randint(0, 11, (n, S)), padding


def loss_of(model, batch, part=slice(None)):
    return (model(*(one[part] for one in batch)) ** 3).sum()


def assert_rows(model, taps, batch):
    for i in range(len(batch[0])):
        for name, ((module, adapter),) in taps.holders.items():
            parameters = [p.requires_grad_() for p in adapter.parameters(module)]
            dw = adapter.matrix(list(torch.autograd.grad(loss_of(model, batch, slice(i, i + 1)), parameters)))
            p_in, p_out = taps.factors[name]
            torch.testing.assert_close(taps.grads[name][i], p_out @ dw @ p_in.T)


@pytest.mark.parametrize("t", [T, N])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_are_each_samples(frozen, norm_first, t):
    model = Classifier(norm_first=norm_first).double().eval().requires_grad_(not frozen)
    batch = batch_of(t=t)
    with lk.capture(model, SMALL, kinds=["linear", "norm"], bias=True) as taps:
        loss_of(model, batch).backward()
    assert {"encoder.layers.1.linear1", "encoder.layers.0.norm1", "decoder.multihead_attn.in_proj"} <= set(taps.layers)
    assert_rows(model, taps, batch)


def test_a_run(tmp_path):
    model, batch = Classifier("sample first").double().eval(), batch_of()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=4, kind="pca")) as run:
        with run.observe():
            loss_of(model, batch).backward()
        with run.log(["a", "b", "c"]):
            loss_of(model, batch).backward()
        run.finalize()
        report = run.verify(lambda part: loss_of(model, batch, part), samples=N)
        assert report.ok, str(report)
        assert report.error < 1e-10
        query = run.stored(["b"])
        assert run.topk(query, k=1).ids == [["b"]]
        with run.tokens(query) as tokens:
            loss_of(model, batch).backward()
        parts = sum(part.sum(-1) for part in tokens.layers.values())
        torch.testing.assert_close(parts.float(), run.scores(query), rtol=1e-4, atol=1e-4)


def test_compiled():
    torch._dynamo.reset()
    model, batch = Classifier().eval(), batch_of()
    with lk.capture(model, SMALL) as taps:
        found = []
        for one in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
            taps.reset(N)
            loss_of(one, batch).backward()
            found.append(taps.rows())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_other_layers_that_take_positions_first_are_refused():
    model, batch = Classifier("position first").eval(), batch_of()
    with lk.capture(model, SMALL) as taps:
        taps.reset(N)
        with pytest.raises(ValueError, match=f"'head' sees {S} samples where {N} were begun"):
            loss_of(model, batch).backward()
        taps.reset(S)
        with pytest.raises(ValueError, match=r"'head' got an input \(4, 4, 8\) of as many positions as samples"):
            loss_of(model, batch_of(S)).backward()
    with lk.capture(model, SMALL, exclude=["head"]) as taps:
        loss_of(model, batch_of(S)).backward()
    assert len(taps.grads) == len(taps.layers)


def test_as_many_positions_as_samples_once_they_were_told_apart():
    model = Classifier("sample first").double().eval()
    with lk.capture(model, SMALL) as taps:
        with pytest.raises(ValueError, match="begin with a batch of another size"):
            loss_of(model, batch_of(S)).backward()
        taps.reset()
        loss_of(model, batch_of()).backward()
        taps.reset()
        loss_of(model, batch_of(S)).backward()
    assert_rows(model, taps, batch_of(S))


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_blocks_with_a_forward_of_their_own_are_refused(kind):
    class Own(kind):
        def forward(self, x):
            return self.linear2(self.linear1(x))

    model = nn.Sequential(Own(E, 2, 16, dropout=0.0))
    with pytest.raises(ValueError, match=r"'0.linear1' is in '0', a Own that takes .* has a forward of its own"):
        lk.capture(model)
    assert list(lk.capture(nn.Sequential(Own(E, 2, 16, batch_first=True)), include=["*.linear?"]).layers)


def test_a_sequence_without_samples_is_refused():
    block = nn.TransformerEncoderLayer(E, 2, 12, dropout=0.0).eval()
    with (
        lk.capture(block, include=["linear1"]),
        pytest.raises(ValueError, match=r"'linear1' got an input \(5, 8\) without samples"),
    ):
        block(torch.randn(T, E))
