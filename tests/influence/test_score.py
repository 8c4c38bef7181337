"""Modes, ends, masks and groups against the textbook formulas."""

import pytest
import torch
from influence.dense import LAYERS, WIDTHS, N, exact_scores, inverse, make_store

from logra_kernels import influence
from logra_kernels.curvature import Damping, RawFisher
from logra_kernels.store import GradientStore


@pytest.fixture
def case(tmp_path):
    return make_store(tmp_path / "s")


def asked(store, queries, mode, damping=None):
    factor = RawFisher.of(store).factorize(damping)
    return (
        factor,
        factor.solve(queries),
        influence.row_statistics(store, factor, influence.NEEDS[mode], damping=damping),
    )


def close(got, exact, rtol=1e-6):
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=rtol * exact.abs().max().item())


@pytest.mark.parametrize("damping", [None, 0.5])
@pytest.mark.parametrize("mode", influence.MODES)
def test_modes_ends_and_masks(case, mode, damping):
    store, rows, queries = case
    _, solved, own = asked(store, queries, mode, damping)
    exact = exact_scores(rows, queries, mode, damping)
    got = influence.scores(store, solved, mode, own)
    close(got, exact)
    top, bottom = influence.extremes(store, solved, 5, mode, own)
    assert torch.equal(top.indices, exact.argsort(dim=1, descending=True)[:, :5])
    assert torch.equal(bottom.indices, exact.argsort(dim=1)[:, :5])
    assert top.ids == [[f"r{i}" for i in row] for row in top.indices.tolist()]
    for found, largest in ((top, True), (bottom, False)):
        one = influence.topk(store, solved, 5, mode, own, largest=largest)
        assert torch.equal(one.indices, found.indices)
        torch.testing.assert_close(one.values, found.values)

    keep = torch.arange(N) % 3 != 0
    masked = influence.scores(store, solved, mode, own, rows=keep)
    assert torch.equal(masked.isnan(), ~keep.expand(3, -1))
    torch.testing.assert_close(masked[:, keep], got[:, keep], rtol=0, atol=0)
    kept = influence.topk(store, solved, 4, mode, own, rows=keep)
    assert torch.equal(kept.indices, exact.masked_fill(~keep, -torch.inf).argsort(dim=1, descending=True)[:, :4])
    few = influence.topk(store, solved, 9, mode, own, rows=torch.arange(N) == 11)
    assert few.ids == [["r11"]] * 3


@pytest.mark.parametrize("mode", ["dot", "l2"])
@pytest.mark.parametrize("rank_c", [1, 3])
def test_ends_and_masks_of_rows_kept_as_factors(tmp_path, rank_c, mode):
    with GradientStore.create(tmp_path / "s", {"a": (16, 16)}, rank_c=rank_c, rows_per_shard=16) as writer:
        writer.append(torch.randn(40, 256), [str(i) for i in range(40)])
    store, queries, keep = GradientStore.open(tmp_path / "s"), torch.randn(3, 256), torch.arange(40) % 3 != 0
    own = {"self_influence": torch.rand(40)}
    exact = queries.double() @ store.read(0, 40).double().T - (own["self_influence"] / 2 if mode == "l2" else 0)
    top, bottom = influence.extremes(store, queries, 5, mode, own)
    assert torch.equal(top.indices, exact.argsort(dim=1, descending=True)[:, :5])
    assert torch.equal(bottom.indices, exact.argsort(dim=1)[:, :5])
    kept = influence.topk(store, queries, 4, mode, own, rows=keep)
    assert torch.equal(kept.indices, exact.masked_fill(~keep, -torch.inf).argsort(dim=1, descending=True)[:, :4])
    torch.testing.assert_close(kept.values.double(), exact.gather(1, kept.indices), rtol=1e-4, atol=1e-4)


def test_query_formats_of_quantised_rows(tmp_path):
    dim, keep = 300, torch.arange(40) % 3 != 0
    with GradientStore.create(tmp_path / "s", {"a": (1, dim)}, "int8", rows_per_shard=16) as writer:
        writer.append(torch.randn(40, dim), [str(i) for i in range(40)])
    store, queries = GradientStore.open(tmp_path / "s"), torch.randn(3, dim)
    wanted = store.score(queries, query_format="int8")
    assert not torch.equal(wanted, store.score(queries, query_format="fp32"))
    for rows, scores in ((None, wanted), (keep, wanted.masked_fill(~keep, -torch.inf))):
        found = influence.topk(store, queries, 5, "dot", rows=rows, query_format="int8")
        torch.testing.assert_close(found.values, scores.topk(5).values)
        torch.testing.assert_close(wanted.gather(1, found.indices), found.values)
    with pytest.raises(ValueError, match="search='index' serves neither .* query_format"):
        influence.topk(store, queries, 5, "dot", search="index", query_format="int8")


def test_ties_keep_row_order_over_blocks(tmp_path, monkeypatch):
    with GradientStore.create(tmp_path / "s", {"a": (1, 2)}, rows_per_shard=4) as writer:
        writer.append(torch.ones(11, 2), [f"r{i}" for i in range(11)])
    store = GradientStore.open(tmp_path / "s")
    monkeypatch.setattr("logra_kernels.influence.score._BYTES", 24)  # 3 rows a block
    top, bottom = influence.extremes(store, torch.ones(1, 2), 5, "dot")
    assert top.indices.tolist() == bottom.indices.tolist() == [[0, 1, 2, 3, 4]]
    assert influence.TopK.of(torch.tensor([[2.0, torch.nan, 2.0]]), ["x", "y", "z"], 2).ids == [["x", "z"]]


@pytest.mark.parametrize("mode", influence.MODES)
def test_groups_add_up_to_the_score(case, mode):
    store, _, queries = case
    factor, solved, own = asked(store, queries, mode)
    whole = influence.scores(store, solved, mode, own)
    every = influence.group_scores(store, solved, None, mode, own, factor=factor)
    assert list(every) == list(LAYERS)
    close(sum(every.values()), whole.double())
    named = influence.group_scores(store, solved, {"first": ["a.*"]}, mode, own, factor=factor)
    assert list(named) == ["first", "other layers"]
    close(named["first"], (every["a.up"] + every["a.down"]).double())
    listed = influence.group_scores(store, solved, ["*.up", "a.down"], mode, own, factor=factor)
    assert list(listed) == ["*.up", "a.down"]
    close(sum(listed.values()), whole.double())
    indices = torch.tensor([[0, 5], [7, 7], [36, 1]])
    parts = influence.layer_scores(store, solved, indices, mode, own, factor=factor)
    for name, part in parts.items():
        close(part, every[name].gather(1, indices).double())


def test_a_group_is_the_textbook_score_of_its_layers_alone(case):
    store, rows, queries = case
    _, solved, _ = asked(store, queries, "dot")
    h = inverse(rows)[:12, :12]
    exact = queries.double()[:, :12] @ h @ rows[:, :12].T
    close(influence.group_scores(store, solved)["a.up"], exact)
    keep = torch.arange(N) < 5
    assert influence.group_scores(store, solved, rows=keep)["a.up"].isnan().sum() == 3 * (N - 5)


def test_statistics_are_those_of_dense_rows_from_one_pass(case, monkeypatch):
    store, rows, _ = case
    factor = RawFisher.of(store).factorize()
    passes = []
    blocks = GradientStore.blocks
    monkeypatch.setattr(GradientStore, "blocks", lambda self, *a: passes.append(1) or blocks(self, *a))
    names = ("self_influence", "solved_norm", "l2", "l1")
    got = influence.row_statistics(store, factor, names)
    assert len(passes) == 1
    again = influence.row_statistics(GradientStore.open(store.path), factor, names)
    assert len(passes) == 1, "kept statistics were computed again"
    h = inverse(rows)
    exact = {
        "self_influence": torch.einsum("nd,de,ne->n", rows, h, rows),
        "solved_norm": (rows @ h).norm(dim=1),
        "l2": rows.norm(dim=1),
        "l1": rows.abs().sum(1),
    }
    for name in names:
        torch.testing.assert_close(got[name].double(), exact[name], rtol=2e-6, atol=0)
        assert torch.equal(again[name], got[name])
    ratio = influence.RowStatistics(got["self_influence"], got["l2"], got["l1"]).l2_over_l1
    torch.testing.assert_close(ratio.double(), exact["l2"] / exact["l1"], rtol=1e-6, atol=0)


def test_no_statistic_is_ever_stale(case):
    store, rows, _ = case
    raw = RawFisher.of(store)

    def own(store, damping, curvature="raw", fisher=raw):
        factor = fisher.factorize(damping)
        return influence.self_influence(store, factor, damping, curvature=curvature)

    first = own(store, None)
    for damping in (0.5, 2.0, Damping(relative=1.0)):
        assert not torch.equal(own(store, damping), first)
    assert torch.equal(own(store, None), first)
    exact = torch.einsum("nd,de,ne->n", rows, inverse(rows, 2.0), rows)
    torch.testing.assert_close(own(store, 2.0).double(), exact, rtol=2e-6, atol=0)

    other = raw.factorize(Damping(relative=0.7))  # the default's name with another damping in fact
    assert not torch.equal(influence.self_influence(store, other), first)

    with GradientStore.open(store.path, mode="append") as writer:
        writer.append(torch.randn(2, sum(WIDTHS)), ["new0", "new1"], {"source": ["s", "s"]})
    grown = GradientStore.open(store.path)
    assert own(grown, None, fisher=RawFisher.of(grown)).shape == (N + 2,)


def test_row_without_gradient_scores_zero_in_every_mode(tmp_path):
    rows = torch.randn(9, 4)
    rows[4] = 0
    with GradientStore.create(tmp_path / "s", {"a": (2, 2)}) as writer:
        writer.append(rows, [str(i) for i in range(9)])
    store = GradientStore.open(tmp_path / "s")
    for mode in influence.MODES:
        _, solved, own = asked(store, torch.randn(2, 4), mode)
        got = influence.scores(store, solved, mode, own)
        assert got.isfinite().all()
        assert got[:, 4].abs().max() == 0
    norms = influence.row_statistics(store, None, ("l2", "l1"))
    assert influence.RowStatistics(norms["l2"], **norms).l2_over_l1[4] == 0


def test_bf16_rows(tmp_path):
    store, rows, queries = make_store(tmp_path / "s", "bf16")
    for mode in influence.MODES:
        factor, solved, own = asked(store, queries, mode)
        exact = exact_scores(rows, queries, mode)
        close(influence.scores(store, solved, mode, own), exact, 1e-4)
        top, _ = influence.extremes(store, solved, 3, mode, own)
        close(top.values, exact.topk(3).values, 1e-4)
        close(sum(influence.group_scores(store, solved, None, mode, own, factor=factor).values()), exact, 1e-4)


def test_row_masks():
    values = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0])
    assert influence.row_mask(values, quantile=0.75).tolist() == [False, True, True, True, True]
    assert influence.row_mask(values, quantile=1.0).all()
    assert influence.row_mask(values, at_most=3.0, at_least=2.0).tolist() == [False, False, True, True, False]
    for bad in ({}, {"quantile": 1.5}):
        with pytest.raises(ValueError, match="row_mask"):
            influence.row_mask(values, **bad)
    with pytest.raises(ValueError, match=r"values \(1, 5\) must be \[N\]"):
        influence.row_mask(values[None], quantile=0.5)


def test_bad_input_names_what_and_what_to_do(case):
    store, _, queries = case
    factor, solved, _ = asked(store, queries, "dot")
    with pytest.raises(ValueError, match="mode is 'cosine'; it must be one of dot, relatif, theta-relatif, l2"):
        influence.scores(store, solved, "cosine")
    with pytest.raises(ValueError, match=r"queries \(3, 27\) must be \[Q, 28\]"):
        influence.topk(store, solved[:, 1:], 2, "dot")
    bad = solved.clone()
    bad[1, 3] = torch.nan
    for call in (influence.scores, influence.group_scores, lambda s, q: influence.topk(s, q, 2, "dot")):
        with pytest.raises(ValueError, match="query 1 of 3 holds NaN"):
            call(store, bad)
    with pytest.raises(ValueError, match="'relatif' needs self_influence of every row, .37., and got none"):
        influence.topk(store, solved, 2, "relatif")
    with pytest.raises(ValueError, match="and got .36,"):
        influence.topk(store, solved, 2, "l2", {"self_influence": torch.ones(36)})
    for k in (0, 2.5):
        with pytest.raises(ValueError, match=f"k is {k}"):
            influence.extremes(store, solved, k, "dot")
        with pytest.raises(ValueError, match=f"k is {k}"):
            influence.topk(store, solved, k, "dot")
    with pytest.raises(ValueError, match=r"rows is \(37,\) torch.float32; it must be a bool mask \[37\]"):
        influence.topk(store, solved, 2, "dot", rows=torch.ones(N))
    with pytest.raises(ValueError, match="rows is list"):
        influence.scores(store, solved, rows=[True] * N)
    with pytest.raises(ValueError, match="keeps no row"):
        influence.scores(store, solved, rows=torch.zeros(N, dtype=torch.bool))
    with pytest.raises(ValueError, match="'c.*' of 'c.*' matches none of the 3 layers"):
        influence.group_scores(store, solved, ["c.*"])
    with pytest.raises(ValueError, match="layer 'a.up' is in 'x' and in 'y'"):
        influence.group_scores(store, solved, {"x": ["a.*"], "y": ["*.up"]})
    with pytest.raises(ValueError, match="is one string"):
        influence.group_scores(store, solved, "a.*")
    with pytest.raises(ValueError, match=r"statistics \['l3'\] are unknown"):
        influence.row_statistics(store, factor, ["l3"])
    with pytest.raises(ValueError, match="'self_influence' needs a factorised curvature"):
        influence.row_statistics(store, None, ["self_influence"])
    own = influence.row_statistics(store, factor, ["self_influence"])
    with pytest.raises(ValueError, match="mode 'l2' need the factorised curvature"):
        influence.group_scores(store, solved, None, "l2", own)


@pytest.mark.parametrize("mode", ["dot", "relatif", "l2"])
def test_groups_as_if_each_were_the_whole_model(case, mode):
    store, rows, queries = case
    factor = RawFisher.of(store).factorize()
    parts = {name: [store.slices[name]] for name in LAYERS}
    groups = {"a": parts["a.up"] + parts["a.down"], "up": parts["a.up"] + parts["b.up"], "b.up": parts["b.up"]}
    got = influence.separate_scores(factor.solve(queries), rows.float(), factor, groups, mode)
    own = influence.separate_self_influence(rows.float(), factor, groups)
    h = inverse(rows)
    for group, columns in groups.items():
        inside = torch.zeros(rows.shape[1], dtype=torch.float64)
        for part in columns:
            inside[part] = 1
        dot, self_influence = (
            (queries.double() * inside) @ h @ rows.T,
            torch.einsum("nd,de,ne->n", rows * inside, h, rows * inside),
        )
        exact = {"dot": dot, "relatif": dot / self_influence.sqrt(), "l2": dot - self_influence / 2}[mode]
        close(got[group], exact, rtol=1e-5)
        close(own[group], self_influence, rtol=1e-5)
    with pytest.raises(ValueError, match="needs solved_norm"):
        influence.separate_scores(factor.solve(queries), rows.float(), factor, groups, "theta-relatif")
