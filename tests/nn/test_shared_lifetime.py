"""Shared projections live no longer than the taps that hold their columns, and factors are held once."""

import pytest
import torch
from nn.sharing import EVERY, loss_of, name_of, tapped
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from logra_kernels.nn import shared_inputs

case = pytest.fixture(params=EVERY, ids=name_of)(tapped)


@pytest.fixture
def alive(monkeypatch):
    """How many projections of several taps there are."""
    projections: list[TensorWeakRef] = []
    projected = shared_inputs._Projected

    def recorded(x, a, stream, awaited):
        projections.append(TensorWeakRef(a))
        return projected(x, a, stream, awaited)

    monkeypatch.setattr(shared_inputs, "_Projected", recorded)
    yield lambda: sum(a() is not None for a in projections)
    assert projections


def test_factors_are_held_once(case):
    before = {name: tuple(p.clone() for p in pair) for name, pair in case.taps.factors.items()}
    case.check(passes=2)
    after = case.taps.factors
    assert all(torch.equal(p, q) for name in before for p, q in zip(before[name], after[name], strict=True))
    storages = [after[name][0].untyped_storage().data_ptr() for name in ("q", "k", "v", "gate", "up", "o")]
    assert [storages.count(storage) for storage in storages] == [3, 3, 3, 2, 2, 1]


@pytest.mark.parametrize("finish", ["backward", "backward, loss kept", "nothing"])
def test_projections_die_with_their_taps(case, alive, finish):
    for i in range(3):
        case.taps.reset()
        loss = loss_of(case.model, case.x, case.target)
        assert (alive() > 0) is (i > 0)
        if finish != "nothing":
            loss.backward()
        if finish == "backward, loss kept":
            assert not alive()
        del loss
        assert not alive()


def test_projections_of_taps_that_are_not_called_die_too(case, alive):
    case.model.given = lambda name, x: case.x  # which outlives the pass
    for order in ("qkv", "qv", "qkv", "q"):
        case.model.order = order
        for _ in range(2):
            case.taps.reset()
            loss_of(case.model, case.x, case.target).backward()
            assert not alive()


def test_checkpointing_keeps_no_projection(case, alive):
    for order in ("qkv", "qkv", "qkv", "qv"):
        case.model.order = order
        case.taps.reset()
        loss = checkpoint(case.model, case.x, use_reentrant=False).sum()
        assert not alive()
        loss.backward()
        assert not alive()
