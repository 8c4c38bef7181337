"""The session against dense oracles, and what it does when things are not as they should be."""

import pytest
import torch
from torch import nn

import logra_kernels as lk
from logra_kernels.errors import LograError, StoreError, StoreMismatch

N, T = 24, 5


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def make_data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, T, 6, generator=generator), torch.randn(N, T, 3, generator=generator)


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target, reduction="sum")


def log_rows(run, start, stop):
    ids = [f"row{i}" for i in range(start, stop)]
    return run.log(ids, columns={"source": [f"s{i % 3}" for i in range(start, stop)]})


def log_all(run, model, n: int = N, batch: int = 7):
    x, target = make_data()
    for start in range(0, n, batch):
        stop = min(start + batch, n)
        with log_rows(run, start, stop):
            loss_of(model, x[start:stop], target[start:stop]).backward()


def ask(run, model, n: int = 3):
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(n, T, 6, generator=generator), torch.randn(n, T, 3, generator=generator)
    with run.query([f"q{i}" for i in range(n)]) as query:
        loss_of(model, x, target).backward()
    return query, (x, target)


def full_rows(model, x, target):
    """Unprojected per-sample gradients of both layers' weights in fp64, [N, D]."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss_of(model, x[i : i + 1], target[i : i + 1]), [model[0].weight, model[2].weight])
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(rows)


def dense_scores(train, queries, mode, damping=None):
    parts, own, length = 0, 0, 0
    for t, q in zip(train.split([48, 24], dim=1), queries.split([48, 24], dim=1), strict=True):
        h = t.T @ t / len(t)
        h += (0.1 * h.trace() / len(h) if damping is None else damping) * torch.eye(len(h), dtype=h.dtype)
        solved = torch.linalg.solve(h, t.T)
        parts = parts + q @ solved
        own = own + (t * solved.T).sum(1)
        length = length + solved.square().sum(0)
    return {
        "dot": parts,
        "relatif": parts / own.sqrt(),
        "theta-relatif": parts / length.sqrt(),
        "l2": parts - own / 2,
    }[mode]


@pytest.mark.parametrize("mode", ["dot", "relatif", "theta-relatif", "l2"])
@pytest.mark.parametrize("damping", [None, 0.5])
def test_scores_equal_the_textbook_formula_without_projection(tmp_path, mode, damping):
    model = make_model()
    identity = lk.Projection(kind="identity")
    with lk.Run(tmp_path / "s", model, projection=identity, rows_per_shard=10, curvature="raw") as run:
        log_all(run, model)
        run.finalize()
        query, (qx, qt) = ask(run, model)
        exact = dense_scores(full_rows(model, *make_data()), full_rows(model, qx, qt), mode, damping)
        got = run.scores(query, mode=mode, damping=damping)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())
        top = run.topk(query, k=4, mode=mode, damping=damping, layers=True)
        order = exact.argsort(dim=1, descending=True)[:, :4]
        assert torch.equal(top.indices, order)
        assert top.ids == [[f"row{i}" for i in row] for row in order.tolist()]
        torch.testing.assert_close(sum(top.layers.values()), top.values, rtol=1e-4, atol=1e-5)
        bottom = run.topk(query, k=4, mode=mode, damping=damping, largest=False)
        assert torch.equal(bottom.indices, exact.argsort(dim=1)[:, :4])


def test_a_positive_score_means_training_on_the_row_lowers_the_query_loss(tmp_path):
    model = make_model()
    x, target = make_data()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(kind="identity")) as run:
        log_all(run, model)
        query, (qx, qt) = ask(run, model, 1)
        scores = run.scores(query)[0]

    def query_loss_after_a_step_on(i):
        trained = make_model()
        loss_of(trained, x[i : i + 1], target[i : i + 1]).backward()
        with torch.no_grad():
            for p in (trained[0].weight, trained[2].weight):
                p -= 1e-4 * p.grad
        return loss_of(trained, qx, qt).item()

    before = loss_of(model, qx, qt).item()
    change = torch.tensor([before - query_loss_after_a_step_on(i) for i in range(N)])
    assert torch.corrcoef(torch.stack([scores, change]))[0, 1] > 0.5


def test_self_influence_is_the_diagonal(tmp_path):
    model = make_model()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=3)) as run:
        log_all(run, model)
        rows = lk.GradientStore.open(tmp_path / "s").read(0, 0)
        assert rows.shape == (0, 18)
        own = run.self_influence()
        every = run.scores(type(ask(run, model)[0])([f"row{i}" for i in range(N)], run.store.read(0, N)))
    torch.testing.assert_close(own, every.diagonal(), rtol=1e-4, atol=0)


def test_weights_keep_their_flags_and_gather_nothing(tmp_path):
    model = make_model()
    model[2].bias.requires_grad_(False)
    with lk.Run(tmp_path / "s", model) as run:
        log_all(run, model)
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_training_goes_on_beside_logging_when_weights_are_not_frozen(tmp_path):
    model = make_model()
    with lk.Run(tmp_path / "s", model, freeze=False) as run:
        log_all(run, model, n=7)
    assert all(p.grad is not None for p in model.parameters())


def test_resume_skips_what_is_there_and_ends_in_the_same_bytes(tmp_path):
    def tree(path):
        return {p.name: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != "lock"}

    model = make_model()
    with lk.Run(tmp_path / "whole", model, rows_per_shard=5) as run:
        log_all(run, model)
    with lk.Run(tmp_path / "parts", model, rows_per_shard=5) as run:
        log_all(run, model, n=14)
        assert not run.committed(["row20"])
    with lk.Run(tmp_path / "parts", model, rows_per_shard=5) as run:
        assert run.committed(["row0", "row13"])
        log_all(run, model)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_reopened_for_queries_by_another_run(tmp_path):
    model = make_model()
    with lk.Run(tmp_path / "s", model, include=["2"], projection=lk.Projection(rank=2, seed=4), dtype="bf16") as run:
        log_all(run, model)
        run.finalize()
        first = run.topk(ask(run, model)[0], k=3)
    with lk.Run(tmp_path / "s", make_model()) as run:
        again = run.topk(ask(run, run.model)[0], k=3)
    assert again.ids == first.ids
    assert torch.equal(again.values, first.values)


def test_another_model_projection_layers_or_dtype_is_refused(tmp_path):
    model = make_model()
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=2), fingerprints={"loss": "mse"}) as run:
        log_all(run, model)
    with pytest.raises(StoreMismatch, match="model"):
        lk.Run(tmp_path / "s", make_model(seed=5), fingerprints={"loss": "mse"})
    with pytest.raises(StoreMismatch, match="loss"):
        lk.Run(tmp_path / "s", model, fingerprints={"loss": "cross entropy"})
    with pytest.raises(StoreMismatch, match="projection"):
        lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=3), fingerprints={"loss": "mse"})
    with pytest.raises(StoreMismatch, match="layers"):
        lk.Run(tmp_path / "s", model, include=["0"], projection=lk.Projection(rank=2), fingerprints={"loss": "mse"})
    with pytest.raises(StoreMismatch, match="dtype"):
        lk.Run(tmp_path / "s", model, dtype="bf16", fingerprints={"loss": "mse"})


def test_a_model_without_the_stored_layers_is_refused(tmp_path):
    with lk.Run(tmp_path / "s", make_model()) as run:
        log_all(run, run.model)
    with pytest.raises(StoreMismatch, match=r"another model: 1 of its 2 layers are not in this one \(2\)"):
        lk.Run(tmp_path / "s", nn.Sequential(nn.Linear(6, 8), nn.Tanh()))


def test_the_projection_dtype_is_found_again(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with lk.Run(tmp_path / "s", model, projection_dtype=torch.bfloat16) as run:
        log_all(run, model)
    with lk.Run(tmp_path / "s", model) as run:
        assert run.taps.factors["0"][0].dtype == torch.bfloat16
        run.topk(ask(run, model)[0], k=2)
    with pytest.raises(StoreMismatch, match="projection_dtype .bf16 there, fp32 here"):
        lk.Run(tmp_path / "s", model, projection_dtype=torch.float32)


def test_other_kinds_of_layers_and_biases_are_found_again(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with lk.Run(tmp_path / "s", model, kinds=["linear", "norm"], bias=True) as run:
        log_all(run, model)
        layers = run.taps.layers
    with lk.Run(tmp_path / "s", model) as run:
        assert run.taps.layers == layers == {"0": (8, 7), "1": (8, 1), "2": (3, 9)}
        run.topk(ask(run, model)[0], k=2)
    with pytest.raises(StoreMismatch, match="bias"):
        lk.Run(tmp_path / "s", model, kinds=["linear", "norm"], bias=False)


def test_nan_loss_leaves_the_store_as_it_was(tmp_path):
    model = make_model()
    x, target = make_data()
    with lk.Run(tmp_path / "s", model) as run:
        log_all(run, model, n=7)
        with pytest.raises(StoreError, match="row9"), log_rows(run, 7, 14):
            bad = x[7:14].clone()
            bad[2] = torch.nan
            loss_of(model, bad, target[7:14]).backward()
        with pytest.raises(LograError, match="query 'q'.*NaN"), run.query(["q"]):
            loss_of(model, torch.full((1, T, 6), torch.nan), target[:1]).backward()
    assert len(lk.GradientStore.open(tmp_path / "s")) == 7


def test_misuse_is_an_error_that_says_what_to_do(tmp_path):
    model = make_model()
    x, target = make_data()
    with lk.Run(tmp_path / "s", model) as run:
        with pytest.raises(StoreError, match="log training rows first"):
            ask_nothing(run)
        assert not (tmp_path / "s").exists()
        with pytest.raises(LograError, match="received no gradient"), run.log(["row0"]):
            pass
        with pytest.raises(ValueError, match="sees 24 samples where 2 were begun"), run.log(["a", "b"]):
            loss_of(model, x, target).backward()
        log_all(run, model)
        query, _ = ask(run, model)
        with pytest.raises(ValueError, match="mode is 'cosine'"):
            run.topk(query, mode="cosine")
        model.append(nn.Dropout(0.5))
        with pytest.warns(UserWarning, match="dropout is on"):
            ask(run, model)


def ask_nothing(run):
    return run.topk(ask(run, run.model)[0])


def test_compiled_model_in_a_session(tmp_path):
    model = make_model()
    with lk.Run(tmp_path / "plain", model) as run:
        log_all(run, model)
    model = make_model()
    with lk.Run(tmp_path / "compiled", model) as run:
        log_all(run, torch.compile(model, fullgraph=True, backend="aot_eager"))
    plain, compiled = (lk.GradientStore.open(tmp_path / name).read(0, N) for name in ("plain", "compiled"))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
