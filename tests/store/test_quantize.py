"""A store made of another's rows: what it keeps, and what it measures."""

import errno

import pytest
import torch
from store.samples import columns_of, ids_of, rows_of, tree, write

import logra_kernels as lk
from logra_kernels.errors import StoreError
from logra_kernels.ops import FORMATS
from logra_kernels.store import GradientStore, quantization_loss, quantize
from logra_kernels.store.writing import growing


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", 40)


@pytest.mark.parametrize("name", FORMATS)
def test_the_new_store_holds_the_same_in_the_format(source, tmp_path, name):
    before = tree(source)
    store = quantize(source, tmp_path / "new", name)
    assert store.dtype == name
    assert store.ids == ids_of(40)
    assert store.columns == columns_of(40)
    parts = rows_of(40).split([6, 16], dim=1)
    kept = torch.cat([lk.dequantize_rows(lk.quantize_rows(part, name)) for part in parts], dim=1)
    torch.testing.assert_close(store.read(0, 40), kept, rtol=1e-6 if name == "sign" else 0, atol=0)
    assert tree(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]


def test_the_loss_is_measured_and_kept(source, tmp_path):
    quantize(source, tmp_path / "new", "int4", block=64)
    store = GradientStore.open(tmp_path / "new")
    loss = quantization_loss(store)
    exact, kept = rows_of(40).double(), store.read(0, 40).double()
    assert loss["source_format"] == "fp32"
    assert loss["relative_l2"] == pytest.approx(float((kept - exact).norm() / exact.norm()), rel=1e-6)
    scores, found = exact @ exact.T, exact @ kept.T
    pearson = torch.corrcoef(torch.stack((scores.flatten(), found.flatten())))[0, 1]
    pairs = zip(scores.topk(4).indices.tolist(), found.topk(4).indices.tolist(), strict=True)
    assert (loss["queries"], loss["top"]) == (40, 4)
    assert loss["top_agreement"] == pytest.approx(sum(len({*a} & {*b}) for a, b in pairs) / 160)
    assert loss["top_agreement"] < 1, "of all rows it would be 1 whatever was lost"
    assert loss["score_correlation"] == pytest.approx(float(pearson), abs=1e-5)
    assert 0.9 < loss["score_correlation"] < 1
    assert quantization_loss(GradientStore.open(source)) is None


def test_agreement_counts_the_rows_that_are_found(tmp_path):
    source = write(tmp_path / "source", 300)
    loss = quantization_loss(quantize(source, tmp_path / "new", "sign"))
    exact = rows_of(300).double()
    chosen = exact[[place * 300 // 64 for place in range(64)]]
    found = GradientStore.open(tmp_path / "new").read(0, 300).double()
    pairs = zip((chosen @ exact.T).topk(30).indices.tolist(), (chosen @ found.T).topk(30).indices.tolist(), strict=True)
    share = sum(len(set(a) & set(b)) for a, b in pairs) / (64 * 30)
    assert loss["top_agreement"] == pytest.approx(share, abs=2e-3)
    assert loss["top"] == 30
    assert 0.4 < share < 1


def test_deleted_rows_do_not_come_along(source, tmp_path):
    with GradientStore.open(source, mode="append") as store:
        store.delete(["row-3", "row-11"])
    new = quantize(source, tmp_path / "new", "int8")
    assert new.ids == [name for name in ids_of(40) if name not in ("row-3", "row-11")]
    parts = rows_of(40)[4:5].split([6, 16], dim=1)
    kept = torch.cat([lk.dequantize_rows(lk.quantize_rows(part, "int8")) for part in parts], dim=1)
    assert torch.equal(new.read(3, 4), kept)


def test_what_cannot_be(source, tmp_path):
    with pytest.raises(StoreError, match="holds a gradient store"):
        quantize(source, source, "int8")
    with pytest.raises(StoreError, match="'int5' is not one of"):
        quantize(source, tmp_path / "new", "int5")
    with pytest.raises(StoreError, match="is not a gradient store"):
        quantize(tmp_path / "none", tmp_path / "new", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_fails_leaves_nothing(source, tmp_path, monkeypatch):
    with GradientStore.open(source, mode="append") as store:
        rows = torch.full((1, store.dim), 1e30)
        store.append(rows, ["loud"], {name: store.table.column(name)[:1] for name in store.table.column_names[1:]})
    with pytest.raises(StoreError, match=r"too large for fp16: ids 'loud'"):
        quantize(source, tmp_path / "new", "fp16")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(growing, "write_shard", full)
    with pytest.raises(StoreError, match=r"No space left on device; nothing is left of it; remove the cause") as caught:
        quantize(source, tmp_path / "new", "int8")
    assert "append" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
