"""What a run warns of, and losses that were scaled."""

import math
import warnings

import pytest
import torch
from torch import nn

import logra_kernels as lk

SMALL = lk.Projection(rank=3)
IDS = ["a", "b", "c"]


def loss_of(model, x):
    return model(x).float().square().sum()


def net(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 4))


def logged(path, model, x, ids=IDS, **settings):
    with lk.Run(path, model, projection=SMALL) as run, run.log(ids, **settings):
        loss_of(model, x).backward()
    return lk.GradientStore.open(path).read(0, len(ids))


def test_batch_norm_of_the_batchs_own_statistics(tmp_path):
    model, x = net(nn.BatchNorm1d(8)), torch.randn(3, 6)
    with pytest.warns(UserWarning, match=r"Run: batch norm uses .*'1'.*call model\.eval\(\)"):
        logged(tmp_path / "train", model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged(tmp_path / "eval", model.eval(), x)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "drop_prob"])
def test_dropout_by_a_function(tmp_path, name):
    """As in BART and OPT, whose modules hold the rate, or as stochastic depth."""
    model, x = net(nn.Tanh()), torch.randn(3, 6)
    setattr(model[1], name, 0.1)
    with pytest.warns(UserWarning, match=r"Run: dropout is on \('1'\).*call model\.eval\(\)"):
        logged(tmp_path / "train", model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logged(tmp_path / "eval", model.eval(), x)


def test_layers_of_zero_gradients_in_the_first_batch(tmp_path):
    """As a fresh LoRA's A beside a B of zeros."""
    model, x = net(), torch.randn(3, 6)
    nn.init.zeros_(model[1].weight)
    with lk.Run(tmp_path / "s", model, projection=SMALL) as run:
        message = r"log: all gradients of 1 layers are exactly zero .*\('0'\)"
        with pytest.warns(UserWarning, match=message), run.log(IDS):
            loss_of(model, x).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with run.log(["d", "e", "f"]):
                loss_of(model, x).backward()
    assert len(run.store) == 6


def test_a_scaled_loss(tmp_path):
    model, x = net(nn.Tanh()), torch.randn(3, 6)
    exact = logged(tmp_path / "plain", model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with lk.Run(tmp_path / "scaled", model, projection=SMALL) as run:
        scaler.scale(torch.ones(()))  # a scaler has its scale from the first loss on
        with run.log(IDS, loss_scale=scaler.get_scale()):
            scaler.scale(loss_of(model, x)).backward()
        with run.query(["q", "r", "s"], loss_scale=2.0**14) as query:
            scaler.scale(loss_of(model, x)).backward()
        for scale in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="loss_scale"), run.query(IDS, loss_scale=scale):
                loss_of(model, x).backward()
    torch.testing.assert_close(run.store.read(0, 3), exact)
    torch.testing.assert_close(query.rows, exact)
