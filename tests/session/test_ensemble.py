"""Scores over several runs, rows matched by id."""

import pytest
import torch
from session.models import N, make_run

import logra_kernels as lk
from logra_kernels import influence
from logra_kernels.errors import LograError
from logra_kernels.session import ensemble, member_scores, tracin


@pytest.fixture
def members(tmp_path):
    found = []
    for seed in range(3):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
        projection = lk.Projection(rank=3, seed=seed)
        found.append(make_run(tmp_path / f"s{seed}", seed=seed, order=order, projection=projection))
    yield found
    for run, _ in found:
        run.close()


def by_id(run, scores):
    place = {row: i for i, row in enumerate(run.store.ids)}
    return scores[:, [place[f"row{i}"] for i in range(N)]]


def test_tracin_is_the_weighted_sum_of_dot_products(members):
    weights = [0.1, 0.03, 0.01]
    exact = sum(
        w * by_id(run, query.rows @ run.stored(run.store.ids).rows.T)
        for w, (run, query) in zip(weights, members, strict=True)
    )
    torch.testing.assert_close(by_id(members[0][0], tracin(members, weights)), exact, rtol=1e-4, atol=1e-5)
    solved = sum(by_id(run, run.scores(query)) for run, query in members)
    torch.testing.assert_close(by_id(members[0][0], tracin(members, precondition=True)), solved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dot", "relatif"])
def test_ensemble_mean_and_standard_error(members, mode):
    found = ensemble(members, mode)
    every = torch.stack([by_id(run, run.scores(query, mode)).double() for run, query in members])
    first = members[0][0]
    torch.testing.assert_close(by_id(first, found.mean).double(), every.mean(0), rtol=1e-5, atol=1e-6)
    error = every.std(0) / 3**0.5
    torch.testing.assert_close(by_id(first, found.standard_error).double(), error, rtol=1e-4, atol=1e-6)
    assert found.query_ids == ["q0", "q1", "q2"]
    top = found.topk(4)
    best = every.mean(0).topk(4).indices
    assert top.ids == [[f"row{i}" for i in row] for row in best.tolist()]
    assert ensemble(members[:1]).standard_error is None


def test_values_with_error_bars_over_seeds(members):
    first = members[0][0]
    table = influence.value(list(member_scores(members)), first.store.columns["source"])
    each = [{line.source: line.value for line in run.value(query).lines} for run, query in members]
    for line in table.lines:
        values = torch.tensor([values[line.source] for values in each], dtype=torch.float64)
        assert line.value == pytest.approx(float(values.mean()), rel=1e-5)
        assert line.error == pytest.approx(float(values.std() / 3**0.5), rel=1e-4)


def test_what_does_not_match_is_refused(members, tmp_path):
    other, query = make_run(tmp_path / "other", order=list(range(N - 1)))
    with other, pytest.raises(LograError, match="hold different rows: 1 ids are in one only, 'row19'"):
        ensemble([*members, (other, query)])
    run, query = members[1]
    renamed = lk.Query(["a", "b", "c"], query.rows)
    with pytest.raises(LograError, match=r"are \['a', 'b', 'c'\], not \['q0', 'q1', 'q2'\]; ask the same"):
        tracin([members[0], (run, renamed)])
    with pytest.raises(ValueError, match="2 weights for 3 runs"):
        tracin(members, [1.0, 2.0])
    for call in (tracin, ensemble):
        with pytest.raises(ValueError, match="give at least one"):
            call([])
