"""Ids as a run takes them: what a DataLoader makes of a dataset's, and what is none."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import logra_kernels as lk

SMALL = lk.Projection(rank=2)
NUMBERS = [[7, 8], torch.tensor([7, 8]), np.array([7, 8]), [torch.tensor(7), torch.tensor(8)], [np.int64(7), "8"]]


def make_case():
    torch.manual_seed(0)
    return nn.Linear(4, 3), [{"id": i, "name": f"n{i}", "x": torch.randn(2, 4)} for i in range(8)]


def log(run, model, batch, ids):
    with run.log(ids):
        model(batch["x"]).square().sum().backward()


@pytest.mark.parametrize(("field", "first"), [("id", "0"), ("name", "n0")])
def test_what_a_data_loader_gives(tmp_path, field, first):
    model, data = make_case()
    for logged in (4, 0):
        with lk.Run(tmp_path / "s", model, projection=SMALL) as run:
            for batch in DataLoader(data, batch_size=2):
                if not run.committed(batch[field]):
                    logged -= 1
                    log(run, model, batch, batch[field])
        assert logged == 0
    with lk.Run(tmp_path / "s", model) as run:
        run.finalize()
        assert list(run.store.ids)[:2] == [first, first.replace("0", "1")]


@pytest.mark.parametrize("ids", NUMBERS, ids=repr)
def test_whole_numbers_are_their_digits_everywhere(tmp_path, ids):
    model, data = make_case()
    batch = {"x": torch.stack([one["x"] for one in data[:2]])}
    with lk.Run(tmp_path / "s", model, projection=SMALL) as run:
        with run.ordered(ids):
            log(run, model, batch, ids)
        run.finalize()
        assert list(run.store.ids) == ["7", "8"]
        assert run.committed(ids)
        assert run.stored(ids).ids == ["7", "8"]
        with run.query(ids) as query:
            model(batch["x"]).square().sum().backward()
        assert query.ids == ["7", "8"]
        assert run.delete(ids) == 2


@pytest.mark.parametrize(
    "ids", ["ab", b"ab", [None, "b"], [b"a", "b"], [1.0, 2.0], torch.tensor([1.0, 2.0]), torch.tensor([[1], [2]]),
            [True, False], [["a"], ["b"]], 3], ids=repr
)  # fmt: skip
def test_other_ids_are_refused_before_anything_is_stored(tmp_path, ids):
    model, data = make_case()
    batch = {"x": torch.stack([one["x"] for one in data[:2]])}
    with lk.Run(tmp_path / "s", model, projection=SMALL) as run:
        log(run, model, batch, ["a", "b"])
        with pytest.raises(ValueError, match="log: (ids is|an id is)"):
            log(run, model, batch, ids)
        for ask in (run.committed, run.stored, run.delete):
            with pytest.raises(ValueError, match=f"{ask.__name__}: (ids is|an id is)"):
                ask(ids)
        with pytest.raises(ValueError, match="query: (ids is|an id is)"), run.query(ids):
            pass
        run.finalize()
        assert list(run.store.ids) == ["a", "b"]


def test_another_number_of_ids_than_of_samples(tmp_path):
    model, data = make_case()
    batch = {"x": torch.stack([one["x"] for one in data])}
    complaint = pytest.raises(ValueError, match="sees 8 samples where 1 were begun; a Run takes one id a sample")
    with lk.Run(tmp_path / "s", model, projection=SMALL) as run, complaint:
        log(run, model, batch, ["a"])
