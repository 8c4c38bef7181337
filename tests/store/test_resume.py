"""However a store was interrupted, and however its rows were batched, it ends in the same bytes."""

import pytest
import torch
from store.samples import LAYERS, ids_of, part_of, rows_of, tree, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore

COUNT = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {
        dtype: tree(write(tmp_path_factory.mktemp("whole") / dtype, COUNT, dtype, rows_per_shard=8))
        for dtype in ("fp32", "bf16")
    }


@pytest.mark.parametrize("batch", [1, 3, 7, 8, 9, 20])
def test_batching_leaves_no_trace(tmp_path, whole, batch):
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        for start in range(0, COUNT, batch):
            store.append(*part_of(COUNT, start, min(COUNT, start + batch)))
    assert tree(tmp_path / "s") == whole["fp32"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_close_and_reopen_at_every_row(tmp_path, whole, dtype):
    for cut in range(COUNT + 1):
        path = tmp_path / str(cut)
        with GradientStore.create(path, LAYERS, dtype, rows_per_shard=8) as store:
            store.append(*part_of(COUNT, 0, cut))
        with GradientStore.open(path, mode="append") as store:
            assert len(store) == cut
            for start in range(0, COUNT, 6):
                stop = min(COUNT, start + 6)
                taken = store.append(*part_of(COUNT, start, stop), skip_committed=True)
                assert taken == max(0, stop - max(cut, start))
        assert tree(path) == whole[dtype]


def test_reopened_at_all_rows_in_turn(tmp_path, whole):
    GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8).close()
    for row in range(COUNT):
        with GradientStore.open(tmp_path / "s", mode="append") as store:
            store.append(*part_of(COUNT, row, row + 1))
    assert tree(tmp_path / "s") == whole["fp32"]


def test_flush_after_every_row(tmp_path, whole):
    with GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        for row in range(COUNT):
            store.append(*part_of(COUNT, row, row + 1))
            store.flush()
            assert len(store) == row + 1
    assert tree(tmp_path / "s") == whole["fp32"]


def test_an_interrupt_in_the_block_leaves_a_resumable_store(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt), GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8) as store:
        store.append(*part_of(COUNT, 0, 11))
        raise KeyboardInterrupt
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        assert len(store) == 11
        store.append(*part_of(COUNT, 0, COUNT), skip_committed=True)
    assert tree(tmp_path / "s") == whole["fp32"]


def test_opening_for_append_changes_nothing(tmp_path, whole):
    write(tmp_path / "s", COUNT, rows_per_shard=8)
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        store.flush()
        assert store.append(*part_of(COUNT, 0, COUNT), skip_committed=True) == 0
    assert tree(tmp_path / "s") == whole["fp32"]


class TestSkippedRows:
    @pytest.fixture
    def store(self, tmp_path):
        write(tmp_path / "s", 12, rows_per_shard=8)
        with GradientStore.open(tmp_path / "s", mode="append") as store:
            yield store

    def append(self, store, order):
        columns = {"source": ["x"] * len(order), "span": [[1, 2]] * len(order), "weight": [0.5] * len(order)}
        return store.append(rows_of(30)[order], [ids_of(30)[i] for i in order], columns, skip_committed=True)

    def test_rows_the_caller_passed_over_need_not_come(self, store):
        assert self.append(store, [9, 10, 11, 12, 13]) == 2
        assert self.append(store, [14, 15]) == 2

    @pytest.mark.parametrize("order", [[3, 5], [5, 4], [0, 1, 20], [20, 3], [11, 12, 3]])
    def test_another_order_is_refused(self, store, order):
        with pytest.raises(StoreError, match=r"another order|in the store already"):
            self.append(store, order)
        assert self.append(store, [11, 12]) == 1

    def test_a_row_appended_in_this_session_is_a_duplicate(self, store):
        self.append(store, [12])
        store.flush()
        with pytest.raises(StoreError, match="in the store already: 'row-12'"):
            self.append(store, [12])

    def test_without_the_option_a_committed_row_is_a_duplicate(self, store):
        with pytest.raises(StoreError, match="skip_committed"):
            store.append(*part_of(12, 3, 5))


def test_nothing_is_lost_between_sessions_that_fail(tmp_path, whole):
    GradientStore.create(tmp_path / "s", LAYERS, rows_per_shard=8).close()
    bad = rows_of(COUNT).clone()
    bad[13, 3] = torch.nan
    _, ids, columns = part_of(COUNT, 0, COUNT)
    with GradientStore.open(tmp_path / "s", mode="append") as store:
        store.append(*part_of(COUNT, 0, 5))
        with pytest.raises(StoreError):
            store.append(bad, ids, columns)
        with pytest.raises(StoreError):
            store.append(bad, ids, columns, skip_committed=True)
        store.append(*part_of(COUNT, 5, COUNT))
    assert tree(tmp_path / "s") == whole["fp32"]
