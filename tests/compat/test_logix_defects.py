"""What LogIX 0.1.1 gets wrong and this does not, and what is refused in words."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from compat.test_logix import COVARIANCES, RANK, N, ask, data_of, logged, loss_of, model_of, session, train
from torch import nn

import logra_kernels.compat.logix as logix
from logra_kernels.compat.logix.utils import DataIDGenerator, get_rank, get_world_size
from logra_kernels.errors import LograError, StoreError, StoreMismatch


@pytest.fixture
def case(tmp_path):
    """(run, model, x, y) with nothing logged yet."""
    run, model = session(tmp_path), model_of()
    run.watch(model)
    return run, model, *data_of()


def test_the_papers_setup_fills_the_log(case):
    run, model, x, y = case
    run.setup({"log": "grad"})
    names, log = ask(run, model, x[:3], y[:3])
    assert names == ["q0", "q1", "q2"]
    assert {name: tuple(part["grad"].shape) for name, part in log.items()} == {"0": (3, 6, 7), "2": (3, 5, 6)}
    for i in range(3):
        model.zero_grad()
        loss_of(model, x[i : i + 1], y[i : i + 1]).backward()
        for name, part in log.items():
            torch.testing.assert_close(part["grad"][i], model.get_submodule(name).weight.grad)


def test_no_row_is_lost_to_workers(tmp_path):
    run = logged(tmp_path, model_of(), *data_of(30), logging={"num_workers": 4, "flush_threshold": 100})
    assert [name for name, _ in run.build_log_dataset()] == [f"d{i}" for i in range(30)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", ["random", "pca"])
def test_models_in_16_bits_are_projected(tmp_path, dtype, lora):
    model, (x, y) = model_of().to(dtype), data_of()
    run = logged(tmp_path, model, x.to(dtype), y, lora, "raw")
    found = run.compute_influence_all(ask(run, model, x[:2].to(dtype), y[:2]))["influence"]
    assert found.isfinite().all()
    fine, model = session(tmp_path / "fine"), model.float()
    fine.watch(model)
    fine.add_lora(lora_path=saved(run))
    exact = ask(fine, model, x, y)[1]["0"]["grad"].flatten(1)
    got = run.session.store.read(0, N)[:, : exact.shape[1]]
    assert (got - exact).norm() < 0.05 * exact.norm()


def saved(run):
    run.save_lora()
    return run.log_dir


@pytest.mark.parametrize("hessian", ["raw", "kfac", "ekfac"])
def test_each_call_has_its_own_damping(tmp_path, hessian):
    """LogIX keeps raw's first, adds EKFAC's up, and takes KFAC's default of one layer for all."""
    model, (x, y) = model_of(), data_of()
    with torch.no_grad():
        model[2].weight *= 5  # the layers' eigenvalues are far apart
    run = logged(tmp_path, model, x, y, "none", hessian)
    log = ask(run, model, x[:2], y[:2])
    dampings = (0.5, None, 0.5, 3.0, None)
    first = [run.compute_influence_all(log, damping=damping)["influence"] for damping in dampings]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[4])
    assert not torch.allclose(first[0], first[3], rtol=0.1)
    pairs = [run.compute_influence(log, log, damping=damping)["influence"] for damping in dampings]
    assert torch.equal(pairs[0], pairs[2])
    assert torch.equal(pairs[1], pairs[4])
    run.compute_influence_all(log)
    lambdas = run._project.factor(hessian, None).damping
    assert lambdas["2"] != pytest.approx(lambdas["0"], rel=0.1)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "bf16"), ("float16", "fp16"), ("int8", "int8")])
def test_small_gradients_outlive_small_formats(tmp_path, dtype, stored):
    model, (x, y) = model_of(), data_of()
    run = session(tmp_path, logging={"log_dtype": dtype})
    run.watch(model)
    run.save(True)
    with run(data_id=range(N)):
        (loss_of(model, x, y) * 1e-3).backward()
        exact = torch.cat([part["grad"].flatten(1) for part in run.get_log(copy=True)[1].values()], 1)
    assert 0 < exact.abs().max() < 0.1
    got = run.session.commit().read(0, N)
    assert run.session.store.dtype == stored
    assert (got - exact).norm() < 0.05 * exact.norm()


def test_equal_ids_stay_rows_of_their_own(case):
    run, model, x, y = case
    run.save(True)
    with pytest.warns(UserWarning, match="'a' came before"), run(data_id=["a", "b", "a"]):
        loss_of(model, x[:3], y[:3]).backward()
    with run(data_id=["a", "c", "c"]):
        loss_of(model, x[3:6], y[3:6]).backward()
    run.finalize()
    assert [name for name, _ in run.build_log_dataset()] == ["a", "b", "a#2", "a#3", "c", "c#2"]
    exact = ask(run, model, x[:6], y[:6])[1]
    torch.testing.assert_close(
        run.session.store.read(0, 6), torch.cat([part["grad"].flatten(1) for part in exact.values()], 1)
    )


def test_a_second_init_is_a_session(tmp_path, monkeypatch):
    monkeypatch.setattr("logra_kernels.compat.logix.current._current", None)
    first = logix.init("p", {"root_dir": str(tmp_path)})
    second = logix.init("q", {"root_dir": str(tmp_path)})
    assert isinstance(second, logix.LogIX)
    assert (first.project, second.project) == ("p", "q")


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, dilation=2),
    nn.Conv2d(4, 6, 3, groups=2, padding=1),
    nn.Conv2d(4, 4, 3, groups=4, stride=2),
    nn.Conv1d(4, 5, 3, padding=1),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_convolutions_of_any_kind(tmp_path, conv, lora):
    x = torch.randn(5, 4, 9, 9) if isinstance(conv, nn.Conv2d) else torch.randn(5, 4, 9)
    model = nn.Sequential(conv, nn.Tanh())
    run = session(tmp_path)
    run.watch(model)
    if lora:
        run.add_lora()
    with run(data_id=range(5)):
        model(x).square().sum().backward()
    got = run.get_log()[1]["0"]["grad"]
    p_in, p_out = run.session.taps.factors["0"]
    for sample, found in zip(x, got, strict=True):
        (grad,) = torch.autograd.grad(model(sample[None]).square().sum(), [conv.weight])
        if conv.groups == 1:
            exact = grad.flatten(1)
            exact = exact if p_in is None else p_out @ exact @ p_in.T
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        elif not lora:
            torch.testing.assert_close(found.norm(), grad.norm(), rtol=1e-4, atol=1e-4)
    assert got.abs().sum() > 0


def test_filters_that_match_nothing_say_so(tmp_path):
    run, model = session(tmp_path), model_of()
    with pytest.raises(ValueError, match=r"no layers with 'mlp' in their names.*it has 0, 2"):
        run.watch(model, name_filter=["mlp"])
    with pytest.raises(ValueError, match="no layers of the types Conv2d"):
        run.watch(model, type_filter=[nn.Conv2d])
    run.watch(model, name_filter=["2"])
    with pytest.raises(ValueError, match="no layers of the types Conv2d"):
        run.add_lora(type_filter=[nn.Conv2d])
    run.watch(model, name_filter=["0"])
    assert list(run.session.taps.layers) == ["0", "2"]  # watched again, more of them
    run.add_lora(name_filter=["2"])
    assert list(run.session.taps.layers) == ["2"]


def test_the_model_stays_as_it_was(case):
    run, model, x, y = case
    model[0].bias.requires_grad_(False)
    before, names = [p.requires_grad for p in model.parameters()], list(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    run.watch(model, name_filter=["2"])
    for _ in range(2):
        ask(run, model, x, y)
        assert model[2].weight.grad is not None  # unprojected, weights get their gradients
        assert [p.requires_grad for p in model.parameters()] == before
        run.add_lora()
    with pytest.raises(ZeroDivisionError), run(data_id=["a"]):
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == before
    ask(run, model, x, y)
    run.clear()
    assert list(model.state_dict()) == names
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_the_schedulers_pca_is_pca(tmp_path):
    model, (x, y) = model_of(), data_of()
    run = logged(tmp_path, model, x * torch.linspace(2, 0.1, 7), y, "pca", "raw")
    vectors = torch.linalg.eigh((x * torch.linspace(2, 0.1, 7)).T @ (x * torch.linspace(2, 0.1, 7))).eigenvectors
    cosines = (run.session.taps.factors["0"][0] * vectors.flip(1)[:, :RANK].T).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(RANK), rtol=0, atol=1e-3)
    fresh = session(tmp_path / "fresh")
    fresh.config.lora.init = "pca"
    fresh.watch(model)
    with pytest.raises(LograError, match="learned from covariances"):
        fresh.add_lora()


def test_queries_do_not_change_what_was_gathered(case):
    """LogIX adds test gradients to the covariance, after it was normalised."""
    run, model, x, y = case
    run.save(True)
    run.setup({**COVARIANCES, "grad": ["log", "covariance"]})
    train(run, model, x, y)
    run.finalize()
    log = ask(run, model, x[:2] * 9, y[:2])
    found = [run.compute_influence_all(log, hessian=hessian)["influence"] for hessian in ("raw", "kfac")]
    for _ in range(3):
        ask(run, model, x * 9, y)
    for hessian, first in zip(("raw", "kfac"), found, strict=True):
        assert torch.equal(run.compute_influence_all(log, hessian=hessian)["influence"], first)
    assert len(run.build_log_dataset()) == N
    before = run.build_log_dataloader()
    assert len(before.dataset) == N
    run.watch(model)  # what is watched already stays as it is
    run.save(True)
    train(run, model, *data_of(seed=8), names="more")
    assert len(run.build_log_dataset()) == 2 * N
    for loader, count in ((before, N), (run.build_log_dataloader(), 2 * N), (before, N)):
        got = run.compute_influence_all(log, loader, mode="cosine", hessian="raw")["influence"]
        assert got.shape == (2, count)
    torch.testing.assert_close(run.compute_influence_all(log, before, hessian="raw")["influence"], found[0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"grad": ["log", "variance"]}, "'variance' of 'grad' is not had here: take it of the stored rows"),
        ({"forward": ["mean"]}, "'mean' of 'forward' is not had here"),
        ({"forward": ["log"]}, "'log' of 'forward' is not had here: only gradients are logged"),
        ({"grad": ["log", "hessian"]}, "unknown plugin 'hessian'"),
        ({"gard": ["log"]}, "unknown key 'gard'"),
        ({"log": "activations"}, "log is 'activations'"),
        ({"stat": "shampoo"}, "statistic is 'shampoo'"),
        ({"save": "forward"}, "save is 'forward'"),
        ({"grad": ["covariance", "corrected_eigval"]}, "ask for one of them"),
    ],
)
def test_what_setup_refuses(case, asked, message):
    with pytest.raises(ValueError, match=message):
        case[0].setup(asked)


def test_what_else_is_refused(case, tmp_path):
    run, model, x, y = case
    with pytest.raises(LograError, match="no gradients were logged"):
        run.get_log()
    with pytest.raises(StoreError, match="log training rows first"):
        run.build_log_dataloader()
    for call in (lambda: run.log(["a"]), lambda: run.watch_activation({})):
        with pytest.raises(LograError, match="logix:"):
            call()
    for ids in ("abc", 3):
        with pytest.raises(ValueError, match="one id for each sample"):
            run(data_id=ids)
    with pytest.raises(LograError, match=r"with run\(data_id"), run:
        pass
    with pytest.raises(LograError, match=r"end\(\) without start\(\)"):
        run.end()
    run.start(["a", "b"])
    with pytest.raises(LograError, match="inside of another"):
        run.start(["a", "b"])
    run.start(["a", "b"])
    loss_of(model, x[:2], y[:2]).backward()
    with pytest.raises(LograError, match="too late"):
        run.end(save=True)
    log = ask(run, model, x[:2], y[:2])
    with pytest.raises(LograError, match="log training rows first"):
        run.compute_self_influence(log, hessian="raw")
    torch.testing.assert_close(
        run.compute_self_influence(log, precondition=False)["influence"],
        sum(part["grad"].square().sum((1, 2)) for part in log[1].values()),
    )
    with pytest.warns(UserWarning, match="no statistics were set up"):
        run.compute_self_influence(log)
    for options, message in (
        ({"mode": "max"}, "mode is 'max'"),
        ({"hessian": "diagonal"}, "hessian is 'diagonal'"),
        ({"influence_groups": ["attn"]}, "the influence group 'attn' is in no layer's name"),
    ):
        with pytest.raises(ValueError, match=message):
            run.compute_influence(log, log, **({"hessian": "none"} | options))
    for bad, message in (((log[0][:1], log[1]), "no gradient"), (log[1]["0"], "a log is")):
        with pytest.raises(ValueError, match=message):
            run.compute_influence(log, bad, hessian="none")
    with pytest.raises(ValueError, match="gives no logs"):
        run.compute_influence_all(log, [], hessian="none")
    with pytest.raises(ValueError, match="lora is 'svd'"):
        logix.LogIXScheduler(run, lora="svd")
    with pytest.raises(LograError, match="no model is watched"):
        session(tmp_path).add_lora()


def test_kfac_without_covariances_says_how_to_get_them(case):
    run, model, x, y = case
    run.save(True)
    train(run, model, x, y)
    log = ask(run, model, x[:2], y[:2])
    with pytest.raises(LograError, match="has no covariances"):
        run.compute_influence_all(log, hessian="kfac")


def test_rows_of_another_projection_are_not_mixed_in(tmp_path):
    model, (x, y) = model_of(), data_of()
    logged(tmp_path, model, x, y, "random")
    run = session(tmp_path)
    run.config.lora.rank = 3
    run.watch(model)
    run.add_lora()
    run.save(True)
    with pytest.raises(StoreMismatch, match="projection"):
        train(run, model, x, y)


def test_configuration(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text(f"root_dir: {tmp_path}\nlogging:\n  log_dtype: float16\nlora:\n  init: pca\n  rank: 3\n")
    run = logix.LogIX("p", str(file))
    assert (run.get_lora_config().init, run.get_lora_config().rank) == ("pca", 3)
    assert run.get_logging_config().dtype == "fp16"
    assert run.log_dir == str(tmp_path / "p")
    run.set_lora_config(logix.LoRAConfig(rank=5))
    assert run.config.lora.rank == 5
    assert logix.LogIX("p", logging_config=logix.LoggingConfig(log_dtype="int8")).get_logging_config().dtype == "int8"
    for given, message in (
        ({"rootdir": "."}, "config has no key 'rootdir'"),
        ({"lora": {"ranks": 3}}, "config lora has no key 'ranks'"),
        ({"lora": {"rank": 0}}, "rank is 0"),
        ({"lora": {"init": "svd"}}, "init is 'svd'"),
        ({"lora": {"parameter_sharing": True}}, "factors of its own"),
        ({"logging": {"log_dtype": "float64"}}, "log_dtype is 'float64'"),
        ({"influence": {"damping": 1}}, "give mode= and damping="),
    ):
        with pytest.raises(ValueError, match=message):
            logix.LogIX("p", given)
    with pytest.warns(UserWarning, match="other.yaml is missing"):
        assert logix.LogIX("p", tmp_path / "other.yaml").config.lora.rank == 64
    for text, message in (("- a", "no table of keys"), ("a: [", "is not YAML")):
        file.write_text(text)
        with pytest.raises(LograError, match=message):
            logix.LogIX("p", file)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(LograError, match="needs PyYAML"):
        logix.LogIX("p", file)


def test_ids():
    x = torch.randn(3, 4)
    assert DataIDGenerator()(x) == DataIDGenerator()(x.numpy())
    assert len(set(DataIDGenerator()(x.bfloat16()))) == 3
    count = DataIDGenerator("index")
    assert count(x) + count(x[:2]) == ["0", "1", "2", "3", "4"]
    with pytest.raises(ValueError, match="mode is 'uuid'"):
        DataIDGenerator("uuid")
    with pytest.raises(ValueError, match="a sample is a str"):
        DataIDGenerator()(["a"])
    assert (get_rank(), get_world_size()) == (0, 0)


def test_ids_of_tensors_and_numbers(case):
    run, model, x, y = case
    run.save(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with run(data_id=x[:2]):
            loss_of(model, x[:2], y[:2]).backward()
        with run(data_id=torch.arange(2)):
            loss_of(model, x[:2], y[:2]).backward()
    assert run.session.commit().ids == [*DataIDGenerator()(x[:2]), "0", "1"]
    assert Path(run.log_dir).is_dir()
