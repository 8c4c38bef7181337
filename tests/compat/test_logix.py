"""LogIX's names on top of a run: against what LogIX 0.1.1 scored, and against the definitions in fp64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import logra_kernels.compat.logix as logix
from logra_kernels.compat import import_logix
from logra_kernels.compat.logix.statistic import Covariance, Log
from logra_kernels.compat.logix.utils import DataIDGenerator, merge_logs
from logra_kernels.errors import LograError, StoreMismatch

PEER = Path(__file__).parent / "scored_by_logix"  # by hand: LogIX's log of 30 rows of an MLP, damping 0.05
N, Q, RANK = 24, 3, 4
COVARIANCES = {"forward": ["covariance"], "backward": ["covariance"]}


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).eval()


def data_of(n=N, seed=1, positions=()):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *positions, 7, generator=generator)
    return x, torch.randint(0, 5, (n, *positions), generator=generator)


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum")


def session(place, **config):
    return logix.LogIX("p", {"root_dir": str(place), "lora": {"rank": RANK}, **config})


def train(run, model, x, y, names="d", **options):
    """A pass over the data."""
    for start in range(0, len(x), 10):
        part = slice(start, start + 10)
        with run(data_id=[f"{names}{i}" for i in range(*part.indices(len(x)))], **options):
            loss_of(model, x[part], y[part]).backward()


def ask(run, model, x, y):
    with run(data_id=[f"q{i}" for i in range(len(x))]):
        loss_of(model, x, y).backward()
    return run.get_log()


def logged(place, model, x, y, lora="none", hessian="none", **config):
    run = session(place, **config)
    run.watch(model)
    for _ in logix.LogIXScheduler(run, lora=lora, hessian=hessian, save="grad"):
        train(run, model, x, y)
        run.finalize()
    return run


@pytest.mark.parametrize("hessian", ["none", "raw", "kfac"])
def test_scores_are_those_of_logix(tmp_path, hessian):
    peer = {key: torch.from_numpy(value) for key, value in np.load(PEER / "expected.npz").items()}
    model = model_of()
    model.load_state_dict({key.removeprefix("model/"): value for key, value in peer.items() if "model/" in key})
    run = session(tmp_path)
    run.watch(model)
    run.add_lora(lora_path=PEER)
    for _ in logix.LogIXScheduler(run, hessian=hessian, save="grad"):
        train(run, model, peer["x"], peer["y"])
    run.finalize()
    log = ask(run, model, peer["queries"], peer["answers"])
    theirs = peer[f"rows/{hessian}"]  # layers in the order of the backward
    torch.testing.assert_close(log[1]["2"]["grad"].flatten(1), theirs[:, :16], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log[1]["0"]["grad"].flatten(1), theirs[:, 16:], rtol=1e-5, atol=1e-6)
    options = {"damping": 0.05, "hessian": "none" if hessian == "none" else "auto"}
    for mode in ("dot", "cosine", "l2"):
        got = run.compute_influence_all(log, mode=mode, **options)
        assert got["src_ids"] == ["q0", "q1", "q2"]
        assert got["tgt_ids"] == [f"d{i}" for i in range(30)]
        wanted = peer[f"{hessian}/{mode}"]
        torch.testing.assert_close(got["influence"], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    own = run.compute_self_influence(log, **options)
    torch.testing.assert_close(own["influence"], peer[f"{hessian}/own"], rtol=1e-5, atol=1e-6)
    if hessian == "raw":
        groups = run.compute_influence_all(log, mode="cosine", influence_groups=["2"], **options)["influence"]
        assert list(groups) == ["total", "2"]
        torch.testing.assert_close(groups["2"], peer["raw/group"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(groups["total"], peer["raw/cosine"], rtol=1e-4, atol=1e-5)


def sides(model, x, y):
    """Layer name -> (x [N, T, d_in], dy [N, T, d_out]), each sample by itself, in fp64."""
    double = model_of().double()
    double.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    found = {"0": ([], []), "2": ([], [])}
    for sample, label in zip(x.double(), y, strict=True):
        h = double[0](sample).requires_grad_()
        hidden = torch.tanh(h)
        out = double[2](hidden)
        loss = nn.functional.cross_entropy(out.reshape(-1, 5), label.reshape(-1), reduction="sum")
        dh, dout = torch.autograd.grad(loss, [h, out])
        for name, left, right in (("0", sample, dh), ("2", hidden.detach(), dout)):
            found[name][0].append(left.reshape(-1, left.shape[-1]))
            found[name][1].append(right.reshape(-1, right.shape[-1]))
    return {name: (torch.stack(left), torch.stack(right)) for name, (left, right) in found.items()}


def defined(run, model, train_data, query_data, hessian, damping):
    """(dot [Q, N], self-influence [N]) in fp64."""
    dot, own = 0, 0
    rows, queries = sides(model, *train_data), sides(model, *query_data)
    for name, (p_in, p_out) in run.session.taps.factors.items():
        a, b = (s if p is None else s @ p.double().T for s, p in zip(rows[name], (p_in, p_out), strict=True))
        c, d = (s if p is None else s @ p.double().T for s, p in zip(queries[name], (p_in, p_out), strict=True))
        g, q = (torch.einsum("nto,nti->noi", *pair).flatten(1) for pair in ((b, a), (d, c)))
        count = a.shape[0] * a.shape[1]
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        kron = torch.kron(b.T @ b / count, a.T @ a / count) * (count / len(g))
        if hessian == "raw":
            h = g.T @ g / len(g)
        elif hessian == "kfac":
            h = kron
        else:
            u = torch.kron(torch.linalg.eigh(b.T @ b).eigenvectors, torch.linalg.eigh(a.T @ a).eigenvectors)
            h = u @ (g @ u).square().mean(0).diag() @ u.T
        if hessian == "none":
            solved = q, g
        else:
            lam = 0.1 * h.trace() / len(h) if damping is None else damping
            solved = tuple(torch.linalg.solve(h + lam * torch.eye(len(h), dtype=h.dtype), r.T).T for r in (q, g))
        dot, own = dot + solved[0] @ g.T, own + (solved[1] * g).sum(1)
    return dot, own


@pytest.mark.parametrize("hessian", ["none", "raw", "kfac", "ekfac"])
@pytest.mark.parametrize("lora", ["none", "random", "pca"])
def test_scores_are_as_defined(tmp_path, lora, hessian):
    model, data, asked = model_of(), data_of(positions=(3,)), data_of(Q, 2, (3,))
    run = logged(tmp_path, model, *data, lora, hessian)
    log, loader = ask(run, model, *asked), run.build_log_dataloader(batch_size=7)
    if lora != "none":
        assert {k for pair in run.session.taps.layers.values() for k in pair} == {RANK}
    for damping in (None, 0.3, None):
        dot, own = defined(run, model, data, asked, hessian, damping)
        exact = {"dot": dot, "cosine": dot / own.sqrt(), "l2": dot - own / 2}
        for mode, wanted in exact.items():
            options = {"mode": mode, "damping": damping, "hessian": "none" if hessian == "none" else "auto"}
            for given in (loader, list(loader), None):
                got = run.compute_influence_all(log, given, **options)["influence"]
                torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
            pair = run.compute_influence(log, next(iter(loader)), **options)["influence"]
            torch.testing.assert_close(pair.double(), wanted[:, :7], rtol=0, atol=2e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(
        run.compute_influence_all(log, precondition=False)["influence"].double(),
        defined(run, model, data, asked, "none", None)[0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_modules_own_functions(tmp_path, monkeypatch):
    monkeypatch.setattr("logra_kernels.compat.logix.current._current", None)
    with pytest.raises(RuntimeError, match="call logix.init"):
        logix.get_log()
    monkeypatch.chdir(tmp_path)  # without a config.yaml
    model, (x, y), names = model_of(), data_of(), DataIDGenerator()
    run = logix.init("p")
    logix.watch(model, type_filter=[nn.Linear], name_filter=["2"])
    logix.setup({"grad": ["log", Covariance]})
    logix.save(True)
    for start in range(0, N, 8):
        logix.start(data_id=names(x[start : start + 8]))
        loss_of(model, x[start : start + 8], y[start : start + 8]).backward()
        logix.end()
    logix.finalize()
    with run(data_id=["q"]) as inside:
        loss_of(model, x[:1], y[:1]).backward()
        early = inside.get_log(copy=True)
    ids, log = logix.get_log()
    assert ids == early[0] == ["q"]
    assert torch.equal(log["2"]["grad"], early[1]["2"]["grad"])
    assert list(log) == ["2"]
    found = logix.compute_influence_all()
    assert found["tgt_ids"] == DataIDGenerator()(x)
    assert (tmp_path / "logix" / "p").is_dir()
    saved = run.influence.compute_influence_all(logix.get_log(), logix.build_log_dataloader(), save=True)
    run.influence.compute_influence_all(merge_logs([logix.get_log()] * 2), logix.build_log_dataloader(), save=True)
    assert run.influence.get_influence_scores()["src_ids"] == ["q"] * 3
    torch.testing.assert_close(run.influence.influence_scores["influence"], saved["influence"].expand(3, -1))


PAPER = [
    ({"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}, {"grad": [Log, Covariance]}, "raw"),
    ({"stat": "kfac", "save": "grad"}, {**COVARIANCES, "grad": ["log"]}, "kfac"),
    ({"log": ["grad"], "save": ["grad"], "statistic": "raw"}, {"grad": "covariance"}, "raw"),
]


@pytest.mark.parametrize(("paper", "head", "hessian"), PAPER)
def test_both_dialects_of_setup(tmp_path, paper, head, hessian):
    model, (x, y) = model_of(), data_of()
    found = []
    for place, asked in (("a", paper), ("b", head)):
        run = session(tmp_path / place)
        run.watch(model)
        run.add_lora()
        if asked is head:
            run.save(True)
        run.setup(asked)
        train(run, model, x, y)
        run.finalize()
        run.setup({"log": "grad"})
        ask(run, model, x[:2], y[:2])
        assert len(run.build_log_dataset()) == N
        found.append(run.compute_influence_all(hessian=hessian)["influence"])
        assert torch.equal(run.compute_influence_all()["influence"], found[-1])  # "auto" knows what was set up
    assert torch.equal(*found)


def test_ekfac_by_hand_in_the_papers_dialect(tmp_path):
    model, (x, y) = model_of(), data_of()
    run = session(tmp_path / "a")
    run.watch(model)
    for asked in ({"statistic": "kfac"}, {"statistic": "ekfac", "save": "grad"}):
        run.setup(asked)
        train(run, model, x, y)
    run.finalize()
    other = logged(tmp_path / "b", model, x, y, hessian="ekfac")
    a, b = (r.compute_influence_all(ask(r, model, x[:2], y[:2]), hessian="ekfac")["influence"] for r in (run, other))
    assert torch.equal(a, b)


def test_loaders_give_the_rows_back(tmp_path):
    model, (x, y) = model_of(), data_of()
    run = logged(tmp_path, model, x, y, "random", "raw")
    rows, ids = run.session.store.read(0, N), [f"d{i}" for i in range(N)]
    for workers in (0, 2):
        logs = list(run.build_log_dataloader(batch_size=9, num_workers=workers))
        assert [len(names) for names, _ in logs] == [9, 9, 6]  # arguments of a later call count as well
        names, log = merge_logs(logs)
        assert names == ids
        assert torch.equal(torch.cat([part["grad"].flatten(1) for part in log.values()], 1), rows)
        assert {part["grad"].shape for part in log.values()} == {(N, RANK, RANK)}
    dataset = run.build_log_dataset(flatten=True)
    assert dataset[-1][0] == "d23"
    assert torch.equal(dataset[5][1], rows[5])
    shuffled = torch.utils.data.Subset(run.build_log_dataset(), [17, 2, 9])
    assert [name for name, _ in shuffled] == ["d17", "d2", "d9"]
    query = ask(run, model, x[:2], y[:2])
    whole = run.compute_influence_all(query, mode="cosine")["influence"]
    flat = run.build_log_dataloader(flatten=True)
    for loader in (flat, list(flat)):
        torch.testing.assert_close(run.compute_influence_all(query, loader, mode="cosine")["influence"], whole)
    backwards = torch.utils.data.DataLoader(
        run.build_log_dataset(), sampler=range(N - 1, -1, -1), collate_fn=flat.collate_fn
    )
    found = run.compute_influence_all(query, backwards, mode="cosine")
    assert found["tgt_ids"] == ids[::-1]
    torch.testing.assert_close(found["influence"], whole.flip(1))


def test_covariances_leave_masked_positions_out(tmp_path):
    model, (x, y) = model_of(), data_of(positions=(4,))
    mask = torch.ones(N, 4, dtype=torch.int64)
    mask[::2, 2:] = 0
    y[mask == 0] = -100
    found = []
    for place, changed in (("a", x), ("b", torch.where(mask[..., None] == 0, 50.0, x))):
        run = session(tmp_path / place)
        run.watch(model)
        run.save(True)
        run.setup({**COVARIANCES, "grad": ["log"]})
        for part in (slice(0, 10), slice(10, N)):
            with run(data_id=list(range(N))[part], mask=mask[part]):
                loss_of(model, changed[part], y[part]).backward()
        found.append(run.compute_influence_all(ask(run, model, x[1::2][:2], y[1::2][:2]))["influence"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_mask_beside_a_pooled_layer(tmp_path):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.head = nn.Linear(7, 6), nn.Linear(6, 5)

        def forward(self, x, mask):
            return self.head((torch.tanh(self.token(x)) * mask[..., None]).sum(1))

    model, (x, y), mask = Pooled().eval(), data_of(positions=(4,)), torch.ones(N, 4, dtype=torch.int64)
    mask[::2, 2:] = 0
    run = session(tmp_path)
    run.watch(model)
    for _ in logix.LogIXScheduler(run, lora="pca", hessian="kfac", save="grad"):
        with run(data_id=range(N), mask=mask):
            nn.functional.cross_entropy(model(x, mask), y[:, 0], reduction="sum").backward()
        run.finalize()
    log = merge_logs(list(run.build_log_dataloader()))
    own = run.compute_self_influence(log, damping=0.1)["influence"].double()
    hidden = (torch.tanh(model.token(x)) * mask[..., None]).sum(1).detach()
    out = model.head(hidden)
    (dy,) = torch.autograd.grad(nn.functional.cross_entropy(out, y[:, 0], reduction="sum"), out)
    p_in, p_out = (p.double() for p in run.session.taps.factors["head"])
    a, b = hidden.double() @ p_in.T, dy.double() @ p_out.T
    kron = torch.kron(b.T @ b / N, a.T @ a / N) + 0.1 * torch.eye(16, dtype=torch.float64)
    g = log[1]["head"]["grad"].double().flatten(1)
    exact = torch.einsum("nd,nd->n", g, torch.linalg.solve(kron, g.T).T)
    part = run.compute_self_influence(log, damping=0.1, influence_groups=["head"])["influence"]["head"]
    torch.testing.assert_close(part.double(), exact, rtol=1e-4, atol=1e-5)
    assert (own > exact).all()


def test_the_next_session_goes_on(tmp_path):
    model, (x, y) = model_of(), data_of()
    wanted = {}
    for lora, hessian in (("none", "raw"), ("random", "kfac"), ("pca", "ekfac")):
        run = logged(tmp_path / lora, model, x, y, lora, hessian)
        wanted[lora] = run.compute_influence_all(ask(run, model, x[:2], y[:2]))["influence"]
    for lora in wanted:
        again = session(tmp_path / lora)
        with pytest.raises(LograError, match=r"call watch\(model\) first"):
            again.initialize_from_log()
        again.watch(model)
        again.initialize_from_log()
        assert torch.equal(again.compute_influence_all(ask(again, model, x[:2], y[:2]))["influence"], wanted[lora])
        rerun = logged(tmp_path / lora, model, x, y, lora, {"none": "raw", "random": "kfac", "pca": "ekfac"}[lora])
        assert len(rerun.build_log_dataset()) == N
    other = session(tmp_path / "pca")
    other.watch(model_of(5))
    with pytest.raises(StoreMismatch, match="model"):
        other.initialize_from_log()
    empty = session(tmp_path / "none-yet")
    empty.watch(model)
    with pytest.raises(LograError, match="has no logged rows"):
        empty.initialize_from_log()
    with pytest.raises(LograError, match="import_logix"):
        empty.initialize_from_log(Path(__file__).parent / "written_by_logix")
    assert callable(import_logix)


def test_factors_are_kept_as_logix_keeps_them(tmp_path):
    model, (x, y) = model_of(), data_of()
    run = logged(tmp_path / "a", model, x, y, "pca", "none")
    run.save_lora()
    state = torch.load(tmp_path / "a" / "p" / "lora" / "lora_state_dict.pt", weights_only=True)
    assert state["0.logix_lora_A.weight"].shape == (RANK, 7)
    assert state["0.logix_lora_C.weight"].shape == (6, RANK)
    other = session(tmp_path / "b")
    other.watch(model)
    with pytest.raises(LograError, match="call add_lora"):
        other.save_lora()
    with pytest.raises(LograError, match="keeps no LoRA factors"):
        other.add_lora(lora_path=tmp_path)
    other.add_lora(lora_path=tmp_path / "a" / "p")
    a, b = (ask(r, model, x, y)[1] for r in (run, other))
    for name in ("0", "2"):
        assert torch.equal(a[name]["grad"], b[name]["grad"])
