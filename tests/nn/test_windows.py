"""Vision models that cut samples into windows: [N * W, T, d], with another W in each stage."""

import pytest
import torch
from torch import nn

import logra_kernels as lk

transformers = pytest.importorskip("transformers")


def swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(config)


def mobilevit():
    config = transformers.MobileViTConfig(
        image_size=32,
        hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 4, 8, 8, 12, 12, 16],
        num_attention_heads=2,
        num_labels=5,
    )
    return transformers.MobileViTForImageClassification(config)


@pytest.mark.parametrize("make", [swin, mobilevit])
def test_rows_are_each_samples_own(make, tmp_path):
    torch.manual_seed(0)
    model, x, y = make().eval(), torch.randn(3, 3, 32, 32), torch.randint(0, 5, (3,))

    for p in model.parameters():  # the initial weights are so small that little comes through
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)

    def loss(part):
        return nn.functional.cross_entropy(model(pixel_values=x[part]).logits.double(), y[part], reduction="sum")

    with lk.capture(model, lk.Projection(rank=4)) as taps:
        with pytest.raises(ValueError, match="sees 12 samples where 3 were begun.*'any' where it cuts samples into"):
            loss(slice(0, 3)).backward()
        taps.reset(3, sequence_length="any")
        loss(slice(0, 3)).backward()
    reached = 0
    for i in range(3):
        for name, ((module, adapter),) in taps.holders.items():
            p_in, p_out = taps.factors[name]
            (dw,) = torch.autograd.grad(loss(slice(i, i + 1)), adapter.parameters(module))
            exact = p_out @ adapter.matrix([dw]) @ p_in.T
            size = exact.abs().max().item()
            reached += size > 1e-9
            torch.testing.assert_close(taps.grads[name][i], exact, rtol=1e-3, atol=1e-9 + 1e-3 * size)
    assert reached > 2 * len(taps.layers)  # of three times as many
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=4, kind="pca")) as run:
        with run.observe(sequence_length="any"):
            loss(slice(0, 3)).backward()
        with run.log(["a", "b", "c"], sequence_length="any"):
            loss(slice(0, 3)).backward()
        run.finalize()
        assert run.self_influence().isfinite().all()


def test_another_word_is_none():
    with lk.capture(nn.Linear(3, 3)) as taps, pytest.raises(ValueError, match="'all'; it must be a number or 'any'"):
        taps.reset(2, sequence_length="all")
