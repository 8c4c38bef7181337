"""Blocks on their way onto a device, by streams that do nothing before somebody waits: memory is not used too early."""

from contextlib import contextmanager

import pytest
import torch

from logra_kernels.store.reading import ahead

GONE = "written over"
DEVICE = torch.device("cuda", 0)


class Stream:
    """Work that is queued, and done in order once something waits for it."""

    def __init__(self, device=None):
        self.queue, self.done = [], 0

    def add(self, work):
        self.queue.append(work)

    def run_to(self, end):
        while self.done < end:
            work = self.queue[self.done]
            self.done += 1
            work()

    def record_event(self):
        return Event(self, len(self.queue))

    def wait_event(self, event):
        self.add(event.synchronize)

    def synchronize(self):
        self.run_to(len(self.queue))


class Event:
    def __init__(self, stream, end):
        self.stream, self.end = stream, end

    def synchronize(self):
        self.stream.run_to(self.end)


class Rows:
    """Rows in memory that others use as soon as nobody holds them."""

    device = torch.device("cpu")

    def __init__(self, card, value):
        self.card, self.memory = card, [value]
        card.alive += 1
        card.most = max(card.most, card.alive)

    def __del__(self):
        self.memory[0] = GONE
        self.card.alive -= 1

    def pinned(self):
        return Rows(self.card, self.memory[0])

    def to(self, device, non_blocking):
        assert device == DEVICE
        assert non_blocking
        sent = Rows(self.card, "not there yet")
        here, there = self.memory, sent.memory
        self.card.now.add(lambda: there.__setitem__(0, here[0]))
        return sent


class Card:
    """A device, its current stream, and how many blocks' memory is held at most."""

    def __init__(self):
        self.now, self.alive, self.most = Stream(), 0, 0

    @contextmanager
    def stream(self, other):
        before, self.now = self.now, other
        yield
        self.now = before

    def blocks(self, count):
        for i in range(count):
            yield i, Rows(self, i)

    def read(self, rows, seen):
        """A kernel on the current stream."""
        memory = rows.memory
        self.now.add(lambda: seen.append(memory[0]))


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", card.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: card.now)
    return card


def test_every_block_is_there_when_it_is_read(card):
    seen = []
    for _, rows in ahead.on_device(card.blocks(7), DEVICE):
        card.read(rows, seen)
        del rows
    assert seen == list(range(7))
    assert card.most <= 3 * (ahead.DEVICE_BLOCKS + 1)  # here, pinned and there
    assert card.alive == 0


@pytest.mark.parametrize("how", ["closed", "an error", "left to itself"])
def test_whoever_breaks_off_may_be_at_work_on_a_block(card, how):
    seen = []
    passing = ahead.on_device(card.blocks(7), DEVICE)
    for _ in range(4):
        card.read(next(passing)[1], seen)
    if how == "an error":
        with pytest.raises(ArithmeticError):
            passing.throw(ArithmeticError)
    elif how == "closed":
        passing.close()
    del passing
    assert seen == list(range(4))
    assert card.alive == 0


def test_a_block_is_sent_while_the_one_before_is_read(card):
    seen, unread = [], []
    for i, rows in ahead.on_device(card.blocks(5), DEVICE):
        unread.append(i - len(seen))
        card.read(rows, seen)
    assert unread == [0, 1, 1, 1, 1]
    assert seen == list(range(5))
