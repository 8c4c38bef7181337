"""Layers that share a block: against the dense formula over their columns side by side, in fp64."""

import pytest
import torch
from curvature.dense import block, damped
from session.models import N, ask, log_all, loss_of, make_data, make_model, make_run

import logra_kernels as lk
from logra_kernels.curvature import CURVATURES, Damping, RawFisher
from logra_kernels.store import GradientStore

LAYERS = {"a.q": (3, 2), "a.k": (2, 4), "b.q": (1, 5), "b.k": (2, 2)}
PARTS = dict(zip(LAYERS, torch.arange(23).split([6, 8, 5, 4]), strict=True))
GROUPS = {  # name: (groups, the blocks that they make)
    "side by side": (["a.*"], [["a.q", "a.k"], ["b.q"], ["b.k"]]),
    "apart": ({"queries": ["*.q"], "keys": ["a.k", "b.k"]}, [["a.q", "b.q"], ["a.k", "b.k"]]),
    "all": ({"all": "*"}, [list(LAYERS)]),
}
KINDS = ["identity", "raw", "raw-fp64", "diagonal", "shrunk", "lowrank"]
DAMPINGS = [None, 0.3, Damping(relative=0.7)]


def make_rows(count: int) -> torch.Tensor:
    return torch.randn(count, 23) * torch.linspace(0.1, 3, 23)


def write(path, rows: torch.Tensor) -> GradientStore:
    with GradientStore.create(path, LAYERS, rows_per_shard=8) as writer:
        writer.append(rows, [f"r{i}" for i in range(len(rows))])
    return GradientStore.open(path)


def dense(kind: str, rows: torch.Tensor, blocks, damping) -> torch.Tensor:
    """(H + lambda I), [D, D], from rows [N, D] fp64."""
    if kind == "identity":
        return torch.eye(23, dtype=torch.float64)
    found = torch.zeros(23, 23, dtype=torch.float64)
    for names in blocks:
        columns = torch.cat([PARTS[name] for name in names])
        part = rows[:, columns]
        h = block("raw" if kind == "shrunk" else kind, part, (1, len(columns)))
        if kind == "shrunk":
            h = h / 2 + torch.block_diag(*[block("kronecker", rows[:, PARTS[n]], LAYERS[n]) for n in names]) / 2
        found[columns[:, None], columns] = damped(h, damping)
    return found


@pytest.mark.parametrize("count", [40, 7], ids=["more rows than dims", "fewer"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_solve_whiten_and_quadratic(tmp_path, kind, groups, count):
    given, blocks = GROUPS[groups]
    rows = make_rows(count)
    made = CURVATURES[kind].joining(given).of(write(tmp_path / "s", rows))
    queries = torch.randn(4, 23)
    for damping in DAMPINGS:
        factor = made.factorize(damping)
        exact = torch.linalg.solve(dense(kind, rows.double(), blocks, damping), queries.double().T).T
        largest = exact.abs().max().item()
        torch.testing.assert_close(factor.solve(queries).double(), exact, rtol=1e-5, atol=1e-5 * largest)
        products = exact @ queries.double().T
        white = factor.whiten(queries).double()
        torch.testing.assert_close(white @ white.T, products, rtol=1e-5, atol=1e-5 * products.abs().max().item())
        torch.testing.assert_close(factor.quadratic(queries), products.diagonal(), rtol=1e-5, atol=0)


def test_damping_of_the_whole_layers_is_their_mean_over_the_blocks_columns():
    made = RawFisher.joining(["a.*"])(LAYERS, 1, {}, {})
    damping = Damping.of(Damping(whole=2.0), {"a.q": 0.5, "a.k": 0.25})
    made.means = {"a.q": 3.0, "a.k": 4.0}
    assert made.added("a.*", damping) == pytest.approx(2 * (6 * 3 * 0.5 + 8 * 4 * 0.25) / 14)


@pytest.mark.parametrize("kind", ["raw", "shrunk", "diagonal", "lowrank"])
def test_kept_apart_from_the_blocks_of_one_layer_and_following_the_rows(tmp_path, kind):
    rows, queries = make_rows(40), torch.randn(3, 23)
    store = write(tmp_path / "s", rows)
    single, joined = CURVATURES[kind], CURVATURES[kind].joining({"q": ["*.q"]})
    apart, together = (made.of(store).factorize() for made in (single, joined))
    assert apart.hash != together.hash
    assert kind == "diagonal" or not torch.allclose(apart.solve(queries), together.solve(queries), rtol=1e-3)
    seen: list[int] = []
    assert torch.equal(joined.of(store, seen.append).factorize().solve(queries), together.solve(queries))
    assert not seen
    with GradientStore.open(store.path, mode="append") as writer:
        writer.append(rows[:9] * 2, [f"more{i}" for i in range(9)])
    grown = joined.of(GradientStore.open(store.path)).factorize().solve(queries)
    fresh = joined.of(write(tmp_path / "f", torch.cat([rows, rows[:9] * 2]))).factorize().solve(queries)
    torch.testing.assert_close(grown, fresh, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["kronecker", "corrected-kronecker", "kfac", "ekfac"])
def test_a_kronecker_product_has_no_such_block(tmp_path, kind):
    with pytest.raises(ValueError, match=f"{kind!r} is a Kronecker product of one layer's sides.*use identity, raw"):
        lk.Run(tmp_path / "s", make_model(), curvature=kind, blocks=["*"])


def test_blocks_that_do_not_fit_the_layers(tmp_path):
    for blocks, message in (
        (["3.*"], "'3.*' of '3.*' matches none of the 2 layers"),
        ({"one": ["0"], "two": ["*"]}, "layer '0' is in 'one' and in 'two'"),
        ({"2": ["0"]}, "'2' is the name of a layer that is not in it"),
        ("*", "is one string"),
    ):
        with pytest.raises(ValueError, match=message.replace("*", r"\*")):
            lk.Run(tmp_path / "s", make_model(), blocks=blocks)


@pytest.mark.parametrize("kind", ["raw", "fisher", "shrunk"])
def test_a_session_sums_such_blocks_while_logging_and_takes_deleted_rows_out(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 4)
    options = {"projection": lk.Projection(rank=2), "blocks": {"all": ["*"]}, "curvature": kind}
    x, target = make_data()

    def watch(run):
        if kind == "fisher":
            with run.observe_fisher():
                loss_of(run.model, x, target).backward()

    with lk.Run(tmp_path / "s", make_model(), fisher_while_logging=True, **options) as run:
        log_all(run)
        watch(run)
        query = ask(run)
        run.commit()
        with monkeypatch.context() as patch:
            if kind != "shrunk":  # its other part takes a pass
                patch.setattr(GradientStore, "blocks", lambda self: pytest.fail("a pass over the store"))
            first = run.scores(query)
        rows = run.store.read(0, N).double()
        own = block("kronecker", rows[:, :4], (2, 2)), block("kronecker", rows[:, 4:], (2, 2))
        h = rows.T @ rows / N
        h = (h + torch.block_diag(*own)) / 2 if kind == "shrunk" else h
        exact = query.rows.double() @ torch.linalg.solve(damped(h, None), rows.T)
        torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
        run.delete(["row3", "row12"])
        got = run.scores(query, "relatif")
    with lk.Run(tmp_path / "w", make_model(), **options) as without:
        log_all(without, [i for i in range(N) if i not in (3, 12)])
        watch(without)
        torch.testing.assert_close(got, without.scores(query, "relatif"), rtol=1e-4, atol=1e-5)


def test_parts_of_layers_add_up_where_they_share_a_block(tmp_path):
    run, query = make_run(tmp_path / "s", projection=lk.Projection(rank=3), blocks=["*"])
    with run:
        for mode in ("dot", "relatif", "theta-relatif", "l2"):
            parts = run.group_scores(query, mode=mode)
            assert list(parts) == ["0", "2"]
            torch.testing.assert_close(sum(parts.values()), run.scores(query, mode), rtol=1e-4, atol=1e-5)
