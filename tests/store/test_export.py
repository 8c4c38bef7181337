"""What other tools read is what the store holds."""

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from store.samples import DIM, LAYERS, rows_of, write

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore


@pytest.fixture(params=["fp32", "int8"])
def store(tmp_path, request):
    path = write(tmp_path / "s", 20, request.param)
    with GradientStore.open(path, mode="append") as store:
        store.delete(["row-3", "row-11"])
    return GradientStore.open(path)


def test_npy(store, tmp_path):
    path = store.export(tmp_path / "out")
    rows = np.load(path / "rows.npy", mmap_mode="r")
    assert rows.dtype == np.float32
    assert np.array_equal(rows, store.read(0, 18).numpy())
    assert pq.read_table(path / "columns.parquet").equals(store.table.combine_chunks())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s"]


def test_faiss(store, tmp_path):
    faiss = pytest.importorskip("faiss")
    index = faiss.read_index(str(store.export(tmp_path / "out", "faiss") / "index.faiss"))
    queries = rows_of(3, seed=1)
    values, places = index.search(queries.numpy(), 5)
    expected = store.topk(queries, 5)
    assert np.array_equal(places, expected[1].numpy())
    # queries meet integer codes in 16 bits: an error against the greatest scores, not against each
    np.testing.assert_allclose(values, expected[0].numpy(), rtol=1e-5, atol=5e-5 * values.max())


def test_datasets(store, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_from_disk(str(store.export(tmp_path / "out", "datasets"))).with_format("numpy")
    assert np.array_equal(np.stack(loaded["gradient"][:]), store.read(0, 18).numpy())
    assert list(loaded["id"]) == store.ids
    assert list(loaded.with_format(None)["source"]) == store.columns["source"]


@pytest.mark.parametrize("format", ["npy", "datasets"])
def test_an_empty_store(tmp_path, format):
    if format == "datasets":
        pytest.importorskip("datasets")
    GradientStore.create(tmp_path / "s", LAYERS).close()
    path = GradientStore.open(tmp_path / "s").export(tmp_path / "out", format)
    if format == "npy":
        assert np.load(path / "rows.npy").shape == (0, DIM)
    else:
        assert sys.modules["datasets"].load_from_disk(str(path)).column_names == ["id", "gradient"]


def test_what_faiss_cannot_write_is_said(store, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")

    def full(*_):
        raise RuntimeError("write error: 0 != 88\n(No space left on device)")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(
        StoreError, match=r"out failed: write error: 0 != 88 \(No space left on device\); remove the cause"
    ):
        store.export(tmp_path / "out", "faiss")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_what_is_refused(store, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="format is 'csv'"):
        store.export(tmp_path / "out", "csv")
    with pytest.raises(StoreError, match="exists; choose a new directory"):
        store.export(store.path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="failed: Not a directory"):
        store.export(tmp_path / "file" / "out")
    for module, format in (("faiss", "faiss"), ("datasets", "datasets")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(StoreError, match=r"pip install 'logra-kernels\[export\]'"):
            store.export(tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
