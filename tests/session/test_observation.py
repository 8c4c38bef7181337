"""What a run learns before its first row: PCA factors against dense eigenvectors, and who may use them."""

import shutil

import pytest
import torch
from torch import nn

import logra_kernels as lk
from logra_kernels.errors import LograError, StoreError, StoreMismatch
from logra_kernels.projection import Learned

N, T, K = 24, 5, 3
IDS = [f"row{i}" for i in range(N)]
PCA = lk.Projection(rank=K, kind="pca")


def make_case():
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = (torch.randn(N, T, d, generator=generator) for d in (9, 2))
    return model, x * torch.linspace(3, 0.1, 9), y


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y, reduction="sum")


def observe(run, model, x, y, **options):
    for part in (slice(0, 10), slice(10, N)):
        with run.observe(**options):
            loss_of(model, x[part], y[part]).backward()


def log(run, model, x, y):
    with run.log(IDS):
        loss_of(model, x, y).backward()


def sides(model, x, y):
    """Layer name -> (x [N, T, d_in], dy [N, T, d_out]) in fp64."""
    double = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    h = double[0](x.double()).requires_grad_()
    hidden = torch.tanh(h)
    out = double[2](hidden)
    dh, dout = torch.autograd.grad(loss_of(lambda _: out, x, y.double()), [h, out])
    return {"0": (x.double(), dh), "2": (hidden.detach(), dout)}


def leading(rows, k):
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors.flip(1)[:, :k].T, values.flip(0)[:k]


def same_directions(p, exact, atol=1e-4):
    cosines = (p.double() * exact).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=atol)


def test_factors_are_the_leading_eigenvectors_and_rows_are_projected_with_them(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model, projection=PCA) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
        run.commit()
        at = 0
        for name, (a, b) in sides(model, x, y).items():
            p_in, p_out = run.taps.factors[name]
            same_directions(p_in, leading(a.flatten(0, 1), K)[0])
            same_directions(p_out, leading(b.flatten(0, 1), min(K, b.shape[-1]))[0])
            g = torch.einsum("ko,nto,nti,ji->nkj", p_out.double(), b, a, p_in.double()).flatten(1)
            torch.testing.assert_close(
                run.store.read(0, N)[:, at : at + g.shape[1]].double(), g, rtol=1e-4, atol=1e-4 * g.abs().max().item()
            )
            at += g.shape[1]


def test_a_run_left_to_choose_learns_what_it_observed_and_draws_otherwise(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "seen", model) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
    assert lk.GradientStore.open(tmp_path / "seen").projection["kind"] == "pca"
    with lk.Run(tmp_path / "unseen", model) as run:
        log(run, model, x, y)
    assert lk.GradientStore.open(tmp_path / "unseen").projection == lk.Projection().to_dict()
    with lk.Run(tmp_path / "asked", model, projection=lk.Projection(rank=K)) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
    assert lk.GradientStore.open(tmp_path / "asked").projection == lk.Projection(rank=K).to_dict()


@pytest.mark.parametrize("given", [None, PCA])
def test_a_store_gives_its_factors_to_later_sessions(tmp_path, given):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model, projection=PCA) as run:
        observe(run, model, x, y)
        with run.log(IDS[:10]):
            loss_of(model, x[:10], y[:10]).backward()
        factors = run.taps.factors
    with lk.Run(tmp_path / "s", model, projection=given) as again:
        with again.log(IDS[10:]):
            loss_of(model, x[10:], y[10:]).backward()
        with again.query(["q"]) as query:
            loss_of(model, x[10:11], y[10:11]).backward()
        torch.testing.assert_close(query.rows, again.commit().read(10, 11))
        for name, pair in again.taps.factors.items():
            for mine, first in zip(pair, factors[name], strict=True):
                assert torch.equal(mine, first)


def test_other_factors_are_refused(tmp_path):
    model, x, y = make_case()
    for name, part in (("a", slice(0, 10)), ("b", slice(10, N))):
        with lk.Run(tmp_path / name, model, projection=PCA) as run:
            with run.observe():
                loss_of(model, x[part], y[part]).backward()
            log(run, model, x, y)
            projection = run.taps.projection
    with pytest.raises(StoreMismatch, match="projection"):
        lk.Run(tmp_path / "a", model, projection=projection)
    for other in (lk.Projection(rank=K), lk.Projection(rank=2, kind="pca"), lk.Projection(rank=K, kind="pca", seed=1)):
        with pytest.raises(StoreMismatch, match="projection"):
            lk.Run(tmp_path / "a", model, projection=other)
    with lk.Run(tmp_path / "c", model, projection=projection) as run:  # learned elsewhere, used again
        log(run, model, x, y)
    assert lk.GradientStore.open(tmp_path / "c").projection == lk.GradientStore.open(tmp_path / "b").projection


def test_factors_that_are_lost_or_damaged_are_said_to_be(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model, projection=PCA) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
    (file,) = (tmp_path / "s" / "sidecars").glob("projection.*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"damaged.*restore them from a copy"):
        lk.Run(tmp_path / "s", model)
    file.unlink()
    with pytest.raises(StoreError, match="lacks the factors that its rows were projected with"):
        lk.Run(tmp_path / "s", model)


def test_a_creation_that_was_killed_after_its_factors_starts_again(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "first", model, projection=PCA) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
    shutil.copytree(tmp_path / "first" / "sidecars", tmp_path / "s" / "sidecars")  # no manifest yet
    with lk.Run(tmp_path / "s", model, projection=PCA) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
    assert len(lk.GradientStore.open(tmp_path / "s")) == N


def test_without_observations_it_says_how_to_get_them(tmp_path):
    model, x, y = make_case()
    with (
        lk.Run(tmp_path / "s", model, projection=PCA) as run,
        pytest.raises(LograError, match=r"learned from data.*with run.observe"),
        run.log(IDS),
    ):
        loss_of(model, x, y).backward()
    with pytest.raises(LograError, match="learned from data"):
        lk.capture(model, PCA)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_comes_from_the_same_pass(tmp_path, sharing):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model, projection=PCA, curvature="kfac") as run:
        observe(run, model, x, y, sharing=sharing)
        log(run, model, x, y)
        with run.query(["q"]) as query:
            loss_of(model, x[:1] + 1, y[:1]).backward()
        damping = 0.3
        got = run.scores(query, damping=damping).double()
        rows, at, exact = run.store.read(0, N).double(), 0, 0
        for name, (a, b) in sides(model, x, y).items():
            p_in, p_out = (p.double() for p in run.taps.factors[name])
            if sharing == "reduce":
                a, b = a.mean(1, keepdim=True), b.sum(1, keepdim=True)
            a, b = a.flatten(0, 1) @ p_in.T, b.flatten(0, 1) @ p_out.T
            h = torch.kron(b.T @ b / len(b), a.T @ a / len(a)) * len(a) / N
            h += damping * torch.eye(len(h), dtype=h.dtype)
            part = slice(at, at + len(h))
            exact = exact + query.rows[:, part].double() @ torch.linalg.solve(h, rows[:, part].T)
            at += len(h)
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("frozen", [False, True])
def test_one_backward_gives_rows_and_covariances(tmp_path, frozen):
    model, x, y = make_case()
    model.requires_grad_(not frozen)
    weights = (torch.rand(N, T) < 0.7).float()
    weights[:, 0] = 1
    two, one = (lk.Run(tmp_path / name, model, projection=lk.Projection(rank=K), curvature="kfac") for name in "ab")
    for part in (slice(0, 10), slice(10, N)):
        with two.observe(weights=weights[part]):
            loss_of(model, x[part], y[part]).backward()
        with two.log(IDS[part], weights=weights[part]):
            loss_of(model, x[part], y[part]).backward()
        with one.log(IDS[part], weights=weights[part], observe=True):
            loss_of(model, x[part], y[part]).backward()
    torch.testing.assert_close(one.commit().read(0, N), two.commit().read(0, N), rtol=1e-5, atol=1e-5)
    asked = one.stored(IDS[:3])
    torch.testing.assert_close(one.scores(asked), two.scores(asked), rtol=1e-4, atol=1e-4)
    with one.query(["q"]) as query:
        loss_of(model, x[:1], y[:1]).backward()
    assert query.rows.norm() > 0
    torch.testing.assert_close(one.scores(asked), two.scores(asked), rtol=1e-4, atol=1e-4)  # a query is not observed


def test_a_projection_that_another_run_has_observed_for(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "unused", model, projection=lk.Projection(kind="identity")) as whole:
        with pytest.raises(LograError, match="nothing was observed"):
            whole.learn_projection(K)
        observe(whole, model, x, y)
        learned = whole.learn_projection(K)
    with lk.Run(tmp_path / "s", model, projection=PCA) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
        with pytest.raises(LograError, match="were projected"):
            run.learn_projection(K)
        for key, factor in run.taps.projection.learned.items():
            torch.testing.assert_close(learned.learned[key], factor)
        assert learned.learned.spread == pytest.approx(run.taps.projection.learned.spread)
    assert not lk.GradientStore.exists(tmp_path / "unused")


def test_factors_of_fewer_rows_than_the_rank(tmp_path):
    model, x, y = make_case()
    sides = {("0", "in"): 9, ("0", "out"): 8, ("2", "in"): 8, ("2", "out"): 2}
    factors = {key: torch.randn(min(5, 2 if key[0] == "2" else 5), dim) for key, dim in sides.items()}
    projection = lk.Projection(rank=5, kind="pca", learned=Learned(factors, {}))
    with lk.Run(tmp_path / "s", model, projection=projection) as run:
        assert run.taps.layers == {"0": (5, 5), "2": (2, 2)}
        log(run, model, x, y)
    with lk.Run(tmp_path / "s", model) as again:
        assert again.store.layers == {"0": (5, 5), "2": (2, 2)}
    with pytest.raises(LograError, match="learned for other layers"):
        lk.capture(model, lk.Projection(rank=4, kind="pca", learned=Learned(factors, {})))


def held_as_learned(run, dtype):
    learned = run.taps.projection.learned
    for name, factors in run.taps.factors.items():
        for side, p in zip(("in", "out"), factors, strict=True):
            assert p is learned[name, side]
            assert p.dtype == dtype
    return learned


def test_factors_of_a_bf16_projection_are_rounded_once_and_held_once(tmp_path):
    model, x, y = make_case()
    learned, rows = [], []
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / str(dtype)
        with lk.Run(path, model, projection=PCA, projection_dtype=dtype) as run:
            observe(run, model, x, y)
            log(run, model, x, y)
            learned.append(held_as_learned(run, dtype))
            kept = run._observation._seen.layers
            for name, (a, b) in sides(model, x, y).items():
                for p, side, sums in zip(run.taps.factors[name], (a, b), (kept[name].a, kept[name].b), strict=True):
                    seen = side.flatten(0, 1) @ p.double().T
                    exact = seen.T @ seen
                    torch.testing.assert_close(sums.double(), exact, rtol=0, atol=2e-5 * exact.max().item())
            run.commit()
            rows.append(run.store.read(0, N))
        with lk.Run(path, model) as again:
            assert held_as_learned(again, dtype) == learned[-1]
    for key, p in learned[0].items():
        assert torch.equal(learned[1][key], p.bfloat16())
    assert learned[0] != learned[1]
    torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-2 * rows[0].norm(dim=1).max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_learns_factors_of_16_bits_which_one_of_32_can_use(tmp_path, dtype):
    wide, x, y = make_case()
    model = make_case()[0].to(dtype)
    with lk.Run(tmp_path / "s", model, projection=PCA) as run:
        observe(run, model, x.to(dtype), y.to(dtype))
        log(run, model, x.to(dtype), y.to(dtype))
        learned = held_as_learned(run, dtype)
    projection = lk.Projection(K, "pca", learned=learned)
    with lk.Run(tmp_path / "t", wide, projection=projection) as run:
        log(run, wide, x, y)
        for name, (p_in, p_out) in run.taps.factors.items():
            assert torch.equal(p_in, learned[name, "in"].float())
            assert torch.equal(p_out, learned[name, "out"].float())


def test_reduce_means_inputs_and_sums_gradients_over_counted_positions():
    model, x, y = make_case()
    weights = torch.rand(N, T)
    weights[:, 3:] = 0
    weights[4] = 0
    with lk.capture(model, lk.Projection(kind="identity")) as taps, taps.covariances(sharing="reduce") as found:
        taps.reset(weights=weights)
        loss_of(model, x, y).backward()
    kept = [i for i in range(N) if i != 4]
    for name, (a, b) in sides(model, x, y).items():
        a, b = a[kept, :3].mean(1), (b * weights[..., None].double())[kept].sum(1)
        sums = found.layers[name]
        assert sums.positions == len(kept)
        torch.testing.assert_close(sums.a.double(), a.T @ a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums.b.double(), b.T @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_weights_that_are_all_one_change_nothing(dtype):
    model, x, y = make_case()
    found = []
    for weights in (None, torch.ones(N, T, dtype=dtype)):
        with lk.capture(model, lk.Projection(kind="identity")) as taps, taps.covariances() as seen:
            taps.reset(weights=weights)
            loss_of(model, x, y).backward()
        found.append(seen.layers)
    for name, plain in found[0].items():
        assert torch.equal(plain.a, found[1][name].a)
        assert torch.equal(plain.b, found[1][name].b)
        assert plain.positions == found[1][name].positions == N * T


def test_sharing_must_stay_the_same(tmp_path):
    model, x, y = make_case()
    with lk.Run(tmp_path / "s", model) as run:
        observe(run, model, x, y)
        with pytest.raises(LograError, match="sharing='expand'"), run.observe(sharing="reduce"):
            loss_of(model, x, y).backward()
    with lk.Run(tmp_path / "t", model) as run, pytest.raises(ValueError, match="sharing is 'both'"):
        observe(run, model, x, y, sharing="both")


def test_each_side_may_have_its_own_kind(tmp_path):
    model, x, y = make_case()
    projection = lk.Projection(rank=K, kind=("pca", "gaussian"))
    with lk.Run(tmp_path / "s", model, projection=projection) as run:
        observe(run, model, x, y)
        log(run, model, x, y)
        p_in, p_out = run.taps.factors["0"]
        same_directions(p_in, leading(sides(model, x, y)["0"][0].flatten(0, 1), K)[0])
        assert torch.equal(p_out, lk.Projection(rank=K, kind="gaussian").factor("0", "out", 8))
    with lk.Run(tmp_path / "s", model) as again:
        assert again.taps.projection.kinds == {"in": "pca", "out": "gaussian"}
        assert torch.equal(again.taps.factors["0"][0], p_in)
