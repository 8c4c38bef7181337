"""run.verify: what is wrong with a model, a loss or the filters is said in words, and what is right passes."""

import pytest
import torch
from torch import nn

import logra_kernels as lk

N, T = 4, 5
KINDS = ["linear", "conv", "embedding", "norm"]


def net(*middle) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def data(*shape):
    return torch.randn(*(shape or (N, T)), 6), torch.randn(*(shape or (N, T)), 3)


def squared(model, x, target, reduction="sum"):
    return lambda part: nn.functional.mse_loss(model(x[part]), target[part], reduction=reduction)


def check(tmp_path, model, loss, **options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=3), **options) as run:
        report = run.verify(loss, samples=N)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model was changed"
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not (tmp_path / "s").exists()
    return report


def one_problem(report, *words):
    assert not report.ok
    assert len(report.problems) == 1, str(report)
    for word in words:
        assert word in report.problems[0], report.problems[0]
    assert "1 problem" in str(report)


def test_a_sound_model_passes(tmp_path):
    model = net(nn.LayerNorm(8))
    report = check(tmp_path, model, squared(model, *data()), kinds=["linear", "norm"], bias=True)
    assert report.ok, str(report)
    assert report.notes == []
    assert report.error < 1e-5
    assert report.layers == 3
    assert "4 samples, 3 layers: captured gradients equal one-sample autograd" in str(report)


def test_frozen_weights_and_half_precision_pass(tmp_path):
    model = net().requires_grad_(False)
    assert check(tmp_path, model, squared(model, *data())).ok
    model = net().bfloat16()
    assert check(tmp_path, model, squared(model, *(v.bfloat16() for v in data()))).ok


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.conv = nn.Embedding(20, 8, padding_idx=3), nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.block, self.norm = nn.Linear(8, 8), nn.RMSNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.block(torch.tanh(self.block(x)))))


def test_tied_and_reused_layers_are_fine_and_said(tmp_path):
    model, ids = LanguageModel(), torch.randint(0, 20, (N, T))
    report = check(tmp_path, model, lambda part: model(ids[part]).square().sum(), kinds=KINDS, bias=True)
    assert report.ok, str(report)
    assert report.notes == [
        "layer 'wte' shares its weight with 1 more: their gradients are summed as one",
        "layer 'block' is used 2 times in a forward: its gradients are summed",
    ]
    assert "note: layer 'block'" in str(report)


def test_a_tied_copy_that_is_not_tapped_is_said(tmp_path):
    model, ids = LanguageModel(), torch.randint(0, 20, (N, T))
    report = check(tmp_path, model, lambda part: model(ids[part]).square().sum(), include=["head", "conv"])
    assert report.ok, str(report)
    assert len(report.notes) == 1
    assert "layer 'head' shares its weight with 'wte', which is not tapped" in report.notes[0]


def test_batch_mean_and_token_mean(tmp_path):
    model, (x, target) = net(), data()
    one_problem(check(tmp_path, model, squared(model, x, target, "mean")), "mean over the batch", "(4)")
    counted = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])

    def token_mean(part):
        return ((model(x[part]) - target[part]).square().sum(-1) * counted[part]).sum() / counted[part].sum()

    one_problem(check(tmp_path, model, token_mean), "divided by something of the whole batch", "0.0909 to 0.455")


def test_batch_mean_in_half_precision_and_a_sample_without_loss(tmp_path):
    model, (x, target) = net().bfloat16(), (v.bfloat16() for v in data())
    one_problem(check(tmp_path, model, squared(model, x, target, "mean")), "mean over the batch")
    model, (x, target) = net(), data()
    counted = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def skips_one(part):
        return ((model(x[part]) - target[part]).square().sum((1, 2)) * counted[part]).sum()

    assert check(tmp_path, model, skips_one).ok


def test_dropout(tmp_path):
    model = net(nn.Dropout(0.5))
    report = check(tmp_path, model, squared(model, *data()))
    assert "dropout is on ('1'), so gradients are random: call model.eval()" in report.problems[0]
    model.eval()
    assert check(tmp_path, model, squared(model, *data())).ok
    model = net().train()
    model.attention_dropout = 0.5  # a rate that a function is given, as transformers' models have them
    assert "dropout is on (''), so gradients are random" in check(tmp_path, model, squared(model, *data())).problems[0]
    hidden = net()

    def noisy(part):
        return nn.functional.dropout(hidden(torch.ones(part.stop - part.start, T, 6))).square().sum()

    one_problem(check(tmp_path, hidden, noisy), "something is random")


def test_batch_norm_in_train_mode_mixes_samples(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.norm(self.a(x).transpose(1, 2)).transpose(1, 2)))

    model, (x, target) = Net(), data()
    one_problem(check(tmp_path, model, squared(model, x, target)), "batch norm", "('norm')", "model.eval()")
    model.eval()
    assert check(tmp_path, model, squared(model, x, target)).ok


def test_a_contrastive_loss_couples_samples(tmp_path):
    model, (x, _) = net(), data()

    def contrastive(part):
        z = nn.functional.normalize(model(x[part]).mean(1), dim=-1)
        return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="sum")

    one_problem(check(tmp_path, model, contrastive), "samples are coupled", "contrastive")


def test_a_layer_without_gradient(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare, self.cut = net(), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.net(x)
            return y + 0 * self.cut(y)

    model = Net()
    report = check(tmp_path, model, squared(model, *data()))
    one_problem(report, "no gradient to 2 layers ('spare', 'cut'): exclude them")
    assert check(tmp_path, model, squared(model, *data()), exclude=["spare", "cut"]).ok


def test_layers_whose_weights_the_model_uses_itself(tmp_path):
    """As vision transformers do that put a bias together; a layer that begins as zeros stops those before it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.qkv, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(nn.functional.linear(self.first(x).tanh(), self.qkv.weight, self.qkv.bias))

    torch.manual_seed(0)
    model, (x, target) = Own(), data()
    report = check(tmp_path, model, squared(model, x, target))
    one_problem(report, "uses the weights of 1 layers ('qkv') without calling the layers", "exclude them")
    assert check(tmp_path, model, squared(model, x, target), exclude=["qkv"]).ok
    nn.init.zeros_(model.head.weight)
    report = check(tmp_path, model, squared(model, x, target), exclude=["qkv"])
    one_problem(report, "no gradient to 1 layers ('first')", "weights begin as zeros")


def test_samples_not_in_dimension_0(tmp_path):
    model = net()
    for t in (T, N):  # as many positions as samples looks right to the taps
        x, target = data(t, N)
        loss = lambda part, x=x, y=target: (model(x[:, part]) - y[:, part]).square().sum()  # noqa: E731
        one_problem(check(tmp_path, model, loss), "layer '0' gets an input", "not in dimension 0")


def test_a_weight_used_outside_its_layer(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x))) + nn.functional.linear(x, self.b.weight)))

    model = Net()
    one_problem(check(tmp_path, model, squared(model, *data())), "layer 'b'", "differ from autograd", "outside")


def test_what_a_loss_may_not_be(tmp_path):
    model, (x, target) = net(), data()
    one_problem(check(tmp_path, model, lambda part: model(x[part])), "loss(slice(0, 4)) gave a tensor (4, 5, 3)")
    one_problem(check(tmp_path, model, lambda part: 1.0), "gave a float")
    one_problem(check(tmp_path, model, lambda part: model(x[part]).sum() * torch.nan), "is nan")
    one_problem(check(tmp_path, model, lambda part: model(x[part]).sum().detach()), "the loss has no gradient")
    one_problem(check(tmp_path, model, lambda part: model(x[part] @ x).sum()), "loss(slice(0, 4)) failed: ")
    with lk.Run(tmp_path / "s", model) as run, pytest.raises(ValueError, match="takes at least 2"):
        run.verify(squared(model, x, target), samples=1)


class Flattening(nn.Module):
    """As OPT: its second layer gets the positions of all samples as one batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("length", [T, "any"])
def test_samples_and_positions_that_the_model_flattens(tmp_path, length):
    model = Flattening()
    loss = squared(model, *data())
    one_problem(check(tmp_path, model, loss), "'b' gets an input (20, 8) for 4 samples and (5, 8)", "sequence_length=5")
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=3)) as run:
        report = run.verify(loss, samples=N, sequence_length=length)
        assert report.ok, str(report)
        assert report.error < 1e-5
        one_problem(run.verify(loss, samples=N, sequence_length=4), "sequence_length=5")


def test_an_encoder_of_pytorchs_with_padding(tmp_path):
    """Without gradients and in eval mode it makes a nested tensor, whose layers have no shape to look at."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1), "head": nn.Linear(6, 3)}).eval()
    x, padding = torch.randn(N, T, 6), torch.zeros(N, T, dtype=torch.bool)
    padding[1, 3:] = True

    def loss(part):
        h = model["encoder"](x[part], src_key_padding_mask=padding[part])
        return (model["head"](h).square().sum(-1) * ~padding[part]).sum()

    report = check(tmp_path, model, loss, include=["head", "*.linear1"])
    assert report.ok, str(report)


def test_autocast_inside_of_the_loss(tmp_path):
    model, (x, target) = net(), data()

    def loss(part):
        with torch.autocast("cpu", torch.bfloat16):
            return (model(x[part]).float() - target[part]).square().sum()

    report = check(tmp_path, model, loss)
    assert report.ok, str(report)
    assert report.error > 1e-3, "it must be more than an fp32 model is allowed"


def test_experts_without_a_token_are_no_problem(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=64,
    )
    torch.manual_seed(0)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 20, (N, T))

    def loss(part):
        return model(ids[part], use_cache=False).logits.square().sum()

    report = check(tmp_path, model, loss, kinds=["linear", "expert"])
    assert report.ok, str(report)
    assert any("no token of these samples came to" in note for note in report.notes)
