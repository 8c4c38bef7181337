"""What a session can be asked beyond plain scores, and what it says to bad questions."""

import pytest
import torch
from session.models import N, ask, make_run

import logra_kernels as lk
from logra_kernels import influence
from logra_kernels.curvature import Damping
from logra_kernels.errors import LograError
from logra_kernels.session.sensitivity import spearman
from logra_kernels.store import GradientStore


@pytest.fixture
def case(tmp_path):
    run, query = make_run(tmp_path / "s", projection=lk.Projection(rank=3), rows_per_shard=8)
    with run:
        yield run, query


@pytest.mark.parametrize("mode", influence.MODES)
def test_every_mode_from_the_definitions(case, mode):
    run, query = case
    dot, own = run.scores(query), run.self_influence()
    rows = run.stored([f"row{i}" for i in range(N)])
    solved = run._solved.factor(run.store).solve(rows.rows)
    exact = {
        "dot": dot,
        "relatif": dot / own.sqrt(),
        "theta-relatif": dot / solved.norm(dim=1),
        "l2": dot - own / 2,
    }[mode]
    torch.testing.assert_close(run.scores(query, mode), exact, rtol=1e-4, atol=1e-5)
    top = run.topk(query, 4, mode, layers=True)
    assert torch.equal(top.indices, run.scores(query, mode).topk(4).indices)
    torch.testing.assert_close(sum(top.layers.values()), top.values, rtol=1e-4, atol=1e-4)
    both = run.extremes(query, 4, mode)
    assert both[0].ids == top.ids
    assert both[1].ids == run.topk(query, 4, mode, largest=False).ids
    torch.testing.assert_close(sum(run.group_scores(query, ["0"], mode).values()), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["dot", "relatif", "theta-relatif"])
def test_search_by_an_index(case, mode):
    run, query = case
    one = lk.Query(query.ids[:1])
    one.rows = query.rows[:1]
    with pytest.raises(LograError, match="was not built; call store.build_index"):
        run.topk(one, 2, mode, search="index")
    info = run.build_index(dims=run.store.dim, k=2, mode=mode, samples=8)
    assert info.queries == 8
    assert info.recall[2] >= 0.8  # as many numbers as a row has, with signs, rounded to bf16
    found, exact = run.topk(one, 2, mode, search="index", layers=True), run.topk(one, 2, mode)
    every = run.scores(one, mode)
    torch.testing.assert_close(found.values, every.gather(1, found.indices), rtol=1e-4, atol=1e-5)
    assert set(found.ids[0]) & set(exact.ids[0])
    torch.testing.assert_close(sum(found.layers.values()), found.values, rtol=1e-4, atol=1e-4)


def test_what_an_index_cannot_serve(case):
    run, query = case
    for bad in ({"mode": "l2"}, {"rows": torch.ones(N, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="search='index' serves neither"):
            run.topk(query, 2, search="index", **bad)
    with pytest.raises(ValueError, match="search is 'fast'"):
        run.topk(query, 2, search="fast")
    with pytest.raises(ValueError, match="'l2' cannot be searched"):
        run.build_index(mode="l2")


def test_finalize_leaves_nothing_to_compute(case, monkeypatch):
    run, _ = case
    seen = []
    run.finalize(seen.append)
    assert sum(seen) == 2 * N
    with lk.Run(run.path, run.model) as again:
        seen.clear()
        again.finalize(seen.append)
        assert seen == []
        monkeypatch.setattr(lk.GradientStore, "blocks", None)
        stats = again.statistics()
    torch.testing.assert_close(stats.self_influence, run.self_influence(), rtol=0, atol=0)


def test_outliers_are_left_out(case):
    run, query = case
    stats = run.statistics()
    keep = influence.row_mask(stats.l2, quantile=0.9) & influence.row_mask(stats.l2_over_l1, quantile=0.9)
    assert 0 < int(keep.sum()) < N
    top = run.topk(query, N, rows=keep)
    assert sorted(top.indices[0].tolist()) == keep.nonzero()[:, 0].tolist()
    assert run.scores(query, rows=keep)[:, ~keep].isnan().all()
    table = run.value(query, rows=keep)
    assert sum(line.rows for line in table.lines) == int(keep.sum())


def test_value_by_a_column(case):
    run, query = case
    table = run.value(query)
    table.check()
    scores = run.scores(query).double()
    sources = run.store.columns["source"]
    for line in table.lines:
        mine = torch.tensor([s == line.source for s in sources])
        assert line.value == pytest.approx(float(scores[:, mine].sum()))
    with pytest.raises(ValueError, match="has no column 'owner'; it has source"):
        run.value(query, "owner")


def test_damping_sensitivity(case):
    run, query = case
    found = run.damping_sensitivity(query, [None, Damping(relative=0.1), 1e3, 1e-6], k=5)
    assert found.overlap.shape == found.correlation.shape == (4, 3)
    assert found.overlap[:2].min() == 1.0
    torch.testing.assert_close(found.correlation[:2], torch.ones(2, 3, dtype=torch.float64))
    assert float(found.correlation[2:].max()) < 1.0
    assert "default" in str(found)
    with pytest.raises(ValueError, match="at least one damping"):
        run.damping_sensitivity(query, [])
    with pytest.raises(ValueError, match="k is 0"):
        run.damping_sensitivity(query, [None], k=0)


def test_spearman_with_ties_is_the_textbooks():
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(0, 6, (2, 4, 30)).float()
    exact = torch.tensor([stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(spearman(a, b), exact.double())


def test_another_curvature(case):
    run, query = case
    with lk.Run(run.path, run.model, curvature="identity") as plain:
        torch.testing.assert_close(plain.scores(query), query.rows @ run.stored(run.store.ids).rows.T)
        torch.testing.assert_close(plain.self_influence(), plain.statistics().l2 ** 2)
    with pytest.raises(ValueError, match="curvature is 'exact'; it must be one of identity, raw"):
        lk.Run(run.path, run.model, curvature="exact")


def test_bad_questions_name_what_and_what_to_do(case):
    run, query = case
    with pytest.raises(ValueError, match=r"query: rows \(3, 5\).*\[3, 18\]: one for each id"):
        run.scores(lk.Query(query.ids, query.rows[:, :5]))
    with pytest.raises(ValueError, match=r"\[1, 18\]: one for each id"):
        run.topk(lk.Query(["q0"], query.rows))
    broken = query.rows.clone()
    broken[2, 4] = torch.inf
    for call in (run.scores, run.topk, run.extremes, run.group_scores, run.value):
        with pytest.raises(ValueError, match="query 'q2': its gradient holds NaN or infinity"):
            call(lk.Query(query.ids, broken))
    with pytest.raises(ValueError, match="mode is 'euclid'"):
        run.extremes(query, mode="euclid")
    with run.query(["early"]) as early:
        with pytest.raises(ValueError, match="'early' has no gradients yet: leave its `with`"):
            run.scores(early)
        torch.stack([p.sum() for p in (run.model(torch.ones(1, 2, 6)),)]).sum().backward()
    assert run.scores(early).shape == (1, N)
    with pytest.raises(LograError, match="must not be negative"):
        run.scores(query, damping=-1.0)
    assert run.scores(ask(run, 2)).shape == (2, N)


def test_rows_are_found_without_a_list_of_all_ids(tmp_path, monkeypatch):
    run, query = make_run(tmp_path / "s", projection=lk.Projection(rank=3))
    rows = run.store.read(0, N)
    monkeypatch.setattr(GradientStore, "ids", property(lambda self: pytest.fail("a list of all ids")))
    with run:
        assert torch.equal(run.stored(["row7", "row0", "row7"]).rows, rows[[7, 0, 7]])
        run.finalize()
        assert run.delete(iter(["row3", "row12"])) == 2
        assert torch.equal(run.stored(["row4"]).rows, rows[4:5])
        with pytest.raises(LograError, match="has no row 'row3'"):
            run.stored(["row3"])
        assert run.topk(query, 3).ids
