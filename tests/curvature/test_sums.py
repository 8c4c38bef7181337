"""Gram sums: the same bits whatever the batches were, gone on from, downdated, and never another store's."""

import pytest
import torch
from session.models import N, ask, log_all, loss_of, make_data, make_model

import logra_kernels as lk
from logra_kernels.curvature import CURVATURES, GramSums, RawFisher, RawFisher64
from logra_kernels.curvature.sums import PANEL
from logra_kernels.store import GradientStore

LAYERS = {"a": (3, 4), "b": (2, 5)}
COUNT = 2 * PANEL + 37


def make_rows(count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, 22) * torch.linspace(0.1, 3, 22)


def write(path, rows, dtype="fp32", mode="create", first=0):
    if mode == "create":
        GradientStore.create(path, LAYERS, dtype, rows_per_shard=100).close()
    with GradientStore.open(path, mode="append") as writer:
        writer.append(rows, [f"r{first + i}" for i in range(len(rows))])
    return GradientStore.open(path)


def assert_same_bits(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("cuts", [[1] * 40, [PANEL - 1, 2, PANEL], [COUNT], [100, 300, 149]])
def test_batches_do_not_change_a_bit(cuts, threads):
    rows, parts = make_rows(), {"a": slice(0, 12), "b": slice(12, 22)}
    whole = GramSums(parts)
    whole.add(rows)
    threads(2)
    cut = GramSums(parts)
    for part in rows.split([*cuts, COUNT - sum(cuts)]):
        cut.add(part)
    assert cut.rows == whole.rows == COUNT
    assert_same_bits(cut.total(), whole.total())
    exact = rows[:, :12].double().T @ rows[:, :12].double()
    torch.testing.assert_close(whole.total()["a"].double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_appended_rows_are_added_to_the_same_bits_as_a_pass_over_all(tmp_path, dtype, monkeypatch):
    rows = make_rows()
    RawFisher.of(write(tmp_path / "s", rows[:310], dtype))
    store = write(tmp_path / "s", rows[310:], dtype, "append", 310)
    read = []
    monkeypatch.setattr(GradientStore, "blocks", lambda self: pytest.fail("all rows were read again"))
    found = RawFisher.of(store, read.append)
    assert sum(read) == COUNT - PANEL
    monkeypatch.undo()
    fresh = write(tmp_path / "fresh", rows, dtype)
    assert_same_bits(found.blocks, RawFisher.of(fresh).blocks)
    again = []
    assert_same_bits(RawFisher.of(GradientStore.open(store.path), again.append).blocks, found.blocks)
    assert not again


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "shrunk", "corrected-kronecker"])
def test_what_is_a_sum_over_rows_goes_on_from_what_is_kept(tmp_path, kind, monkeypatch):
    rows, queries = make_rows(), torch.randn(3, 22)
    store = write(tmp_path / "s", rows[:310])
    CURVATURES[kind].of(store)
    store = write(tmp_path / "s", rows[310:], mode="append", first=310)
    passes = watch_passes(monkeypatch)
    grown = CURVATURES[kind].of(store).factorize().solve(queries)
    assert len(passes) == (kind == "corrected-kronecker"), "eigenvalues in the new basis, and nothing else"
    gone = [3, 77, 300, 540]
    with GradientStore.open(store.path, mode="append") as writer:
        writer.delete([f"r{i}" for i in gone])
    smaller = GradientStore.open(store.path)
    for each in CURVATURES.values():
        each.downdate(store, smaller, gone)
    del passes[:]
    downdated = CURVATURES[kind].of(smaller).factorize().solve(queries)
    assert len(passes) == (kind == "corrected-kronecker")
    monkeypatch.undo()
    for got, name, left in (
        (grown, "all", rows),
        (downdated, "left", rows[[i for i in range(COUNT) if i not in gone]]),
    ):
        fresh = CURVATURES[kind].of(write(tmp_path / name, left)).factorize().solve(queries)
        torch.testing.assert_close(got, fresh, rtol=1e-5, atol=1e-5 * fresh.abs().max().item())


def watch_passes(monkeypatch) -> list[int]:
    """A list that gets an entry for every pass over a whole store."""
    passes: list[int] = []
    blocks = GradientStore.blocks
    monkeypatch.setattr(GradientStore, "blocks", lambda self: passes.append(len(self)) or blocks(self))
    return passes


def test_other_rows_of_the_same_number_start_anew(tmp_path):
    rows = make_rows()
    kept = RawFisher.of(write(tmp_path / "one", rows)).blocks
    other = write(tmp_path / "two", rows.flip(0))
    (tmp_path / "two" / "sidecars").mkdir(exist_ok=True)
    for file in (tmp_path / "one" / "sidecars").iterdir():
        (tmp_path / "two" / "sidecars" / file.name).write_bytes(file.read_bytes())
    found = RawFisher.of(other).blocks
    assert any(not torch.equal(found[name], kept[name]) for name in found)
    (tmp_path / "two" / "sidecars").rename(tmp_path / "gone")
    assert_same_bits(found, RawFisher.of(GradientStore.open(other.path)).blocks)


def test_sums_in_fp64(tmp_path):
    rows = make_rows()
    blocks = RawFisher64.of(write(tmp_path / "s", rows)).blocks
    exact = rows[:, 12:].double().T @ rows[:, 12:].double() / COUNT
    torch.testing.assert_close(blocks["b"], exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_summed_while_logging_it_is_the_pass_over_the_store(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 8)
    monkeypatch.setattr(GradientStore, "blocks", lambda self: pytest.fail("a pass over the store"))
    options = {"projection": lk.Projection(rank=3), "dtype": dtype, "curvature": "raw", "fisher_while_logging": True}
    with lk.Run(tmp_path / "s", make_model(), **options) as run:
        log_all(run)
        found = RawFisher.of(run.commit()).blocks
    monkeypatch.undo()
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 8)
    for file in (run.store.path / "sidecars").iterdir():
        file.unlink()
    assert_same_bits(found, RawFisher.of(GradientStore.open(run.store.path)).blocks)


def test_a_resumed_logging_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 8)
    options = {"projection": lk.Projection(rank=3), "fisher_while_logging": True}
    with lk.Run(tmp_path / "s", make_model(), **options) as run:
        log_all(run, list(range(11)))
    with lk.Run(tmp_path / "s", make_model(), **options) as run:
        log_all(run)
        resumed = RawFisher.of(run.commit()).blocks
    with lk.Run(tmp_path / "whole", make_model(), projection=lk.Projection(rank=3)) as run:
        log_all(run)
        assert_same_bits(resumed, RawFisher.of(run.commit()).blocks)


@pytest.mark.parametrize("kind", [*CURVATURES])
def test_deleted_rows_leave_no_trace(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 4)
    x, target = make_data()

    def watch(run):
        if kind in ("kfac", "ekfac"):
            with run.observe():
                loss_of(run.model, x, target).backward()
        if kind.startswith("fisher"):
            with run.observe_fisher():
                loss_of(run.model, x, target).backward()

    options = {"projection": lk.Projection(rank=3), "curvature": kind, "rows_per_shard": 8}
    with lk.Run(tmp_path / "s", make_model(), **options) as run:
        log_all(run)
        watch(run)
        query = ask(run)
        run.scores(query, "relatif")
        assert run.delete(name for name in ("row3", "row12")) == 2
        got, values = run.scores(query, "relatif"), run.self_influence()
    with lk.Run(tmp_path / "without", make_model(), **options) as run:
        log_all(run, [i for i in range(N) if i not in (3, 12)])
        watch(run)
        torch.testing.assert_close(got, run.scores(query, "relatif"), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, run.self_influence(), rtol=1e-4, atol=1e-5)


def test_a_downdate_is_the_recomputed_sum_to_fp32_rounding_and_bounded(tmp_path, monkeypatch):
    rows = make_rows()
    store = write(tmp_path / "s", rows)
    RawFisher.of(store)
    gone = [3, 77, 300, 540]
    with GradientStore.open(store.path, mode="append") as writer:
        writer.delete([f"r{i}" for i in gone])
    smaller = GradientStore.open(store.path)
    assert RawFisher.downdate(store, smaller, gone)
    monkeypatch.setattr(GradientStore, "blocks", lambda self: pytest.fail("all rows were read again"))
    found = RawFisher.of(smaller).blocks
    monkeypatch.undo()
    left = rows[[i for i in range(COUNT) if i not in gone]].double()
    for name, part in store.slices.items():
        exact = left[:, part].T @ left[:, part] / len(left)
        error = (found[name].double() - exact).abs().max() / exact.abs().max()
        assert error <= 4 * 2**-24 * COUNT**0.5, name
    with GradientStore.open(store.path, mode="append") as writer:
        writer.delete([f"r{i}" for i in range(4, 70)])
    assert not RawFisher.downdate(smaller, GradientStore.open(store.path), list(range(3, 69))), "beyond a tenth"
