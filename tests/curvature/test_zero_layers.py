"""A layer without gradients has no part in any score, and gradients that are all but zero give no NaN."""

import pytest
import torch

from logra_kernels import influence
from logra_kernels.cli.main import main
from logra_kernels.curvature import CURVATURES, Damping
from logra_kernels.errors import LograError, StoreError
from logra_kernels.store import GradientStore, quantize

LAYERS = {"a": (3, 4), "dead": (2, 3), "b": (2, 5)}
DEAD = torch.zeros(28, dtype=torch.bool)
DEAD[12:18] = True
FROM_ROWS = [kind for kind in CURVATURES if kind not in ("identity", "kfac", "ekfac", "fisher", "fisher-fp64")]
JOINING = [kind for kind in FROM_ROWS if "kronecker" not in kind]
DAMPINGS = [None, 0.3, Damping(relative=0.7), Damping(whole=2.0)]


def write(path, rows, layers, **options) -> GradientStore:
    with GradientStore.create(path, layers, rows_per_shard=8, **options) as writer:
        writer.append(rows, [f"r{i}" for i in range(len(rows))])
    return GradientStore.open(path)


def pair(path, count: int) -> tuple[GradientStore, GradientStore]:
    """A store with the dead layer, and one of the same rows without it."""
    rows = torch.randn(count, 28) * torch.linspace(0.1, 3, 28)
    rows[:, DEAD] = 0
    others = {name: k for name, k in LAYERS.items() if name != "dead"}
    return write(path / "with", rows, LAYERS), write(path / "without", rows[:, ~DEAD], others)


def same_without(store, other, kind, damping):
    """Every solve is that of the store which never had the layer, and 0 in its columns."""
    factor, exact = (kind.of(one).factorize(damping) for one in (store, other))
    queries = torch.randn(4, 28)
    for ours, theirs in (
        (factor.solve, exact.solve),
        (factor.solve_toward_stored, exact.solve_toward_stored),
        (factor.whiten, exact.whiten),
    ):
        got, wanted = ours(queries), theirs(queries[:, ~DEAD])
        assert torch.equal(got[:, DEAD], torch.zeros(4, 6))
        torch.testing.assert_close(got[:, ~DEAD], wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(factor.quadratic(queries), exact.quadratic(queries[:, ~DEAD]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [37, 7], ids=["more rows than dims", "fewer"])
@pytest.mark.parametrize("kind", FROM_ROWS)
def test_other_layers_are_solved_for_as_if_it_were_not_there(tmp_path, kind, count):
    store, other = pair(tmp_path, count)
    for damping in DAMPINGS:
        same_without(store, other, CURVATURES[kind], damping)


@pytest.mark.parametrize("count", [37, 7], ids=["more rows than dims", "fewer"])
@pytest.mark.parametrize("kind", JOINING)
def test_in_a_block_with_others(tmp_path, kind, count):
    store, other = pair(tmp_path, count)
    for damping in DAMPINGS:
        same_without(store, other, CURVATURES[kind].joining({"all": "*"}), damping)
    alone = CURVATURES[kind].joining({"none": ["dead"]}).of(store)
    assert alone.zero == {"dead"}
    assert torch.equal(alone.factorize().solve(torch.randn(2, 28))[:, DEAD], torch.zeros(2, 6))


def test_a_layer_of_which_one_row_has_a_gradient_is_none_of_these(tmp_path):
    rows = torch.randn(20, 28)
    rows[:, DEAD] = 0
    rows[3, 15] = 1e-30
    store = write(tmp_path / "s", rows, LAYERS)
    for kind in FROM_ROWS:
        if kind in ("raw", "shrunk"):
            with pytest.raises(LograError, match="layer 'dead' are so small that their squares vanish in fp32"):
                CURVATURES[kind].of(store)
        else:
            made = CURVATURES[kind].of(store)
            assert not made.zero
            got = made.factorize().solve(rows)
            assert got.isfinite().all()
            assert got[3, 15] > 1e28


@pytest.mark.parametrize("size", [1e-15, 1e-25, 1e-36, 1e-43])
@pytest.mark.parametrize("kind", FROM_ROWS)
def test_tiny_gradients_give_the_number_or_an_error(tmp_path, kind, size):
    rows = torch.randn(20, 28)
    large = influence_of(write(tmp_path / "large", rows, LAYERS), kind)
    small = rows.clone()
    small[:, DEAD] *= size
    store = write(tmp_path / "small", small, LAYERS)
    try:
        got = influence_of(store, kind)
    except LograError as error:
        assert size < 1e-20
        assert "'dead'" in str(error)
        assert "so small" in str(error) or "too small" in str(error)
        return
    tolerance = 1e-3 if size > 1e-36 else 0.05  # of subnormal numbers few digits are left
    for mine, wanted in zip(got, large, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def influence_of(store, kind):
    """Scores of the store's own rows by each other in every mode; what does not depend on a layer's unit."""
    factor = CURVATURES[kind].of(store).factorize()
    own = influence.row_statistics(store, factor, ("self_influence", "solved_norm"), curvature=kind)
    solved = factor.solve_toward_stored(store.read(0, 5))
    found = [influence.scores(store, solved, mode, own) for mode in influence.MODES if mode != "theta-relatif"]
    assert influence.scores(store, solved, "theta-relatif", own).isfinite().all()
    assert all(one.isfinite().all() for one in found)
    return found


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-42])
def test_a_row_that_is_zero_or_nearly_so_scores_no_nan(tmp_path, size):
    rows = torch.randn(40, 28)
    rows[4] *= size
    store = write(tmp_path / "s", rows, LAYERS)
    factor = CURVATURES["raw"].of(store).factorize()
    own = influence.row_statistics(store, factor, ("self_influence", "solved_norm", "l2", "l1"))
    solved = factor.solve_toward_stored(torch.randn(3, 28))
    for mode in influence.MODES:
        scores = influence.scores(store, solved, mode, own)
        assert scores.isfinite().all()
        top = influence.topk(store, solved, 40, mode, own)
        assert top.values.isfinite().all()
        assert sorted(top.indices[0].tolist()) == list(range(40))
        if not size:
            assert torch.equal(scores[:, 4], torch.zeros(3))
    assert influence.RowStatistics(own["self_influence"], own["l2"], own["l1"]).l2_over_l1.isfinite().all()


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4", "sign"])
def test_whitened(tmp_path, dtype):
    store, other = pair(tmp_path, 60)
    queries = torch.randn(3, 28)
    found = []
    for name, one in (("with", store), ("without", other)):
        curvature = CURVATURES["shrunk"].of(one)
        small = quantize(one.path, tmp_path / f"{name}-small", dtype, whitening=influence.whitening_of(curvature))
        mine = queries if name == "with" else queries[:, ~DEAD]
        factor = influence.whitened_factor(small, "shrunk", None)
        own = influence.row_statistics(small, factor, ("self_influence",))
        found.append(influence.scores(small, factor.solve_toward_stored(mine), "relatif", own))
        back = small.whitening.undo(small.read(0, 60))
        assert back.isfinite().all()
        if name == "with":
            assert not back[:, DEAD].any()
            with pytest.raises(
                StoreError, match=r"no row had a gradient in layer 'dead'.*log them into a store of raw"
            ):
                small.whitening.apply_new(torch.randn(2, 28))
            one_more = torch.where(DEAD, 0.0, torch.randn(2, 28))
            assert torch.equal(small.whitening.apply_new(one_more), small.whitening.apply(one_more))
    tolerance = 1e-4 if dtype == "fp32" else 0.3  # scales are shared by other numbers
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance * found[1].abs().max().item())


def test_a_map_that_would_overflow(tmp_path):
    rows = torch.randn(40, 28)
    rows[:, DEAD] = 0
    rows[::2, 12] = 1.5e-44
    curvature = CURVATURES["kronecker"].of(write(tmp_path / "s", rows, LAYERS))
    with pytest.raises(LograError, match="layer 'dead' are so small that its map overflows"):
        influence.whitening_of(curvature)


def test_what_is_found_is_kept_with_the_rows(tmp_path, monkeypatch, capsys):
    store, _ = pair(tmp_path, 37)
    assert CURVATURES["raw"].of(store).zero == {"dead"}
    with monkeypatch.context() as patch:
        patch.setattr("logra_kernels.store.reading.zero.sum_over_ranks", lambda *args: pytest.fail("another pass"))
        assert CURVATURES["raw"].of(GradientStore.open(store.path)).zero == {"dead"}
    assert main(["info", str(store.path)]) == 0
    assert "dead   all zero" in capsys.readouterr().out
    with GradientStore.open(store.path, mode="append") as writer:
        writer.append(torch.randn(3, 28), ["x", "y", "z"])
    assert not CURVATURES["raw"].of(GradientStore.open(store.path)).zero


@pytest.mark.parametrize("kind", ["raw", "shrunk", "diagonal", "kronecker"])
def test_a_layer_whose_only_gradients_are_deleted(tmp_path, kind, monkeypatch):
    """Sums from which the rows are taken out again would leave their rounding."""
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 4)
    rows = torch.randn(64, 28)
    rows[:, DEAD] = 0
    rows[5:9, DEAD] = torch.randn(4, 6)
    before = write(tmp_path / "s", rows, LAYERS)
    CURVATURES[kind].of(before)
    with GradientStore.open(before.path, mode="append") as writer:
        writer.delete([f"r{i}" for i in range(5, 9)])
    after = GradientStore.open(before.path)
    CURVATURES[kind].downdate(before, after, [5, 6, 7, 8])
    made = CURVATURES[kind].of(GradientStore.open(before.path))
    assert made.zero == {"dead"}
    assert made.factorize().solve(torch.randn(2, 28)).isfinite().all()


def test_sums_that_lose_their_digits_are_made_anew(tmp_path):
    rows = torch.randn(64, 28)
    rows[3, :12] *= 1e4
    before = write(tmp_path / "s", rows, LAYERS)
    CURVATURES["raw"].of(before)
    with GradientStore.open(before.path, mode="append") as writer:
        writer.delete(["r3"])
    after = GradientStore.open(before.path)
    CURVATURES["raw"].downdate(before, after, [3])
    left = torch.cat([rows[:3], rows[4:]])[:, :12].double()
    got = CURVATURES["raw"].of(GradientStore.open(before.path)).blocks["a"].double()
    torch.testing.assert_close(got, left.T @ left / 63, rtol=1e-5, atol=1e-5)
