"""A store that nobody may write to answers all the same."""

import errno
import os
import warnings

import pytest
import torch
from torch import nn

import logra_kernels as lk
from logra_kernels.errors import StoreError
from logra_kernels.store import sidecar


@pytest.fixture
def case(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(12, 2, 4)
    with lk.Run(tmp_path / "s", model, projection=lk.Projection(rank=2)) as run:
        with run.log([str(i) for i in range(12)]):
            model(x).square().sum().backward()
        with run.query(["q"]) as query:
            model(x[:1]).sum().backward()
        run.commit()
    return tmp_path / "s", model, query


def refuse(number):
    def write(*_):
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize("curvature", ["shrunk", "raw", "diagonal", "kronecker", "lowrank", "identity"])
@pytest.mark.parametrize("why", [errno.EROFS, errno.EACCES])
def test_answers_are_those_of_a_store_that_keeps_them(case, monkeypatch, curvature, why):
    path, model, query = case
    monkeypatch.setattr(sidecar, "write_file", refuse(why))
    with lk.Run(path, model, curvature=curvature) as run, pytest.warns(UserWarning, match="s cannot be written to"):
        found = run.topk(query, k=3)
    assert not list((path / "sidecars").glob("self-influence*"))
    monkeypatch.undo()
    with lk.Run(path, model, curvature=curvature) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = run.topk(query, k=3)
    assert found.ids == kept.ids
    assert torch.equal(found.values, kept.values)


def test_a_full_disk_is_still_an_error(case, monkeypatch):
    path, model, query = case
    monkeypatch.setattr(sidecar, "write_file", refuse(errno.ENOSPC))
    with lk.Run(path, model) as run, pytest.raises(StoreError, match="No space left"):
        run.topk(query)
