"""Fused mixtures of experts as transformers ships them: each expert's gradient for each sample, against autograd."""

import pytest
import torch
from oracle import assert_equal_rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import logra_kernels as lk

transformers = pytest.importorskip("transformers")
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts  # noqa: E402

SMALL = lk.Projection(rank=4)
COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=4),
    "qwen3": lambda: transformers.Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2
    ),
}


def make(name: str, implementation: str = "eager"):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    model.config._experts_implementation = implementation
    with torch.no_grad():  # the initial weights are so small that every expert would do nothing
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def lm_loss(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1].double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def exact_rows(model, taps, losses):
    """{layer: [N, k_out, k_in]} of the untapped model, by autograd of every sample's loss."""
    holders = {name: held[0] for name, held in taps.holders.items()}
    parameters = list({id(p): p for module, adapter in holders.values() for p in adapter.parameters(module)}.values())
    rows = {name: [] for name in holders}
    for loss in losses:
        grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
        of = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)}
        for name, (module, adapter) in holders.items():
            found = [of[id(p)] for p in adapter.parameters(module)]
            if adapter.kind == "expert":
                found = [p[adapter.expert] for p in found]
                found[0] = found[0].T if module.is_transposed else found[0]
            dw = torch.cat([found[0], found[1][:, None]], 1) if adapter.bias else found[0]
            p_in, p_out = (p.double() for p in taps.factors[name])
            rows[name].append(p_out @ dw.double() @ p_in.T)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def assert_close(got, exact, rtol=2e-5):
    """As `assert_equal_rows`, where some samples send an expert no token."""
    assert list(got) == list(exact)
    some = 0
    for name in exact:
        hit = exact[name].flatten(1).norm(dim=1) > 0
        assert not got[name][~hit].any()
        some += int((~hit).sum())
        if hit.any():
            assert_equal_rows({name: got[name][hit]}, {name: exact[name][hit]}, rtol)
    return some


def per_sample(model, ids):
    return [lambda i=i: lm_loss(model, ids[i : i + 1]) for i in range(len(ids))]


@pytest.mark.parametrize(
    ("name", "implementation", "bias"),
    [
        ("mixtral", "eager", False),
        ("qwen3", "grouped_mm", False),
        ("gpt-oss", "eager", True),
        ("gpt-oss", "grouped_mm", False),
    ],
)
def test_models(name, implementation, bias):
    model, ids = make(name, implementation), torch.randint(0, 40, (3, 7))
    plain = lm_loss(model, ids)
    exact_taps = lk.capture(model, SMALL, kinds=["linear", "expert"], bias=bias)
    exact = exact_rows(model, exact_taps, per_sample(model, ids))
    with lk.capture(model, SMALL, kinds=["linear", "expert"], bias=bias) as taps:
        taps.reset(3)
        loss = lm_loss(model, ids)
        loss.backward()
        assert "model.layers.1.mlp.experts.down_proj.3" in taps.layers
    torch.testing.assert_close(loss, plain)
    assert assert_close(taps.grads, exact) > 0, "some expert must go without a token of some sample"
    assert taps.rows().shape == (3, sum(o * i for o, i in taps.layers.values()))
    torch.testing.assert_close(lm_loss(model, ids), plain, rtol=0, atol=0)
    assert "forward" not in vars(model.model.layers[0].mlp.experts)


def test_frozen_weights_weights_of_positions_and_filters():
    model, ids = make("mixtral"), torch.randint(0, 40, (3, 7))
    weights = (torch.rand(3, 7) > 0.4).float()

    def masked(ids, weights):
        logits = model(ids, use_cache=False).logits.double()
        return (nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * weights).sum()

    include = ["*.1.mlp.experts.gate_up_proj.*", "*.1.mlp.experts.down_proj.0"]
    options = {"include": include, "kinds": ["expert"]}
    losses = [lambda i=i: masked(ids[i : i + 1], weights[i : i + 1]) for i in range(3)]
    exact = exact_rows(model, lk.capture(model, SMALL, **options), losses)  # the last layer's positions see themselves
    model.requires_grad_(False)
    with lk.capture(model, SMALL, **options) as taps:
        taps.reset(3, weights=weights)
        masked(ids, torch.ones(3, 7)).backward()
    assert len(taps.layers) == 5
    assert_close(taps.grads, exact)
    assert all(p.grad is None for p in model.parameters())


def experts_of(cls, **config):
    config = transformers.PretrainedConfig(**config)
    config._experts_implementation = "eager"
    module = cls(config)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


MODULES = {
    "gated": lambda: experts_of(
        MixtralExperts, num_local_experts=4, hidden_size=10, intermediate_size=6, hidden_act="silu"
    ),
    "biased and transposed": lambda: experts_of(
        GptOssExperts, num_local_experts=4, hidden_size=10, intermediate_size=6, swiglu_alpha=1.7, swiglu_limit=7.0
    ),
    "normed": lambda: experts_of(
        MuseSparkExperts,
        num_local_experts=4,
        moe_hidden_size=10,
        moe_intermediate_size=6,
        hidden_act="silu",
        post_norm_eps=1e-6,
    ),
    "not gated": lambda: experts_of(
        NemotronHExperts,
        n_routed_experts=4,
        hidden_size=10,
        moe_latent_size=None,
        moe_intermediate_size=6,
        mlp_hidden_act="relu2",
    ),
}


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        self.experts, self.checkpointed = experts, checkpointed

    def forward(self, x, index, weights):
        flat = x.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1)
        if self.checkpointed:
            return checkpoint(self.experts, *flat, use_reentrant=False).view_as(x)
        return self.experts(*flat).view_as(x)


def routed(n=3, t=5, k=2, experts=4):
    """Expert 3 gets nothing."""
    index = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(n * t)]).view(n, t, k)
    return torch.randn(n, t, 10, requires_grad=True), index, torch.rand(n, t, k)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_each_form_of_experts_alone(name, checkpointed):
    model, batch = Mixture(MODULES[name](), checkpointed), routed()
    target = torch.randn(3, 5, 10)

    def loss(part):
        return nn.functional.mse_loss(model(*(v[part] for v in batch)), target[part], reduction="sum")

    exact = exact_rows(
        model, lk.capture(model, SMALL, kinds=["expert"]), [lambda i=i: loss(slice(i, i + 1)) for i in range(3)]
    )
    (dx,) = torch.autograd.grad(loss(slice(0, 3)), batch[:1])
    with lk.capture(model, SMALL, kinds=["expert"]) as taps:
        taps.reset(3)
        loss(slice(0, 3)).backward()
    assert len(taps.layers) == 8
    assert assert_close(taps.grads, exact) >= 6
    torch.testing.assert_close(batch[0].grad, dx)


def test_packed_documents():
    model, (x, index, weights) = Mixture(MODULES["gated"]()), routed()
    cuts = [0, 4, 4, 9, 15]
    flat = [v.flatten(0, 1)[None] for v in (x, index, weights)]
    losses = [lambda a=a, b=b: model(*(v[:, a:b] for v in flat)).square().sum() for a, b in ((0, 4), (4, 9), (9, 15))]
    exact = exact_rows(model, lk.capture(model, SMALL, kinds=["expert"]), losses)
    with lk.capture(model, SMALL, kinds=["expert"]) as taps:
        taps.reset(offsets=torch.tensor(cuts))
        model(x, index, weights).square().sum().backward()
    assert not any(grad[1].any() for grad in taps.grads.values())
    assert_close({name: grad[[0, 2, 3]] for name, grad in taps.grads.items()}, exact)


@pytest.mark.parametrize("limits", [{"offsets": torch.arange(4) * 7}, {"batch_size": 3, "sequence_length": 7}])
def test_a_shared_expert_that_sees_flattened_tokens_needs_the_samples_limits(limits):
    config = transformers.Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=10,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    torch.manual_seed(1)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 40, (3, 7))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    exact = exact_rows(model, lk.capture(model, SMALL, kinds=["linear", "expert"]), per_sample(model, ids))
    with lk.capture(model, SMALL, kinds=["linear", "expert"]) as taps:
        with pytest.raises(ValueError, match=r"sees 21 samples where 3 were begun.*give sequence_length"):
            lm_loss(model, ids).backward()
        taps.reset(**limits)
        lm_loss(model, ids).backward()
    assert "model.layers.0.mlp.shared_expert.up_proj" in taps.layers
    assert_close(taps.grads, exact)


def test_in_a_run(tmp_path):
    """Stored, verified, found again by another session, and observed for KFAC."""
    model, ids = make("mixtral"), torch.randint(0, 40, (4, 7))
    options = {"kinds": ["expert"], "projection": lk.Projection(rank=2), "curvature": "kfac"}
    with lk.Run(tmp_path / "s", model, **options) as run:
        report = run.verify(lambda part: lm_loss(model, ids[part]), samples=3)
        assert report.ok, report
        assert report.error < 1e-3
        with run.log(["a", "b", "c", "d"]):
            lm_loss(model, ids).backward()
        with run.observe(offsets=torch.arange(5) * 7):
            lm_loss(model, ids).backward()
    with lk.Run(tmp_path / "s", model) as run:
        assert len(run.taps.layers) == 2 * 2 * 4
        with run.query(["q"]) as query:
            lm_loss(model, ids[1:2]).backward()
        torch.testing.assert_close(query.rows, run.store.read(1, 2), rtol=1e-4, atol=1e-5)


def test_misuse_is_an_error_that_says_what_to_do():
    model, batch = Mixture(MODULES["gated"]()), routed()
    with lk.capture(model, SMALL, kinds=["expert"]) as taps:
        with pytest.raises(ValueError, match=r"get 15 tokens of all samples.*None samples.*taps.reset\(batch_size\)"):
            model(*batch)
        taps.reset(4)
        with pytest.raises(ValueError, match="15 tokens of all samples side by side, and 4 samples were begun"):
            model(*batch)
        taps.reset(offsets=torch.tensor([0, 14]))
        with pytest.raises(ValueError, match="offsets end at 14 and the experts of 'experts.gate_up_proj.0' get 15"):
            model(*batch)
        taps.reset(3, weights=torch.ones(3, 4))
        with pytest.raises(ValueError, match=r"weights \(3, 4\) do not fit the 15 tokens"):
            model(*batch)
        taps.reset(3)
        with (
            taps.tokens(torch.randn(1, taps_dim(taps))),
            pytest.raises(ValueError, match=r"layer 'experts.gate_up_proj.0' has its rows cut by experts.*exclude="),
        ):
            model(*batch)
        with taps.covariances(sharing="reduce"), pytest.raises(ValueError, match="not cut by samples"):
            model(*batch)
        with pytest.raises(Exception, match="run the model itself"):
            torch.compile(model, fullgraph=True, backend="eager")(*batch)


def taps_dim(taps):
    return sum(o * i for o, i in taps.layers.values())
