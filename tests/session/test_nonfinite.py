"""NaN and infinity: they mark their sample and leave its neighbours as they are; skipped rows are remembered."""

import pytest
import torch
from session.models import N, loss_of, make_data, make_model

import logra_kernels as lk
from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore, add_skipped, merge, read_skipped

ignore = pytest.mark.filterwarnings("ignore:log:UserWarning")
BAD = {3: torch.nan, 8: torch.inf, 9: -torch.inf, 19: torch.nan}
GOOD = [f"row{i}" for i in range(N) if i not in BAD]


def poisoned():
    x, target = make_data()
    for i, value in BAD.items():
        x[i, i % 5, 0] = value
    return x, target


def log(run, data, start=0, stop=N, step=4, **options):
    for a in range(start, stop, step):
        part = slice(a, min(a + step, stop))
        ids = [f"row{i}" for i in range(part.start, part.stop)]
        if not run.committed(ids):
            with run.log(ids, columns={"source": ids}, **options):
                loss_of(run.model, *(v[part] for v in data)).backward()


def tree(path):
    return {p.name: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != "lock"}


@pytest.fixture
def skipping(tmp_path):
    with lk.Run(tmp_path / "s", make_model(), rows_per_shard=5) as run, pytest.warns(UserWarning, match="rows skipped"):
        log(run, poisoned(), nonfinite="skip")
    return tmp_path / "s"


def test_raise_names_every_bad_row_and_stores_nothing_of_the_batch(tmp_path):
    with lk.Run(tmp_path / "s", make_model()) as run:
        with pytest.raises(StoreError, match=r"2 rows hold NaN or Inf: ids 'row8', 'row9'"):
            log(run, poisoned(), start=8)
        log(run, make_data())
    assert len(GradientStore.open(tmp_path / "s")) == N
    assert run.skipped == []


def test_skip_stores_what_a_clean_batch_would_have_given_the_others(tmp_path, skipping):
    with lk.Run(tmp_path / "clean", make_model()) as run:
        log(run, make_data())
    clean, store = GradientStore.open(tmp_path / "clean"), GradientStore.open(skipping)
    assert store.ids == GOOD
    assert store.columns["source"] == GOOD
    assert read_skipped(store.path) == [f"row{i}" for i in BAD]
    good = [i for i in range(N) if i not in BAD]
    assert torch.equal(store.read(0, len(good)), clean.read(0, N)[good])


def test_the_warning_says_how_many_and_which(tmp_path):
    with (
        lk.Run(tmp_path / "s", make_model()) as run,
        pytest.warns(UserWarning, match=r"2 of 4 rows skipped.*'row8', 'row9'$"),
    ):
        log(run, poisoned(), start=8, stop=12, nonfinite="skip")


@ignore
def test_a_rerun_takes_skipped_rows_for_committed_and_ends_in_the_same_bytes(tmp_path, skipping):
    model = make_model()
    with lk.Run(tmp_path / "parts", model, rows_per_shard=5) as run:
        log(run, poisoned(), stop=10, nonfinite="skip")  # its last batch ends in the middle of one of the whole run
    with lk.Run(tmp_path / "parts", model) as run:
        assert run.skipped == ["row3", "row8", "row9"]
        assert run.committed(["row8", "row9"])
        assert not run.committed(["row8", "row10"])
        log(run, poisoned(), nonfinite="skip")
    assert tree(tmp_path / "parts") == tree(skipping)
    with lk.Run(skipping, model) as run:
        log(run, make_data(), nonfinite="skip")
    assert GradientStore.open(skipping).ids == GOOD


@ignore
def test_killed_between_the_record_and_the_rows(tmp_path, skipping):
    """What a kill leaves: the ids are recorded, the rows beside them are not committed."""
    with lk.Run(tmp_path / "killed", make_model(), rows_per_shard=5) as run:
        log(run, poisoned(), stop=3)
    lk.Run(tmp_path / "killed", make_model()).close()
    add_skipped(tmp_path / "killed", ["row3"])
    with lk.Run(tmp_path / "killed", make_model()) as run:
        log(run, poisoned(), nonfinite="skip")
    assert tree(tmp_path / "killed") == tree(skipping)


@ignore
def test_a_batch_of_nothing_but_nan(tmp_path):
    x, target = make_data()
    with lk.Run(tmp_path / "s", make_model()) as run:
        log(run, (x * torch.nan, target), stop=4, nonfinite="skip")
        assert run.committed(["row0", "row3"])
        log(run, (x, target), start=4, nonfinite="skip")
    assert len(GradientStore.open(tmp_path / "s")) == N - 4


def test_merged_stores_remember_them(tmp_path, skipping):
    with lk.Run(tmp_path / "other", make_model()) as run, run.log(["other"], columns={"source": ["other"]}):
        loss_of(run.model, *(v[:1] for v in make_data())).backward()
    merge([skipping, tmp_path / "other"], tmp_path / "merged")
    assert read_skipped(tmp_path / "merged") == read_skipped(skipping)


def test_misuse(tmp_path):
    with lk.Run(tmp_path / "s", make_model()) as run:
        with pytest.raises(ValueError, match="nonfinite is 'ignore'; it must be 'raise' or 'skip'"):
            log(run, make_data(), nonfinite="ignore")
        with pytest.raises(StoreError, match="3 ids for 4 rows"), run.log(["a", "b", "c"], nonfinite="skip"):
            run.taps.reset()
            loss_of(run.model, *(v[:4] for v in make_data())).backward()
