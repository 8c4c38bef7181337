"""Captured gradients against one-sample autograd, over the ways people run models."""

import weakref

import pytest
import torch
from oracle import assert_equal_rows, projected_autograd
from torch import nn
from torch.utils.checkpoint import checkpoint

import logra_kernels as lk
from logra_kernels.errors import LograError

pytestmark = pytest.mark.usefixtures("each_device")
SMALL = lk.Projection(rank=4)


class Block(nn.Module):
    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


class Net(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(width), Block(width), nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target, reduction="sum")


def data(n: int = 3, t: int = 7, width: int = 12, out: int = 5):
    return torch.randn(n, t, width), torch.randn(n, t, out)


def per_sample(model, x, target, f=loss_of):
    return [lambda i=i: f(model, x[i : i + 1], target[i : i + 1]) for i in range(len(x))]


def check(model, x, target, projection=SMALL, f=loss_of, rtol=1e-5, **filters):
    with lk.capture(model, projection, **filters) as taps:
        f(model, x, target).backward()
    assert_equal_rows(taps.grads, projected_autograd(model, taps, per_sample(model, x, target, f)), rtol)
    return taps


@pytest.mark.parametrize("kind", ["orthonormal", "gaussian", "rademacher", "identity"])
def test_equals_autograd_for_every_projection(kind):
    taps = check(Net(), *data(), lk.Projection(rank=4, kind=kind, seed=3))
    assert taps.rows().shape == (3, sum(o * i for o, i in taps.layers.values()))


def test_inputs_without_and_with_more_position_dimensions():
    check(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(6, 12), torch.randn(6, 5))
    check(Net(), torch.randn(2, 3, 4, 12), torch.randn(2, 3, 4, 5))


def test_fp64_model_gives_fp64():
    model = Net().double()
    taps = check(model, *(v.double() for v in data()), rtol=1e-12)
    assert all(g.dtype == torch.float64 for g in taps.grads.values())


def test_frozen_weights_and_untouched_weight_gradients():
    model, (x, target) = Net(), data()
    loss_of(model, x, target).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    check(model, x, target)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=0, atol=0)
    model.zero_grad()
    model.requires_grad_(False)
    check(model, x, target)
    assert all(p.grad is None for p in model.parameters())


def test_autograd_grad_of_probes():
    model, (x, target) = Net(), data()
    with lk.capture(model, SMALL, in_graph=True) as taps:
        loss = loss_of(model, x, target)
        grads = torch.autograd.grad(loss, list(taps.probes.values()))
    got = dict(zip(taps.probes, grads, strict=True))
    assert_equal_rows(got, projected_autograd(model, taps, per_sample(model, x, target)))


def test_a_module_used_twice():
    class Twice(Net):
        def forward(self, x):
            return self.head(self.first(self.first(x)))

    model = Twice()
    check(model, *data(), include=["first.*", "head"])


def test_two_layers_that_share_a_weight_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(torch.tanh(self.a(x))))

    taps = check(Tied(), *data())
    assert list(taps.layers) == ["a", "head"]


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_activations_after_a_layer(inplace):
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(inplace=inplace), nn.Linear(16, 5))
    check(model, *data())


def test_masked_positions_do_not_count_even_where_they_are_nan():
    model, (x, target) = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)), data()
    mask = torch.ones(3, 7)
    mask[0, 4:], mask[2, :3] = 0, 0

    def masked_loss(model, x, target, mask=mask):
        return (((model(x) - target) ** 2).sum(-1) * mask).nan_to_num().sum()

    losses = [lambda i=i: masked_loss(model, x[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in range(3)]
    with lk.capture(model, SMALL) as taps:
        exact = projected_autograd(model, taps, losses)
        taps.reset(weights=mask)
        poisoned = torch.where(mask[..., None] == 0, torch.nan, x)
        masked_loss(model, poisoned, target).backward()
    assert_equal_rows(taps.grads, exact)


def test_a_mask_leaves_layers_without_positions_as_they_are():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

        def forward(self, x, mask):
            return self.head((torch.tanh(self.token(x)) * mask[..., None]).sum(1))

    model, (x, _) = Pooled(), data()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 4:], mask[2, :3] = False, False
    losses = [lambda i=i: model(x[i : i + 1], mask[i : i + 1]).square().sum() for i in range(3)]
    with lk.capture(model, SMALL) as taps:
        exact = projected_autograd(model, taps, losses)
        taps.reset(weights=mask)
        model(torch.where(mask[..., None], x, 1e9), mask).square().sum().backward()
        assert_equal_rows(taps.grads, exact)
        with taps.covariances() as found:
            taps.reset(weights=mask)
            model(x, mask).square().sum().backward()
        assert [sums.positions for sums in found.layers.values()] == [int(mask.sum()), 3]
        taps.reset(weights=mask.float())
        with pytest.raises(ValueError, match=r"weights \(3, 7\) do not fit the \(3,\) positions of layer 'head'"):
            model(x, mask).square().sum().backward()
    with lk.capture(model.head, SMALL) as taps:  # a mask that fits is one
        taps.reset(weights=torch.tensor([[True], [False], [True]]))
        model.head(torch.randn(3, 16)).square().sum().backward()
    assert taps.grads[""].flatten(1).norm(dim=1).gt(0).tolist() == [True, False, True]


def test_weights_scale_positions():
    model, (x, target) = nn.Linear(12, 5), data()
    weights = torch.rand(3, 7)
    with lk.capture(model, SMALL) as taps:
        taps.reset(weights=weights)
        loss_of(model, x, target).backward()
    losses = [lambda i=i: (((model(x[i]) - target[i]) ** 2).sum(-1) * weights[i]).sum() for i in range(3)]

    class Named(nn.Module):
        get_submodule = staticmethod(lambda _: model)

    with torch.enable_grad():
        dw = torch.stack([torch.autograd.grad(loss(), model.weight)[0] for loss in losses]).double()
    p_in, p_out = (p.double() for p in taps.factors[""])
    assert_equal_rows(taps.grads, {"": p_out @ dw @ p_in.T})


def test_non_reentrant_checkpointing():
    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(self.first, x, use_reentrant=False)
            return self.head(checkpoint(self.second, x, use_reentrant=False))

    model, (x, target) = Checkpointed(), data()
    check(model, x, target)
    model.requires_grad_(False)
    check(model, x, target)


def test_autocast_bf16():
    model, (x, target) = Net(), data(t=33)

    def autocast_loss(model, x, target):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        return nn.functional.mse_loss(y.float(), target, reduction="sum")

    # bf16 has 8 bits: autograd itself rounds dW, x and dy, so equality is to some multiples of 2^-8
    check(model, x, target, f=autocast_loss, rtol=2e-2)


def test_bf16_projection_of_an_fp32_model_is_as_good_as_bf16_matrix_products():
    torch.manual_seed(0)
    model, (x, target) = Net(), data(4, 40)
    with lk.capture(model, SMALL, projection_dtype=torch.bfloat16, bias=True, kinds=["linear", "norm"]) as taps:
        loss_of(model, x, target).backward()
    with lk.capture(model, SMALL, bias=True, kinds=["linear", "norm"]) as wide:
        loss_of(model, x, target).backward()
    dtypes = {name: {p.dtype for p in pair} for name, pair in taps.factors.items()}
    assert dtypes["first.up"] == {torch.bfloat16}
    assert dtypes["first.norm"] == {torch.float32}  # norms and the like keep the model's
    for name, (p_in, _) in taps.factors.items():
        rounded, exact = taps.grads[name], wide.grads[name]
        assert rounded.dtype == torch.float32
        error = (rounded - exact).norm() / exact.norm()
        assert error < (1e-6 if p_in.dtype == torch.float32 else 2e-2), name
        assert p_in.dtype == torch.float32 or error > 1e-5, "nothing was rounded"


def test_fp32_projection_of_a_bf16_model_keeps_the_factors_exact():
    model, (x, target) = Net().bfloat16(), data()
    x, target = x.bfloat16(), target.bfloat16()
    with lk.capture(model, SMALL, projection_dtype=torch.float32) as taps:
        loss_of(model, x, target).backward()
    assert {p.dtype for pair in taps.factors.values() for p in pair} == {torch.float32}
    exact = projected_autograd(model, taps, per_sample(model, x, target))
    assert_equal_rows(taps.grads, exact, 5e-2)


def test_projection_in_another_dtype_is_refused():
    with pytest.raises(ValueError, match="projection_dtype is torch.float16; it must be"):
        lk.capture(Net(), SMALL, projection_dtype=torch.float16)


def test_bf16_projection_under_autocast_and_compile():
    torch.manual_seed(0)
    model, (x, target) = Net(), data()
    taps = lk.capture(model, SMALL, projection_dtype=torch.bfloat16)
    taps.attach()
    taps.active = True
    loss_of(model, x, target).backward()
    eager = taps.rows()
    taps.reset(len(x))
    torch.compile(loss_of, fullgraph=True, backend="aot_eager")(model, x, target).backward()
    torch.testing.assert_close(taps.rows(), eager, rtol=1e-3, atol=1e-3 * eager.abs().max().item())
    taps.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, x, target)
    loss.backward()
    assert (taps.rows() - eager).norm() < 5e-2 * eager.norm()
    taps.detach()


def test_bf16_model():
    model, (x, target) = Net().bfloat16(), data(t=33)
    check(model, x.bfloat16(), target.bfloat16(), rtol=3e-2)


def test_hugging_face_conv1d_and_attention():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=2, vocab_size=40, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 40, (3, 9))

    def lm_loss(model, ids, _):
        logits = model(ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    taps = check(model, ids, ids, f=lm_loss, rtol=2e-5, exclude=["lm_head"])
    assert "transformer.h.0.attn.c_attn" in taps.layers
    assert taps.factors["transformer.h.0.attn.c_attn"][1].shape == (4, 48)


def test_gradients_add_up_until_reset():
    model, (x, target) = Net(), data()
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
        once = taps.rows().clone()
        loss_of(model, x, target).backward()
        torch.testing.assert_close(taps.rows(), 2 * once)
        taps.reset()
        loss_of(model, x, target).backward()
        torch.testing.assert_close(taps.rows(), once)


def test_no_grad_forward_is_untouched_and_hooks_go_away():
    model, (x, _) = Net(), data()
    before = model(x)
    with lk.capture(model, SMALL), torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_filters():
    model = Net()
    assert list(lk.capture(model, SMALL, include=["*.up", "head"]).layers) == ["first.up", "second.up", "head"]
    assert list(lk.capture(model, SMALL, exclude=["first.*"]).layers) == ["second.up", "second.down", "head"]
    with pytest.raises(ValueError, match=r"'\*\.mlp' matches none of the 5 layers \(first\.up"):
        lk.capture(model, SMALL, include=["*.mlp"])
    with pytest.raises(ValueError, match="leave no layer"):
        lk.capture(model, SMALL, include=["head"], exclude=["head"])
    with pytest.raises(ValueError, match="no layer of the kinds"):
        lk.capture(nn.LayerNorm(3))


def test_misuse_is_an_error_that_says_what_to_do():
    model, (x, target) = Net(), data()
    with lk.capture(model, SMALL) as taps:
        with pytest.raises(LograError, match="5 of 5 layers received no gradient"):
            _ = taps.grads
        loss_of(model, x, target).backward()
        with pytest.raises(ValueError, match="sees 2 samples where 3 were begun"):
            model(x[:2]).sum().backward()
        taps.reset(weights=torch.ones(3, 6))
        with pytest.raises(ValueError, match="weights .3, 6. do not fit"):
            model(x).sum().backward()
        taps.reset()
        with pytest.raises(ValueError, match="samples first"):
            model(x[0, 0])


def test_a_layer_the_loss_does_not_reach_is_named():
    model = Net()
    model.spare = nn.Linear(3, 3)
    x, target = data()
    with lk.capture(model, SMALL) as taps:
        loss_of(model, x, target).backward()
    with pytest.raises(LograError, match=r"1 of 6 layers received no gradient \(spare\)"):
        _ = taps.grads


def test_frozen_weights_keep_no_linear_input_alive():
    """Taps hold a = P_in x: k numbers a position and layer, where the gradients of weights need d."""

    class Watched(nn.Module):
        """Gated, with inputs that nobody else holds."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
            self.inputs: list[weakref.ref] = []

        def forward(self, x):
            x = 2 * x
            self.inputs.append(weakref.ref(x))
            h = self.gate(x) + self.up(x)
            self.inputs.append(weakref.ref(h))
            return self.down(h)

    model = Watched()
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        model.inputs.clear()
        with lk.capture(model, SMALL) as taps:
            y = model(torch.randn(3, 7, 12, requires_grad=True))
            assert [x() is None for x in model.inputs] == [frozen, frozen]
            y.sum().backward()
        assert taps.rows().shape == (3, 48)
