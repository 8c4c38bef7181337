"""The accuracy studies: ensembles, the score itself, every curvature against dense fp64 formulas, the whole harness."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import __main__ as program
from accuracy import ensemble, methods, peers, setting, table
from accuracy.curvature import influence
from accuracy.data import Data
from accuracy.gradients import Case
from accuracy.lds import ceiling, estimate, lds, ranks, spearman
from accuracy.session import Session
from accuracy.truth import Truth, truth

TINY = setting.Setting(
    "tiny", train=24, queries=5, widths=(6, 5, 3), epochs=3, batch=7, subsets=6, seeds=2, checkpoints=2
)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(29, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return Data(x[:24], y[:24], x[24:], y[24:])


@pytest.fixture(scope="module")
def found(data):
    return truth(TINY, data, cache=None)


@pytest.fixture
def case(data, found):
    return Case(TINY, data, found.weights, 0)


def test_a_member_is_the_same_model_in_any_company_and_equals_plain_sgd(data):
    rows = torch.stack([torch.arange(12), torch.arange(12, 24), torch.arange(6, 18)])
    together = ensemble.train(TINY, data.x, data.y, rows, [5, 6, 7])
    alone = ensemble.train(TINY, data.x, data.y, rows[1:2], [6])
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[1], one[0], rtol=1e-4, atol=1e-5)

    start = [w[None] for w in ensemble.initial(TINY.shapes, 6)]
    model = ensemble.module(start, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=TINY.lr, momentum=0.9, weight_decay=TINY.weight_decay)
    order = torch.from_numpy(np.random.Generator(np.random.PCG64(6)).permutation(12))
    for i, batch in enumerate(rows[1][order].split(7)):
        optimizer.param_groups[0]["lr"] = TINY.lr * (1 - i / 2)
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
    once = setting.Setting(**{**vars(TINY), "epochs": 1})
    got = ensemble.module(ensemble.train(once, data.x, data.y, rows[1:2], [6]), 0)
    for a, b in zip(got.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_outcome_is_loss_and_log_odds(data, found):
    loss, margin = ensemble.outcome(found.weights, data.query_x, data.query_y)
    logits = ensemble.module(found.weights, 1)(data.query_x).double()
    torch.testing.assert_close(loss[1], F.cross_entropy(logits, data.query_y, reduction="none"), rtol=1e-5, atol=1e-6)
    p = torch.exp(-loss)
    torch.testing.assert_close(margin, (p / (1 - p)).log(), rtol=1e-5, atol=1e-5)


def test_spearman_by_hand():
    assert ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[3.5, 1.0, 3.5, 2.0]]
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 3.0, 2.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(spearman(a, b), torch.tensor([0.8, 0.0], dtype=torch.float64))


def test_a_perfect_linear_datamodel_has_lds_one_and_its_negative_minus_one():
    generator = torch.Generator().manual_seed(0)
    member = torch.rand(12, 20, generator=generator) < 0.5
    value = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    loss = -(member.double() @ value.T)[:, None].repeat(1, 3, 1)
    perfect = Truth(member, loss, -loss, [])
    assert lds(value, perfect).tolist() == pytest.approx([1.0] * 4)
    assert lds(-value, perfect, "margin").tolist() == pytest.approx([-1.0] * 4)
    assert ceiling(perfect).tolist() == pytest.approx([1.0] * 4)


def test_estimate_errors():
    found = estimate(torch.tensor([[0.0, 2.0], [2.0, 4.0]]))
    assert (found.mean, found.se_models, found.se_queries) == pytest.approx((2.0, 1.0, 1.0))
    assert found.se == pytest.approx(2**0.5)


def per_sample(case, which):
    """{layer: [N, d_out, d_in]} fp64, one backward a sample."""
    x, y = (case.data.x, case.data.y) if which == "train" else (case.data.query_x, case.data.query_y)
    weights = {name.removesuffix(".weight"): p for name, p in case.model.named_parameters() if name.endswith("weight")}
    rows = {name: [] for name in weights}
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(case.model(x[i : i + 1]), y[i : i + 1]), list(weights.values()))
        for name, grad in zip(rows, grads, strict=True):
            rows[name].append(grad.double())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def spaces(case):
    return {"none": case.whole(), "pca3": case.pca(3), "gaussian4": case.random("gaussian", 4)}


def test_spaces_hold_projected_per_sample_gradients(case):
    exact = {which: per_sample(case, which) for which in ("train", "query")}
    for name, block in case.whole().items():
        torch.testing.assert_close(block.train.dense().double(), exact["train"][name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(block.query.dense().double(), exact["query"][name], rtol=1e-4, atol=1e-6)
    for name, block in case.pca(3).items():
        q_out, q_in = (torch.linalg.eigh(c)[1].flip(1)[:, :3] for c in case.covariances[name])
        projected = (q_out.T @ exact["train"][name] @ q_in).abs()  # an eigenvector's sign is free
        torch.testing.assert_close(block.train.dense().double().abs(), projected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(block.a, torch.diag(block.a.diagonal()), rtol=0, atol=1e-6 * float(block.a.max()))


def dense_curvature(block, curvature, alpha):
    """H [D, D] fp64 from the definition, on materialised gradients."""
    g = block.train.dense().double()
    flat = g.flatten(1)
    raw = flat.T @ flat / len(g)
    if curvature == "identity":
        return torch.eye(flat.shape[1], dtype=torch.float64)
    if curvature == "raw":
        return raw
    if curvature == "diagonal":
        return torch.diag(raw.diagonal())
    if curvature.startswith("shrunk-"):
        return alpha * raw + (1 - alpha) * dense_curvature(block, curvature.removeprefix("shrunk-"), 1.0)
    if curvature in ("kfac", "ekfac"):
        left, right, scale = block.b, block.a, 1.0
    else:
        left, right = (g @ g.mT).mean(0), (g.mT @ g).mean(0)
        scale = left.trace()
    if curvature in ("kfac", "shampoo"):
        return torch.kron(left, right) / scale
    q = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
    return q @ torch.diag((flat @ q).square().mean(0)) @ q.T


CURVATURES = ("identity", "raw", "kfac", "ekfac", "shampoo", "eshampoo", "diagonal", "shrunk-kfac", "shrunk-eshampoo")


@pytest.mark.parametrize(("curvature", "whole"), list(itertools.product(CURVATURES, (False, True))))
def test_scores_equal_the_dense_formula(case, curvature, whole):
    alpha = 0.3 if curvature.startswith("shrunk-") else 1.0
    for blocks in spaces(case).values():
        for name, block in blocks.items():
            h = dense_curvature(block, curvature, alpha)
            if curvature == "identity":
                lam = 0.0
            elif whole:
                lam = 0.7 * block.whole_mean
            else:
                # a shrunk curvature is damped by the raw Fisher's mean eigenvalue
                base = dense_curvature(block, "raw", 1.0) if alpha != 1.0 else h
                lam = 0.7 * float(base.trace()) / len(h)
            train, query = (side.dense().double().flatten(1) for side in (block.train, block.query))
            solved = torch.linalg.solve(h + lam * torch.eye(len(h), dtype=h.dtype), train.T)
            scores, own = influence(block, curvature, 0.7, whole, alpha, own=True)
            exact = query @ solved
            assert (scores - exact).abs().max() <= 2e-5 * exact.abs().max(), name
            exact = (train * solved.T).sum(1)
            assert (own - exact).abs().max() <= 2e-5 * exact.abs().max(), name


def test_whole_mean_is_the_unprojected_mean_eigenvalue(case):
    for name, block in case.whole().items():
        h = dense_curvature(block, "kfac", 1.0)
        assert block.whole_mean == pytest.approx(float(h.trace()) / len(h))
        assert case.pca(3)[name].whole_mean == pytest.approx(block.whole_mean, rel=1e-5)


def test_relatif_divides_by_the_root_of_self_influence_over_all_layers(case):
    plain, relatif = (methods.Method("raw", "pca", 3, 0.1, mode=mode) for mode in ("dot", "relatif"))
    own = sum(influence(block, "raw", 0.1, False, own=True)[1] for block in case.pca(3).values())
    expected = torch.where(own > 0, plain(case) / own.sqrt(), 0.0)  # a row without gradient scores 0
    torch.testing.assert_close(relatif(case), expected)


@pytest.mark.parametrize(
    ("session", "method"),
    [
        (Session("ekfac", "identity", 0, "0.1", observed=24), methods.Method("ekfac", "none", damping=0.1)),
        (Session("raw", "orthonormal", 3, "0.1"), methods.Method("raw", "orthonormal", 3, 0.1)),
        (Session("kfac", "pca", 3, "1", observed=24), methods.Method("kfac", "pca", 3, 1.0)),
        (Session("shrunk", "pca", 3, "0.1", observed=24), methods.Method("shrunk-shampoo", "pca", 3, 0.1, alpha=0.5)),
    ],
    ids=lambda m: m.name,
)
def test_the_packages_sessions_score_as_the_studys_formulas(case, session, method):
    exact = method(case)
    torch.testing.assert_close(session(case).double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_a_session_leaves_outliers_out(case):
    every, kept = (Session("raw", "orthonormal", 3, "0.1", rows=rows)(case) for rows in ("all", "l2<0.9"))
    gone = (kept == 0).all(0)
    assert 0 < int(gone.sum()) < 6
    torch.testing.assert_close(kept[:, ~gone], every[:, ~gone])


def test_names_in_the_registry_are_their_own():
    found = methods.registry()
    assert all(name == method.name for name, method in found.items())
    assert set(table.REFERENCES) <= set(found)
    assert found["shrunk-kfac(0.5)/pca64/1w"] == methods.Method(
        "shrunk-kfac", "pca", 64, damping=1, whole=True, alpha=0.5
    )


def test_setting_key_depends_on_everything():
    other = {"study": "x", "widths": (6, 4, 3), **{n: 1 for n in vars(TINY) if n not in ("study", "widths")}}
    keys = {setting.Setting(**{**vars(TINY), name: value}).key for name, value in other.items()}
    assert len(keys | {TINY.key}) == len(other) + 1


def test_truth_is_kept_and_read_again(data, tmp_path):
    first = truth(TINY, data, tmp_path)
    again = truth(TINY, data, tmp_path, progress=lambda n: pytest.fail("retrained"))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.member, again.member)
    assert first.member.sum(1).tolist() == [12] * 6
    assert first.loss.shape == (6, 2, 5)


def test_the_program_writes_a_table(data, found, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(program.STUDIES, "digits", TINY)
    monkeypatch.setattr(program, "load", lambda s: data)
    monkeypatch.setattr(program, "truth", lambda s, d, progress: found)
    out = tmp_path / "accuracy.json"
    common = ["--study", "digits", "--out", str(out), "--threads", str(torch.get_num_threads())]
    assert program.main([*common, "--methods", "ekfac/none/*,raw/pca16/0.1"]) == 0
    assert program.main([*common, "--methods", "identity/none"]) == 0  # adds to what is there
    kept = json.loads(out.read_text())
    assert kept["setting"]["key"] == TINY.key
    rows = {row["method"]: row for row in kept["rows"]}
    assert {"identity/none", "raw/pca16/0.1", "ekfac/none/0.1/relatif"} <= set(rows)
    assert all(-1 <= row["lds"] <= 1 and len(row["each_model"]) == 2 for row in rows.values())
    gap, _ = rows["raw/pca16/0.1"]["difference"]["ekfac/none/0.1"]
    assert gap == pytest.approx(rows["raw/pca16/0.1"]["lds"] - rows["ekfac/none/0.1"]["lds"], abs=2e-4)
    printed = capsys.readouterr()
    assert "agreement of one seed" in printed.out
    assert "no --peers interpreter" in printed.err


def test_a_peer_that_is_not_installed_is_said_and_left_out(case, monkeypatch):
    monkeypatch.setattr(peers, "MODULES", {"no-such": "no_such_module"})
    said = []
    assert peers.scores(case, sys.executable, said.append) == {}
    assert "no-such cannot be imported" in said[0]


def test_a_peer_that_fails_is_said_and_left_out(case, monkeypatch):
    monkeypatch.setattr(peers, "MODULES", {"torch": "torch"})  # there, but no peer of ours
    said = []
    assert peers.scores(case, sys.executable, said.append) == {}
    assert said == ["  peers: torch failed: KeyError: 'torch'"]
