"""Copies of a model that is tapped, as an average of weights or a checkpoint makes them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import logra_kernels as lk


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_copy_has_no_taps(way, in_graph):
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3, 7, 6)
    with lk.capture(model, lk.Projection(rank=3), in_graph=in_graph) as taps:
        model(x).square().sum().backward()
        gathered = {name: grad.clone() for name, grad in taps.grads.items()}
        other = COPIES[way](model)
        other.zero_grad()
        other(x[:2]).square().sum().backward()  # another number of samples, which the taps would refuse
    assert all(torch.equal(taps.grads[name], grad) for name, grad in gathered.items())
    model.zero_grad()
    model(x[:2]).square().sum().backward()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.parametrize("way", COPIES)
def test_a_copied_mixture_of_experts(way):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model, ids = transformers.MixtralForCausalLM(config).eval(), torch.randint(0, 40, (3, 7))
    with lk.capture(model, lk.Projection(rank=3), kinds=["expert"]) as taps:
        taps.reset(3)
        model(ids).logits.square().sum().backward()
        gathered = {name: grad.clone() for name, grad in taps.grads.items()}
        other = COPIES[way](model)
        other(ids[:2]).logits.square().sum().backward()
    assert all(torch.equal(taps.grads[name], grad) for name, grad in gathered.items())
    assert next(m for m in other.modules() if hasattr(m, "is_transposed")).forward.__self__ in set(other.modules())
    torch.testing.assert_close(other(ids).logits, model(ids).logits)
