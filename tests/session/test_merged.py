"""What runs observed beside their rows goes with these into the stores that are made of theirs."""

import pytest
import torch
from session.models import ask, log_all, loss_of, make_data, make_model

import logra_kernels as lk
from logra_kernels.store import merge, quantize

PROJECTION = lk.Projection(rank=3)
HALVES = [list(range(9)), list(range(9, 20))]


def observe(run, rows):
    x, target = make_data()
    with run.observe():
        loss_of(run.model, x[rows], target[rows]).backward()
    with run.observe_fisher():
        loss_of(run.model, x[rows], target[rows]).backward()


def make(path, kind, rows, observes=True):
    run = lk.Run(path, make_model(), projection=PROJECTION, curvature=kind)
    if observes:
        observe(run, rows)
    log_all(run, rows)
    run.commit()
    return run


def scores(path, kind):
    with lk.Run(path, make_model(), curvature=kind) as run:
        return run.scores(ask(run))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "fisher"])
def test_merged_stores_have_what_all_observed(tmp_path, kind):
    whole = make(tmp_path / "whole", kind, HALVES[0] + HALVES[1])
    for name, rows in zip("ab", HALVES, strict=True):
        make(tmp_path / name, kind, rows)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    torch.testing.assert_close(scores(tmp_path / "merged", kind), whole.scores(ask(whole)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["kfac", "fisher"])
def test_a_store_without_observations_adds_none(tmp_path, kind):
    whole = make(tmp_path / "whole", kind, HALVES[0] + HALVES[1], observes=False)
    observe(whole, HALVES[1])
    for name, rows in zip("ab", HALVES, strict=True):
        make(tmp_path / name, kind, rows, observes=name == "b")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    torch.testing.assert_close(scores(tmp_path / "merged", kind), whole.scores(ask(whole)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ekfac", "fisher"])
def test_quantised_rows_keep_what_was_observed(tmp_path, kind):
    run = make(tmp_path / "s", kind, HALVES[0] + HALVES[1])
    quantize(tmp_path / "s", tmp_path / "same", "fp32")
    torch.testing.assert_close(scores(tmp_path / "same", kind), run.scores(ask(run)))
