"""Arrow arrays as `pa.array` makes them, without what it imports."""

import importlib.util
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from logra_kernels.store.arrow import integers, strings
from logra_kernels.store.columns import to_parquet


@pytest.fixture(params=["native", "without the library"])
def way(request, monkeypatch):
    if request.param != "native":
        monkeypatch.setattr("logra_kernels.store.arrow.packs_strings", lambda: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("values", [[], [""], ["a"], ["", "one", "", "two"], ["ä", "", "日本", "a\0b", "🙂"]])
def test_strings(values):
    made, wanted = strings(values), pa.array(values, pa.string())
    made.validate(full=True)
    assert made.equals(wanted)
    assert made.type == wanted.type
    tables = [pa.table([array], names=["id"]) for array in (made, wanted)]
    assert to_parquet(tables[0]) == to_parquet(tables[1])


@pytest.mark.usefixtures("way")
def test_strings_that_are_none():
    with pytest.raises(UnicodeEncodeError):
        strings(["a", "\ud800"])
    with pytest.raises(TypeError):
        strings(["a", 1])


def test_integers():
    values = torch.arange(20).view(2, 10).t()[:, 1]
    made = integers(values)
    made.validate(full=True)
    assert made.equals(pa.array(np.arange(10, 20)))
    assert integers(values[:0]).equals(pa.array([], pa.int64()))


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_a_store_does_not_import_pandas(tmp_path):
    program = """
import sys, torch, logra_kernels as lk
with lk.GradientStore.create(sys.argv[1], {"l": (4, 4)}, rows_per_shard=8) as store:
    for start in (0, 10):
        store.append(torch.eye(20, 16)[start : start + 10], [str(i) for i in range(start, start + 10)])
    store.flush()
    store.delete(["3"])
store = lk.GradientStore.open(sys.argv[1])
assert store.ids_of(store.topk(torch.eye(1, 16), 1)[1][0]) == ["0"] and len(store.ids) == 19
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "s")], check=True)
