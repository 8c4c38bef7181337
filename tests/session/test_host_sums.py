"""Sums in host memory of rows that come from a device: the slots, and the same bits as on the host."""

import threading

import pytest
import torch
from session.models import loss_of, make_data, make_model

import logra_kernels as lk
from logra_kernels.curvature import GramSums, ModelFisher, RawFisher
from logra_kernels.session import FisherSums
from logra_kernels.session.host_sums import HostSums

PARTS = {"a": slice(0, 5), "b": slice(5, 12)}


class LateCopies:
    """A device whose copies arrive only when they are waited for, and which may write on the rows at once."""

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.under_way: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, rows: torch.Tensor, slot: torch.Tensor):
        where, own = slot.data_ptr(), rows.clone()
        assert where not in self.under_way, "a slot is copied into before it was summed"
        self.under_way.add(where)
        self.slots.append(where)
        slot.fill_(torch.nan)

        def arrive() -> None:
            assert self.gate.wait(20)
            slot.copy_(own)
            self.under_way.discard(where)

        return arrive


@pytest.mark.parametrize("sizes", [[7] * 60, [3, 300, 2, 1, 700], [1]])
def test_the_same_bits_as_added_at_once(sizes):
    rows = torch.randn(sum(sizes), 12)
    want, got = GramSums(PARTS), HostSums(GramSums(PARTS), LateCopies())
    for part in rows.split(sizes):
        want.add(part)
        got.add(part.clone())
    sums = got.settled()
    assert sums.rows == len(rows)
    for name, total in want.total().items():
        assert torch.equal(sums.total()[name], total)
    got.add(rows[:3])
    want.add(rows[:3])
    assert torch.equal(got.settled().total()["a"], want.total()["a"])


def test_two_slots_take_turns_and_the_second_is_not_waited_for():
    copies = LateCopies()
    sums = HostSums(GramSums(PARTS), copies)
    copies.gate.clear()
    sums.add(torch.randn(4, 12))
    sums.add(torch.randn(4, 12))  # returns while the first is still on its way
    assert len(copies.under_way) == 2
    third = threading.Thread(target=sums.add, args=(torch.randn(4, 12),))
    third.start()
    third.join(0.1)
    assert third.is_alive(), "the third waits for its slot"
    copies.gate.set()
    third.join(20)
    assert sums.settled().rows == 12
    assert copies.slots[0] == copies.slots[2] != copies.slots[1]


def test_what_fails_on_the_way_is_said(monkeypatch):
    sums = HostSums(GramSums(PARTS), LateCopies())
    monkeypatch.setattr(GramSums, "add", lambda self, rows: (_ for _ in ()).throw(MemoryError("no memory for sums")))
    sums.add(torch.randn(4, 12))
    with pytest.raises(MemoryError, match="no memory for sums"):
        sums.settled()


@pytest.mark.parametrize("on_host", [False, True])
def test_where_rows_of_a_device_are_summed(on_host):
    sums, rows = GramSums(PARTS), torch.empty(2, 12, device="meta")
    beside = FisherSums(True, RawFisher, on_host)._beside(sums, rows)
    assert isinstance(beside, HostSums) == on_host
    assert FisherSums(True, RawFisher, on_host)._beside(sums, torch.empty(2, 12)) is sums


def test_an_unknown_device(tmp_path):
    with pytest.raises(ValueError, match="statistics_device is 'disk'; it must be None or 'cpu'"):
        lk.Run(tmp_path / "s", make_model(), statistics_device="disk")


ON_CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_a_session_with_its_statistics_on_the_host(tmp_path, device, monkeypatch):
    monkeypatch.setattr("logra_kernels.curvature.sums.PANEL", 8)
    model = make_model().to(device)
    options = {"projection": lk.Projection(rank=3), "fisher_while_logging": True, "statistics_device": "cpu"}
    x, target = (part.to(device) for part in make_data())
    with lk.Run(tmp_path / "s", model, **options) as run:
        for start in range(0, len(x), 7):
            part = slice(start, start + 7)
            with run.log([f"row{i}" for i in range(len(x))[part]]):
                loss_of(model, x[part], target[part]).backward()
            with run.observe_fisher():
                loss_of(model, x[part], target[part]).backward()
        store = run.commit()
        kept = RawFisher.of(store).blocks
        observed = ModelFisher.of(store).blocks
    for file in (store.path / "sidecars").glob("sums-*"):
        file.unlink()
    for name, block in RawFisher.of(store).blocks.items():
        assert torch.equal(kept[name], block)
        assert torch.equal(observed[name], block), "the same gradients in the same order"
