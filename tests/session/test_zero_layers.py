"""A layer that nothing reaches, in a session: the others' scores are as if it were not tapped, and it is named once."""

import warnings

import pytest
import torch
from session.models import T, log_all, loss_of, make_data, make_model, observe_all
from torch import nn

import logra_kernels as lk
from logra_kernels.curvature import CURVATURES, Damping
from logra_kernels.errors import LograError

DAMPINGS = [None, 0.5, Damping(relative=0.3), Damping(whole=1.0)]


def ask(run, model):
    with run.query(["q"]) as query:
        loss_of(model, *[part[:1] for part in make_data()]).backward()
    return query


@pytest.mark.filterwarnings("ignore:log. all gradients")
@pytest.mark.parametrize("kind", CURVATURES)
def test_every_curvature_scores_the_other_layers(tmp_path, kind):
    answers = []
    for include in (None, ["2"]):
        model = make_model()
        nn.init.zeros_(model[2].weight)  # nothing reaches the first layer
        options = {"projection": lk.Projection(rank=3), "curvature": kind, "include": include}
        with lk.Run(tmp_path / str(include), model, **options) as run:
            log_all(run)
            observe_all(run)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run.finalize()
                query = ask(run, model)
                found = [run.self_influence()]
                for damping in DAMPINGS:
                    found += [run.scores(query, mode, damping) for mode in ("dot", "relatif", "theta-relatif", "l2")]
                    found.append(run.topk(query, 5, damping=damping).values)
            if include is None:
                parts = run.group_scores(query)
                assert not parts["0"].any()
                torch.testing.assert_close(parts["2"], run.scores(query))
                assert not run.topk(query, 5, layers=True).layers["0"].any()
            said = [str(w.message) for w in caught]
            named = [text for text in said if "all stored gradients of 1 layers are zero ('0')" in text]
            assert len(named) == (include is None and kind != "identity")
            answers.append(found)
    for mine, wanted in zip(*answers, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.filterwarnings("ignore:log. all gradients")
@pytest.mark.parametrize("kind", ["kfac", "fisher", "fisher-fp64"])
def test_what_was_observed_lacks_a_layer_that_rows_have(tmp_path, kind):
    """Its curvature is not known to be small, but not known."""
    model = make_model()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=3), curvature=kind) as run:
        log_all(run)
        first = {name: p.clone() for name, p in model.named_parameters()}
        nn.init.zeros_(model[2].weight)
        observe_all(run)
        model.load_state_dict(first)
        message = "layer '0' that were observed are zero.*run batches that reach the layer inside `with run.observe"
        with pytest.raises(LograError, match=message):
            run.finalize()


@pytest.mark.filterwarnings("ignore:log. all gradients", "ignore:curvature. all stored")
def test_pca_of_a_layer_that_observed_batches_never_reach(tmp_path):
    model = make_model()
    wanted = model[2].weight.detach().clone()
    x, target = make_data()
    nn.init.zeros_(model[2].weight)
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=3, kind="pca")) as run:
        with run.observe():
            loss_of(model, x, target).backward()
        with torch.no_grad():
            model[2].weight.copy_(wanted)
        log_all(run)
        p_in, p_out = run.taps.factors["0"]
        for p in (p_in, p_out):
            torch.testing.assert_close(p @ p.T, torch.eye(3), rtol=1e-5, atol=1e-5)
        assert (p_out != 0).all()  # spread over all features, not some of them
        run.finalize()
        assert run.scores(ask(run, model)).isfinite().all()


class Mixture(nn.Module):
    """Experts of which tokens choose the first or the second."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = transformers.MixtralConfig(hidden_size=6, intermediate_size=4, num_local_experts=3)
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        self.experts = MixtralExperts(config)
        for p in self.experts.parameters():
            nn.init.normal_(p)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        index = (x[..., :1] > 0).long()
        mixed = self.experts(x.flatten(0, 1), index.flatten(0, 1), torch.ones(x.shape[0] * x.shape[1], 1))
        return self.head(mixed.view_as(x))


@pytest.mark.filterwarnings("ignore:curvature. all stored")
@pytest.mark.parametrize("curvature", ["shrunk", "kfac", "ekfac"])
def test_an_expert_that_no_token_comes_to(tmp_path, curvature):
    model = Mixture()
    kinds = ["linear", "expert"]
    with lk.Run(tmp_path / "s", model, kinds=kinds, projection=lk.Projection(2, "pca"), curvature=curvature) as run:
        x, target = make_data()
        with run.observe(offsets=torch.arange(len(x) + 1) * T):
            loss_of(model, x, target).backward()
        log_all(run)
        with run.log(["observed too"], columns={"source": ["s"]}, observe=True):
            loss_of(model, x[:1], target[:1]).backward()
        run.finalize()
        query = ask(run, model)
        parts = run.group_scores(query)
        zero = [name for name, part in parts.items() if not part.any()]
        assert zero == ["experts.gate_up_proj.2", "experts.down_proj.2"]
        torch.testing.assert_close(sum(parts.values()), run.scores(query), rtol=1e-4, atol=1e-5)
