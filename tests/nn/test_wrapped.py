"""Layers that other libraries wrap or quantise, tapped as they are: PEFT's LoRA, bitsandbytes, torchao."""

import pytest
import torch
from oracle import assert_equal_rows, projected_autograd
from torch import nn
from torch.nn.utils import prune

import logra_kernels as lk
from logra_kernels.nn import model_fingerprint

SMALL = lk.Projection(rank=4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.head(x + self.down(torch.tanh(self.up(x))))


def data(dtype=torch.float32, n=3, t=7):
    return torch.randn(n, t, 64, dtype=dtype), torch.randn(n, t, 32, dtype=dtype)


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x).float(), target.float(), reduction="sum")


def per_sample(model, x, target):
    return [lambda i=i: loss_of(model, x[i : i + 1], target[i : i + 1]) for i in range(len(x))]


# --- PEFT ---


def lora(model: nn.Module, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["up", "down"], **settings)
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave lora_A without a gradient
            nn.init.normal_(p, std=0.3)
    return model


def test_lora_adapters_and_their_frozen_base_layers():
    model, (x, target) = lora(Net()), data()
    assert not model.base_model.model.up.base_layer.weight.requires_grad
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
    up = "base_model.model.up"
    assert list(taps.layers)[:3] == [f"{up}.base_layer", f"{up}.lora_A.default", f"{up}.lora_B.default"]
    assert len(taps.layers) == 7
    assert_equal_rows(taps.grads, projected_autograd(model, taps, per_sample(model, x, target)))


@pytest.mark.parametrize("include", [None, ["*.lora_*"]])
def test_dora_takes_a_weights_norm_by_way_of_the_identity(include):
    model, (x, target) = lora(Net(), use_dora=True), data()
    taps = lk.capture(model, SMALL, include=include)
    taps.reset(3)
    with taps:
        loss_of(model, x, target).backward()
    assert_equal_rows(taps.grads, projected_autograd(model, taps, per_sample(model, x, target)), rtol=1e-4)


def test_weights_that_are_computed_count_as_they_are_multiplied_with():
    """As weight norm, pruning and all parametrizations have it."""
    model, (x, target) = Net(), data()
    nn.utils.parametrizations.weight_norm(model.up)
    prune.random_unstructured(model.down, "weight", 0.5)
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
    plain = Net()
    with torch.no_grad():
        for name in ("up", "down", "head"):
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
            plain.get_submodule(name).bias.copy_(model.get_submodule(name).bias)
    assert_equal_rows(taps.grads, projected_autograd(plain, taps, per_sample(plain, x, target)), rtol=1e-4)


def test_lora_alone_in_a_run(tmp_path):
    """Attribution in the space of what was trained; everything else is frozen."""
    model, (x, target) = lora(Net()), data()
    with lk.Run(tmp_path / "s", model, include=["*.lora_*"], projection=lk.Projection(rank=4)) as run:
        assert run.verify(lambda part: loss_of(model, x[part], target[part]), samples=3).ok
        with run.log(["a", "b", "c"]):
            loss_of(model, x, target).backward()
    with lk.capture(model, SMALL, include=["*.lora_*"]) as taps:
        exact = projected_autograd(model, taps, per_sample(model, x, target))
    stored = lk.GradientStore.open(tmp_path / "s").read(0, 3)
    got = {name: stored[:, part].reshape(exact[name].shape) for name, part in run.store.slices.items()}
    assert_equal_rows(got, exact)


# --- quantised weights ---


class Beside(nn.Module):
    """A layer and a zero weight beside it: y = layer(x) + Z x, so that autograd's dZ is the layer's dW."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(torch.zeros(layer.out_features, layer.in_features))

    def forward(self, x):
        return self.layer(x) + (x.float() @ self.weight.T).to(x.dtype)


def check_quantised(model, x, target, rtol, names=("up", "down", "head")):
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
    assert tuple(taps.layers) == names
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    layers = {name: model.get_submodule(name) for name in names}
    for name in names:
        setattr(model, name, Beside(layers[name]))
    for loss in per_sample(model, x, target):
        grads = torch.autograd.grad(loss(), [getattr(model, name).weight for name in names])
        for name, dw in zip(names, grads, strict=True):
            p_in, p_out = (p.double() for p in taps.factors[name])
            rows[name].append(p_out @ dw.double() @ p_in.T)
    for name in names:
        setattr(model, name, layers[name])
    assert_equal_rows(taps.grads, {name: torch.stack(parts) for name, parts in rows.items()}, rtol)


def fingerprint_follows_the_weights(model):
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    with torch.no_grad():
        model.head.bias += 1
    assert model_fingerprint(model) != before


def bitsandbytes_model(kind: str):
    bnb = pytest.importorskip("bitsandbytes")
    model = Net()
    for name in ("up", "down", "head"):
        old = getattr(model, name)
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type=kind, compute_dtype=torch.float32)
        new.load_state_dict(old.state_dict())
        setattr(model, name, new.to("cpu"))  # quantises
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_bitsandbytes(kind):
    model, (x, target) = bitsandbytes_model(kind), data()
    assert not model.up.weight.is_floating_point()
    check_quantised(model, x, target, rtol=1e-4)
    fingerprint_follows_the_weights(model)


def test_lora_on_a_four_bit_model():
    model, (x, target) = lora(bitsandbytes_model("nf4")), data()
    with lk.capture(model, SMALL, include=["*.lora_*"]) as taps:
        loss_of(model, x, target).backward()
    assert_equal_rows(taps.grads, projected_autograd(model, taps, per_sample(model, x, target)), rtol=1e-4)
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
    assert len(taps.grads) == 7


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 in int8"])
def test_torchao_weight_only(kind):
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int4": quantization.Int4WeightOnlyConfig,
        "int4 in int8": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[kind]
    model = Net() if kind == "int8" else Net().bfloat16()
    quantization.quantize_(model, config())
    model.requires_grad_(False)
    x, target = data(torch.float32 if kind == "int8" else torch.bfloat16)
    # bf16 rounds dy on its way down by sample and in the batch alike; what differs is the oracle's own dZ
    check_quantised(model, x, target, rtol=1e-4 if kind == "int8" else 2e-2)
    fingerprint_follows_the_weights(model)


def test_a_quantised_model_in_a_run(tmp_path):
    model, (x, target) = bitsandbytes_model("nf4"), data()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=4)) as run:
        report = run.verify(lambda part: loss_of(model, x[part], target[part]), samples=3)
        assert report.ok, report
        assert any("quantised" in note for note in report.notes)
        with run.log(["a", "b", "c"]):
            loss_of(model, x, target).backward()
        with run.query(["q"]) as query:
            loss_of(model, x[1:2], target[1:2]).backward()
        torch.testing.assert_close(query.rows, run.stored(["b"]).rows, rtol=1e-4, atol=1e-5)
