"""A store of whitened rows answers as the store of raw rows it was made from, and refuses what it cannot."""

import pytest
import torch
from torch import nn

import logra_kernels as lk
from logra_kernels import influence
from logra_kernels.cli.main import main
from logra_kernels.curvature import CURVATURES, RawFisher
from logra_kernels.store import GradientStore, Whitening, fsck, merge, quantization_loss, quantize

N, QUERIES = 90, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def loss(model, x):
    return (model(x).square().sum(-1) * x[..., 0]).sum()


@pytest.fixture
def data():
    torch.manual_seed(0)
    return Net(), torch.randn(N, 2, 7) * torch.logspace(0, -2, 7), torch.randn(QUERIES, 2, 7)


@pytest.fixture
def logged(tmp_path, data):
    model, x, _ = data
    with lk.Run(tmp_path / "raw", model, projection=lk.Projection(rank=3, kind="gaussian")) as run:
        log(run, model, x, 0)
    return tmp_path / "raw"


def log(run, model, x, first):
    with run.log(ids=[f"row-{first + i}" for i in range(len(x))]):
        loss(model, x).backward()


def ask(run, model, q):
    with run.query(ids=[f"q{i}" for i in range(len(q))]) as query:
        loss(model, q).backward()
    return query


def whiten(path, out, kind="shrunk", dtype="fp32", damping=None, **more):
    store = GradientStore.open(path)
    return quantize(path, out, dtype, whitening=influence.whitening_of(CURVATURES[kind].of(store), damping), **more)


@pytest.mark.parametrize("kind", ["raw", "shrunk", "diagonal", "kronecker"])
def test_products_of_whitened_rows_are_influences(logged, tmp_path, kind):
    raw = GradientStore.open(logged)
    store = whiten(logged, tmp_path / "w", kind)
    factor = CURVATURES[kind].of(raw).factorize(exact=True)
    rows = raw.read(0, N)
    exact = rows.double() @ factor.solve(rows).double().T
    w = store.read(0, N).double()
    assert (w @ w.T - exact).abs().max() < 1e-5 * exact.abs().max()
    torch.testing.assert_close(store.whitening.undo(w.float()), rows, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))
    assert store.whitening.facts["curvature"] == kind
    assert store.manifest.kept_as.endswith("whitened")


def test_every_mode_answers_as_the_raw_store(logged, data, tmp_path):
    model, _, q = data
    whiten(logged, tmp_path / "w")
    with lk.Run(logged, model) as raw, lk.Run(tmp_path / "w", model) as run:
        query = ask(raw, model, q)
        assert torch.equal(ask(run, model, q).rows, query.rows)
        for mode in influence.MODES:
            expected = raw.scores(query, mode)
            torch.testing.assert_close(run.scores(query, mode), expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
            parts = run.group_scores(query, mode=mode)
            torch.testing.assert_close(sum(parts.values()), run.scores(query, mode), rtol=1e-3, atol=1e-3)
        assert run.topk(query, 5).ids == raw.topk(query, 5).ids
        layers = run.topk(query, 3, "l2", layers=True)
        torch.testing.assert_close(sum(layers.layers.values()), layers.values, rtol=1e-3, atol=1e-3)
        for found, expected in zip(vars(run.statistics()).values(), vars(raw.statistics()).values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(run.stored(["row-7"]).rows, raw.stored(["row-7"]).rows, rtol=1e-3, atol=1e-4)
        with run.tokens(query) as mine:
            loss(model, q).backward()
        with raw.tokens(query) as theirs:
            loss(model, q).backward()
        torch.testing.assert_close(mine.shares, theirs.shares, rtol=1e-3, atol=1e-3)


def test_logging_goes_on_with_the_curvature_that_is_known(logged, data, tmp_path):
    model, _, q = data
    whiten(logged, tmp_path / "w")
    later = torch.randn(5, 2, 7)
    with lk.Run(tmp_path / "w", model) as run:
        before = run.store.whitening
        log(run, model, later, N)
        query = ask(run, model, q)
        found = run.scores(query)
        assert found.shape == (QUERIES, N + 5)
    with lk.Run(logged, model) as raw:
        factor = CURVATURES["shrunk"].of(raw.store).factorize(exact=True)
        new = ask(raw, model, later).rows
    torch.testing.assert_close(found[:, N:], factor.solve(query.rows) @ new.T, rtol=1e-3, atol=1e-3)
    assert GradientStore.open(tmp_path / "w").whitening.digest == before.digest


def test_another_curvature_or_damping_is_refused(logged, data, tmp_path):
    model, _, q = data
    whiten(logged, tmp_path / "w", damping=0.5)
    with lk.Run(tmp_path / "w", model) as run:
        query = ask(run, model, q)
        torch.testing.assert_close(run.scores(query, damping=0.5), run.scores(query))
        with pytest.raises(lk.LograError, match="whitened by damping 0.5, and .*damping 0.25 was asked for"):
            run.scores(query, damping=0.25)
    with lk.Run(tmp_path / "w", model, curvature="raw") as run, pytest.raises(lk.LograError, match="curvature shrunk"):
        run.scores(query)
    with pytest.raises(lk.LograError, match="holds whitened rows already"):
        whiten(tmp_path / "w", tmp_path / "v", "identity")
    joined = RawFisher.joining({"both": ["*"]}).of(GradientStore.open(logged))
    with pytest.raises(lk.LograError, match="several layers"):
        influence.whitening_of(joined)


def test_the_loss_is_measured_in_influences(logged, tmp_path):
    losses = [quantization_loss(whiten(logged, tmp_path / dtype, dtype=dtype)) for dtype in ("fp32", "int4")]
    assert losses[0]["relative_l2"] == 0
    assert losses[0]["score_correlation"] == pytest.approx(1, abs=1e-6)
    rows = GradientStore.open(tmp_path / "fp32").read(0, N).double()
    kept = GradientStore.open(tmp_path / "int4").read(0, N).double()
    assert losses[1]["relative_l2"] == pytest.approx(float((kept - rows).norm() / rows.norm()), rel=1e-6)
    assert losses[1]["score_correlation"] < 1


def test_what_becomes_of_the_map(logged, data, tmp_path):
    """It goes along where rows go, is missed where it is not, and readers that do not know of it are kept off."""
    store = whiten(logged, tmp_path / "w")
    digest = store.whitening.digest
    again = quantize(tmp_path / "w", tmp_path / "int8", "int8")
    assert again.whitening.digest == digest
    torch.testing.assert_close(again.read(0, N), store.read(0, N), rtol=0.1, atol=0.1)
    with lk.Run(logged, data[0]) as run:
        other = influence.whitening_of(CURVATURES["raw"].of(run.store))
    quantize(logged, tmp_path / "other", "fp32", whitening=other)
    with pytest.raises(lk.StoreMismatch, match="whitening"):
        merge([tmp_path / "w", tmp_path / "other"], tmp_path / "m", duplicates="keep")
    assert merge([tmp_path / "w"], tmp_path / "m").whitening.digest == digest
    assert fsck(tmp_path / "m").faults == []
    assert '"version": 3' in (tmp_path / "w" / "manifest.json").read_text()
    assert '"version": 2' in (logged / "manifest.json").read_text()
    next((tmp_path / "m" / "sidecars").glob("whitening.*")).unlink()
    assert "is missing, which the rows were made with" in fsck(tmp_path / "m").faults[0]
    with pytest.raises(lk.StoreError, match="lacks what its rows were whitened by"):
        _ = GradientStore.open(tmp_path / "m").whitening
    with pytest.raises(lk.StoreError, match="do not fit"):
        GradientStore.create(tmp_path / "n", {"a": (2, 2)}, whitening=Whitening({"a": torch.eye(3)}))


def test_command(logged, tmp_path, capsys):
    new = str(tmp_path / "w")
    argv = ["quantize", str(logged), "--to", "int8", "--out", new, "--whiten"]
    assert main([*argv, "--curvature", "kronecker", "--damping", "0.5"]) == 0
    assert "int8, fp32 scales of 128 numbers, whitened" in capsys.readouterr().out
    assert main(["info", new]) == 0
    assert "whitened by     curvature kronecker, damping 0.5, factor " in capsys.readouterr().out
    assert main(["quantize", new, "--to", "int4", "--out", str(tmp_path / "v"), "--whiten"]) == 1
    assert "holds whitened rows already" in capsys.readouterr().err
    assert main([*argv[:-1], "--whiten", "--curvature", "none"]) == 1
    assert "must be one of" in capsys.readouterr().err
