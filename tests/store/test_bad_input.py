"""What does not fit is refused with its reason, whole, and the store goes on."""

import datetime

import pyarrow as pa
import pytest
import torch
from store.samples import DIM, LAYERS, ids_of, rows_of, tree

from logra_kernels.errors import StoreError
from logra_kernels.store import GradientStore


@pytest.fixture
def store(tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS, "bf16", rows_per_shard=4) as store:
        store.append(rows_of(3), ids_of(3), {"source": ["a", None, "b"], "page": [1, 2, 3]})
        yield store
        store.append(rows_of(3, seed=9), ["x", "y", "z"], {"page": [4, 5, 6], "source": ["c"] * 3})
        store.flush()
        assert store.ids == [*ids_of(3), "x", "y", "z"]
        assert store.columns == {"source": ["a", None, "b", "c", "c", "c"], "page": [1, 2, 3, 4, 5, 6]}
        assert torch.equal(store.read(3, 6), rows_of(3, seed=9).bfloat16().float())


def refuse(store, match, rows=None, ids=("n0", "n1"), columns=None):
    columns = {"source": ["a", "b"], "page": [1, 2]} if columns is None else columns
    with pytest.raises(StoreError, match=match) as caught:
        store.append(rows_of(2) if rows is None else rows, ids, columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(store, bad):
    rows = rows_of(2)
    rows[1, 10] = bad
    refuse(store, r"1 rows hold NaN or Inf: ids 'n1', layers h\.0\.mlp;", rows)
    rows[0, 2] = bad
    refuse(store, r"2 rows hold NaN or Inf: ids 'n0', 'n1', layers first, h\.0\.mlp;", rows)


def test_numbers_too_large_for_the_stored_dtype(store, tmp_path):
    rows = rows_of(2)
    rows[0, 0] = torch.finfo(torch.float32).max
    refuse(store, "too large for bf16: ids 'n0', layers first;", rows)
    wide = rows_of(2).double()
    wide[1, 21] = -1e39
    refuse(store, r"too large for bf16: ids 'n1', layers h\.0\.mlp;", wide)
    with GradientStore.create(tmp_path / "t", LAYERS) as other:
        other.append(rows, ids_of(2))
        with pytest.raises(StoreError, match="too large for fp32"):
            other.append(wide, ["a", "b"])
    assert torch.equal(GradientStore.open(tmp_path / "t").read(0, 2), rows)


def test_rows_of_another_shape_or_kind(store):
    refuse(store, rf"rows are {DIM + 1} wide and .* holds rows of {DIM} \(first 2x3, h.0.mlp 4x4\)", rows_of(2, dim=23))
    refuse(store, r"rows are \(22,\) torch.float32; they must be", rows_of(2)[0])
    refuse(store, r"rows are \(2, 22\) torch.int32", rows_of(2).int())
    refuse(store, "rows are list", [[0.0] * DIM] * 2)


def test_ids_that_do_not_fit(store):
    refuse(store, "3 ids for 2 rows", ids=["a", "b", "c"])
    refuse(store, "ids occur twice in one append: a;", ids=["a", "a"])
    refuse(store, "in the store already: 'row-1';", ids=["a", "row-1"])
    refuse(store, "ids must be a list of str", ids=[1, 2])
    refuse(store, "ids must be a list of str", ids="ab")
    refuse(store, "ids must be a list of str", ids=iter("ab"))
    refuse(store, "column 'id' cannot be stored", ids=["a", "\ud800"])


def test_columns_that_do_not_fit(store):
    refuse(
        store,
        r"the columns are \['source'\] and those of the first rows \['page', 'source'\]",
        columns={"source": "ab"},
    )
    refuse(store, r"the columns are \[\]", columns={})
    refuse(store, "column 'page' has 1 values for 2 rows", columns={"source": ["a", "b"], "page": [1]})
    refuse(store, "column 'source' is a str", columns={"source": "ab", "page": [1, 2]})
    refuse(store, "column 'page' cannot be stored as int64", columns={"source": ["a", "b"], "page": [1, 2.5]})
    refuse(store, "column 'page' cannot be stored as int64", columns={"source": ["a", "b"], "page": ["x", "y"]})
    refuse(store, "column 'page' cannot be stored", columns={"source": ["a", "b"], "page": [1, object()]})
    refuse(store, "cannot be named 'id'", columns={"id": ["a", "b"]})
    refuse(store, "column 'source' is a set", columns={"source": {"a", "b"}, "page": [1, 2]})
    for columns in ({5: [1, 2]}, {"\ud800": [1, 2]}, ["ab", "cd"]):
        refuse(store, "columns must be a dict", columns=columns)


def test_columns_of_the_first_rows(tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS) as store:
        refuse(store, "column 'source' holds only None in the first rows", columns={"source": [None, None]})
        typed = pa.array([None, None], pa.string())
        store.append(rows_of(2), ids_of(2), {"source": typed, "page": torch.tensor([1, 2])})
        store.append(rows_of(2), ["a", "b"], {"source": ["x", "y"], "page": [None, None]})
    assert GradientStore.open(tmp_path / "s").columns == {"source": [None, None, "x", "y"], "page": [1, 2, None, None]}


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ([True, False], [5, 0]),
        ([1, 2], [True, False]),
        ([1, 2], ["3", "4"]),
        ([1, 2], [datetime.date(2020, 1, 1), None]),
        ([datetime.datetime(2020, 1, 1)] * 2, [5, 6]),
        ([b"a", b"b"], ["a", "b"]),
    ],
)
def test_no_value_becomes_one_of_another_kind(tmp_path, first, later):
    """Arrow's casts would make 5 True and "3" the number 3."""
    with GradientStore.create(tmp_path / "s", LAYERS) as store:
        store.append(rows_of(2), ["a", "b"], {"c": first})
        with pytest.raises(StoreError, match="column 'c' cannot be stored as .*, the type of the first rows: they are"):
            store.append(rows_of(2), ["c", "d"], {"c": later})
        store.append(rows_of(2), ["c", "d"], {"c": pa.array(first).dictionary_encode()})
    assert GradientStore.open(tmp_path / "s").columns == {"c": [*first, *first]}


def test_a_type_that_parquet_does_not_have(tmp_path):
    with GradientStore.create(tmp_path / "s", LAYERS) as store:
        refuse(store, "column 'c' is duration", columns={"c": [datetime.timedelta(1), None]})


def test_what_a_store_cannot_be_made_of(tmp_path):
    cases = [
        ({"layers": {}}, "at least one layer"),
        ({"layers": {"a": (0, 3)}}, "two positive integers"),
        ({"layers": {"a": (2, 3, 4)}}, "two positive integers"),
        ({"layers": LAYERS, "dtype": "int5"}, "'int5' is not one of fp32, bf16"),
        ({"layers": LAYERS, "rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"layers": LAYERS, "projection": {"x": object()}}, "projection is not JSON data"),
        ({"layers": LAYERS, "meta": {"x": float("nan")}}, "meta is not JSON data"),
        ({"layers": LAYERS, "fingerprints": {"x": 1}}, "fingerprints must map str to str"),
    ]
    for arguments, match in cases:
        with pytest.raises(StoreError, match=match):
            GradientStore.create(tmp_path / "s", **arguments)
    assert not (tmp_path / "s").exists()


def test_writing_to_what_is_not_open_for_it(tmp_path):
    store = GradientStore.create(tmp_path / "s", LAYERS)
    store.append(rows_of(2), ids_of(2))
    store.close()
    store.close()
    for held in (store, GradientStore.open(tmp_path / "s")):
        before = tree(tmp_path / "s")
        for act in (lambda held=held: held.append(rows_of(1), ["n"]), held.flush):
            with pytest.raises(StoreError, match="open it with mode='append'"):
                act()
        assert len(held) == 2
        assert held.read(0, 2).shape == (2, DIM)
        held.close()
        assert tree(tmp_path / "s") == before
