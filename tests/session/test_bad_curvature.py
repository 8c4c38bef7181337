"""What cannot be solved with, or is not this store's, is an error that says what to do: never a wrong number."""

import pytest
import torch
from session.models import N, ask, log_all, loss_of, make_data, make_model, make_run, observe_all

import logra_kernels as lk
from logra_kernels import influence
from logra_kernels.curvature import Damping, RawFisher
from logra_kernels.errors import LograError, StoreError
from logra_kernels.store import GradientStore


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_damping_that_is_none(tmp_path, bad):
    run, query = make_run(tmp_path / "s", projection=lk.Projection(rank=3))
    with run:
        for wrong in (bad, *([Damping] if bad < 0 else [])):
            with pytest.raises(LograError, match="must be finite and must not be negative"):
                run.scores(query, damping=wrong if isinstance(wrong, float) else wrong(relative=bad))
        with pytest.raises(LograError, match="must be finite and must not be negative"):
            lk.Run(tmp_path / "s", run.model, damping=bad)


@pytest.mark.parametrize("kind", ["raw", "raw-fp64", "fisher", "fisher-fp64"])
def test_rows_that_do_not_span_the_space_need_damping(tmp_path, kind):
    with lk.Run(tmp_path / "s", make_model(), projection=lk.Projection(rank=3), curvature=kind) as run:
        x, target = make_data(4)
        for copy in range(5):  # as many rows as dims, but four different ones
            with run.log([f"{copy}-{i}" for i in range(4)]):
                loss_of(run.model, x, target).backward()
            with run.observe_fisher():
                loss_of(run.model, x, target).backward()
        query = ask(run)
        with pytest.raises(LograError, match="layer '0' is .*; use a larger damping, or log more rows"):
            run.scores(query, damping=0.0)
        assert run.scores(query, damping=1e-2).isfinite().all()


def test_fewer_rows_than_dims_need_damping(tmp_path):
    with lk.Run(tmp_path / "s", make_model(), projection=lk.Projection(rank=3), curvature="raw") as run:
        x, target = make_data(5)
        with run.log([str(i) for i in range(5)]):
            loss_of(run.model, x, target).backward()
        query = ask(run)
        with pytest.raises(LograError, match="layer '0' is singular; use a larger damping, or log more rows"):
            run.scores(query, damping=0.0)


def test_nan_rows_never_reach_a_curvature(tmp_path):
    with lk.Run(tmp_path / "s", make_model(), projection=lk.Projection(rank=3), fisher_while_logging=True) as run:
        log_all(run)
        x, target = make_data(3)
        x[1] = torch.nan
        with pytest.raises(StoreError, match="'bad1'"), run.log(["bad0", "bad1", "bad2"], {"source": ["s"] * 3}):
            loss_of(run.model, x, target).backward()
        with pytest.raises(LograError, match="NaN or infinite"), run.observe_fisher():
            loss_of(run.model, x, target).backward()
        with pytest.raises(LograError, match="NaN or infinite"), run.observe():
            loss_of(run.model, x, target).backward()
        kept = RawFisher.of(run.commit())
        assert kept.rows == N
        assert all(block.isfinite().all() for block in kept.blocks.values())


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "fisher", "fisher-fp64"])
def test_a_curvature_that_was_never_observed(tmp_path, kind):
    run, query = make_run(tmp_path / "s", projection=lk.Projection(rank=3), curvature=kind)
    with run, pytest.raises(LograError, match="inside `with run.observe"):
        run.scores(query)


def test_the_curvature_of_another_store(tmp_path):
    (one, _), (two, _) = (make_run(tmp_path / f"s{i}", seed=i, projection=lk.Projection(rank=3)) for i in (0, 1))
    with one, two:
        factor = RawFisher.of(one.store).factorize()
        with pytest.raises(ValueError, match=r"this factor is of other rows than .*s1 holds now"):
            influence.self_influence(two.store, factor)
    with GradientStore.open(one.path, mode="append") as writer:
        writer.delete(["row3"])
    with pytest.raises(ValueError, match="this factor is of other rows"):
        influence.self_influence(GradientStore.open(one.path), factor)


@pytest.mark.parametrize("damping", [0.3, Damping(0.1), Damping(whole=1.0)])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "fisher", "fisher-fp64"])
def test_another_observation_makes_every_kept_answer_stale(tmp_path, kind, damping):
    options = {"projection": lk.Projection(rank=3), "curvature": kind}
    run, query = make_run(tmp_path / "s", **options)
    with run:
        observe_all(run)
        first = run.scores(query, "relatif", damping), run.self_influence(damping)
    with lk.Run(tmp_path / "s", make_model(), **options) as again:  # its first batch replaces what was observed
        x, target = make_data(seed=7)
        for context in (again.observe, again.observe_fisher):
            with context():
                loss_of(again.model, 3 * x, target).backward()
        second = again.scores(query, "relatif", damping), again.self_influence(damping)
    assert not torch.allclose(first[1], second[1])
    with lk.Run(tmp_path / "s", make_model(), **options) as fresh:
        for file in (tmp_path / "s" / "sidecars").glob("self-influence*"):
            file.unlink()
        torch.testing.assert_close(fresh.self_influence(damping), second[1], rtol=0, atol=0)
        torch.testing.assert_close(fresh.scores(query, "relatif", damping), second[0], rtol=0, atol=0)
