"""PyTorch's own transformer layers and modules of no kind: right rows, or a word about those that are not there."""

import pytest
import torch
from torch import nn

import logra_kernels as lk


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x, padding=None):
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def loss_of(model, x, padding):
    return (model(x, padding).square().sum(-1) * ~padding).sum()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("include", [None, ["head"], ["*.linear1"]])
def test_an_encoder_in_eval_mode_with_frozen_weights(tmp_path, padded, include):
    model, x, padding = Encoder().eval(), torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    if padded:
        padding[1, 3:] = padding[2, 2:] = True
    with lk.Run(tmp_path / "s", model, include, projection=lk.Projection(kind="identity")) as run:
        for batch in range(2):  # the first one is watched, which the fused call would not be taken in either
            with run.log([f"{batch}-{i}" for i in range(4)]):
                loss_of(model, x, padding).backward()
        rows, holders = run.commit().read(0, 8), run.taps.holders
    assert torch.equal(rows[:4], rows[4:])
    assert torch.backends.mha.get_fastpath_enabled()
    assert ("encoder.layers.1.self_attn.in_proj" in holders) == (include is None)
    weights = [adapter.parameters(module)[0] for ((module, adapter),) in holders.values()]
    for i in range(4):
        exact = torch.autograd.grad(loss_of(model, x[i : i + 1], padding[i : i + 1]), weights)
        torch.testing.assert_close(rows[i], torch.cat([g.flatten() for g in exact]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        nn.RNN(8, 4),
        nn.LSTM(8, 4),
        nn.GRUCell(8, 4),
        nn.Bilinear(8, 8, 2),
        nn.ConvTranspose2d(3, 2, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_of_no_kind_are_named_where_every_layer_is_meant(module):
    model = nn.ModuleDict({"odd": module, "fc": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=rf"weights of 1 modules have no part.*'odd' .{type(module).__name__}.; write"):
        assert list(lk.capture(model).layers) == ["fc"]


def test_nothing_is_said_where_layers_are_named(recwarn):
    model = nn.ModuleDict({"odd": nn.LSTM(8, 4), "fc": nn.Linear(8, 8)})
    lk.capture(model, include=["fc"])
    lk.capture(nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8), nn.Conv2d(3, 3, 3)))
    assert not recwarn.list
