"""Rows that are logged in other batches than those of the store's order, and stored in that order."""

import pytest
import torch
from session.models import N, T, loss_of, make_data, make_model

import logra_kernels as lk
from logra_kernels.curvature import RawFisher
from logra_kernels.errors import LograError, StoreError
from logra_kernels.store import GradientStore

NAMES = [f"row{i}" for i in range(N)]
BATCHES = [[5, 0, 19], [2, 1], [18, 17, 3, 4, 16], [6], [15, 7, 14, 8], [9, 13, 10], [12, 11]]
COMING = [i for batch in BATCHES for i in batch]


def log(run, batch, data=None, **options):
    x, target = data or make_data()
    columns = {"source": [f"s{i % 3}" for i in batch]}
    with run.log([NAMES[i] for i in batch], columns=columns, **options):
        loss_of(run.model, x[batch], target[batch]).backward()


def log_ordered(run, batches=BATCHES, **options):
    with run.ordered(NAMES):
        for batch in batches:
            if not run.committed([NAMES[i] for i in batch]):
                log(run, batch, **options)


def tree(path):
    return {p.name: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != "lock"}


@pytest.fixture
def whole(tmp_path):
    with lk.Run(tmp_path / "whole", make_model(), rows_per_shard=6) as run:
        log_ordered(run)
    return tmp_path / "whole"


def test_rows_are_those_of_samples_alone(tmp_path, whole):
    with lk.Run(tmp_path / "alone", make_model()) as run:
        for i in range(N):
            log(run, [i])
    ours, alone = GradientStore.open(whole), GradientStore.open(tmp_path / "alone")
    assert ours.ids == NAMES
    assert ours.columns == alone.columns
    torch.testing.assert_close(ours.read(0, N), alone.read(0, N), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"dtype": "int8"}, {"dtype": "int4"}, {"rank_c": 1}])
def test_rows_and_columns_are_put_in_order_and_not_changed(tmp_path, options):
    options = {"projection": lk.Projection(3, "orthonormal"), "rows_per_shard": 6, **options}
    with lk.Run(tmp_path / "ordered", make_model(), **options) as run:
        log_ordered(run)
    with lk.Run(tmp_path / "coming", make_model(), **options) as run:
        for batch in BATCHES:
            log(run, batch)
    ordered, coming = GradientStore.open(tmp_path / "ordered"), GradientStore.open(tmp_path / "coming")
    assert ordered.ids == NAMES
    assert ordered.columns == {"source": [f"s{i % 3}" for i in range(N)]}
    assert torch.equal(ordered.read(0, N)[COMING], coming.read(0, N))


@pytest.mark.parametrize("done", range(len(BATCHES)))
def test_left_before_its_end_it_keeps_the_rows_up_to_the_first_that_is_missing(tmp_path, whole, done):
    here = [i for batch in BATCHES[:done] for i in batch]
    first = min(set(range(N)) - set(here))
    with (
        pytest.raises(KeyboardInterrupt),
        lk.Run(tmp_path / "cut", make_model(), rows_per_shard=6) as run,
        run.ordered(NAMES),
    ):
        for batch in BATCHES[:done]:
            log(run, batch)
        raise KeyboardInterrupt
    if done:
        assert GradientStore.open(tmp_path / "cut").ids == NAMES[:first]
    with lk.Run(tmp_path / "cut", make_model(), rows_per_shard=6) as run:
        log_ordered(run)
    assert tree(tmp_path / "cut") == tree(whole)


def test_a_rerun_by_other_batches_goes_on_after_the_last_row_that_is_there(tmp_path):
    with lk.Run(tmp_path / "s", make_model(), rows_per_shard=6) as run:
        log(run, list(range(7)))
    with lk.Run(tmp_path / "s", make_model()) as run:
        assert run.committed(NAMES[:7])
        log_ordered(run, [[0, 19, 8, 9], list(range(1, 8)), list(range(10, 19))])
    assert GradientStore.open(tmp_path / "s").ids == NAMES


def test_rows_that_were_deleted_are_passed_over(tmp_path, whole):
    with lk.Run(whole, make_model()) as run:
        run.delete(["row2", "row1"])
        assert run.committed(["row1", "row2", "row3"])
        assert not run.committed(["row1", "other"])
        log_ordered(run, [[3, 2, 1]])
    assert GradientStore.open(whole).ids == [name for name in NAMES if name not in ("row1", "row2")]


def test_the_fisher_that_is_summed_meanwhile_is_that_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 8)
    options = {"projection": lk.Projection(rank=3), "curvature": "raw"}
    with lk.Run(tmp_path / "meanwhile", make_model(), **options, fisher_while_logging=True) as run:
        log_ordered(run)
        with monkeypatch.context() as patch:
            patch.setattr(GradientStore, "blocks", lambda self: pytest.fail("a pass over the store"))
            found = RawFisher.of(run.commit()).blocks
    with lk.Run(tmp_path / "afterwards", make_model(), **options) as run:
        log_ordered(run)
        passed = RawFisher.of(run.commit()).blocks
    assert found.keys() == passed.keys()
    assert all(torch.equal(found[name], passed[name]) for name in passed)


@pytest.mark.filterwarnings("ignore:log:UserWarning")
def test_rows_that_are_skipped(tmp_path):
    x, target = make_data()
    for i in (0, 7, 16):
        x[i, i % T, 0] = torch.nan
    good = [name for i, name in enumerate(NAMES) if i not in (0, 7, 16)]
    for path in (tmp_path / "skipping", tmp_path / "cut"):
        with lk.Run(path, make_model(), rows_per_shard=6) as run:
            if path.name == "cut":
                with pytest.raises(KeyboardInterrupt), run.ordered(NAMES):
                    for batch in BATCHES[:5]:
                        log(run, batch, (x, target), nonfinite="skip")
                    raise KeyboardInterrupt
                assert run.commit().ids == good[:7]
            log_ordered(run, data=(x, target), nonfinite="skip")
            assert run.skipped == ["row0", "row16", "row7"]
        assert GradientStore.open(path).ids == good
    assert tree(tmp_path / "cut") == tree(tmp_path / "skipping")


def test_rows_of_nan_are_refused_with_all_that_wait(tmp_path):
    x, target = make_data()
    x[7, 0, 0] = torch.nan
    with lk.Run(tmp_path / "s", make_model()) as run:
        with pytest.raises(StoreError, match="1 rows hold NaN or Inf: ids 'row7'"):
            log_ordered(run, data=(x, target))
        assert run.commit().ids == []
        log_ordered(run)
    assert GradientStore.open(tmp_path / "s").ids == NAMES


def test_packed_documents(tmp_path, whole):
    x, target = make_data()
    with lk.Run(tmp_path / "packed", make_model()) as run, run.ordered(NAMES):
        for batch in BATCHES:
            names, offsets = [NAMES[i] for i in batch], torch.arange(len(batch) + 1) * T
            with run.log(names, {"source": [f"s{i % 3}" for i in batch]}, offsets=offsets):
                loss_of(run.model, x[batch].flatten(0, 1)[None], target[batch].flatten(0, 1)[None]).backward()
    packed, plain = GradientStore.open(tmp_path / "packed"), GradientStore.open(whole)
    assert packed.ids == NAMES
    torch.testing.assert_close(packed.read(0, N), plain.read(0, N), rtol=1e-5, atol=1e-6)


def test_misuse(tmp_path):
    with lk.Run(tmp_path / "s", make_model()) as run:
        with pytest.raises(ValueError, match="an id is there twice"), run.ordered(["a", "b", "a"]):
            pass
        with pytest.raises(LograError, match="inside another"), run.ordered(["a"]), run.ordered(["b"]):
            pass
        with pytest.raises(StoreError, match="'row1' is none of those"), run.ordered(["row0"]):
            log(run, [0, 1])
        with pytest.raises(StoreError, match="'row1' has come before"), run.ordered(NAMES):
            log(run, [1])
            log(run, [2, 1])
        with pytest.raises(StoreError, match=r"columns are \['other'\] and those of the rows before \['source'\]"):  # noqa: SIM117
            with run.ordered(NAMES):
                log(run, [1])
                with run.log(["row0"], {"other": [1]}):
                    loss_of(run.model, *(v[:1] for v in make_data())).backward()
        with pytest.raises(StoreError, match="1 ids for 2 rows"), run.ordered(NAMES), run.log(["row0"]):
            run.taps.reset()
            loss_of(run.model, *(v[:2] for v in make_data())).backward()
        with pytest.raises(LograError, match=r"'row1' was not logged \(18 of 20 were not\)"):
            log_ordered(run, [[0, 2]])
        assert run.commit().ids == ["row0"]
        with run.ordered([]):
            pass
