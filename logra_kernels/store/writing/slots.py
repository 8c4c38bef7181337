"""Memory for rows on their way to the disk, used over and over.

Fresh memory is what costs. The kernel clears each page when it is first touched, and on a virtual machine whose host
has taken the memory back, that took 2.3 ms a MB: more than writing it. So the memory of a closed store is kept for the
next one, in a state in which the kernel may take it whenever it is short of some.

Huge pages, because O_DIRECT writes from them took 4.9 ms for 16 MB and those from scattered pages up to 9. Only private
mappings have them: shared ones, Python's default, are files to the kernel, which do not by default.
"""

import contextlib
import mmap
import threading

import numpy as np

PAGE = 4096
HUGE_PAGE = 2 << 20
KEPT_BYTES = 256 << 20


class Slot:
    """`nbytes` of memory that begin with a page; what is in it is left over from another use."""

    def __init__(self, nbytes: int):
        huge = nbytes >= HUGE_PAGE
        alignment = HUGE_PAGE if huge else PAGE
        self._mapping = mmap.mmap(-1, nbytes + (alignment if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._mapping, np.uint8)
        begin = -whole.ctypes.data % alignment
        self.bytes = whole[begin : begin + nbytes]

    def offer(self) -> None:
        """The kernel may take the memory until it is written to again."""
        if hasattr(mmap, "MADV_FREE"):
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_FREE)


class _Kept:
    """Slots of closed stores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: list[Slot] = []

    def take(self, nbytes: int) -> Slot | None:
        with self._lock:
            fitting = (place for place, slot in enumerate(self._slots) if len(slot.bytes) == nbytes)
            place = next(fitting, None)
            return None if place is None else self._slots.pop(place)

    def keep(self, slot: Slot) -> None:
        if len(slot.bytes) < HUGE_PAGE:
            return  # small ones are no cheaper this way
        slot.offer()
        with self._lock:
            self._slots.append(slot)
            while sum(len(held.bytes) for held in self._slots) > KEPT_BYTES:
                self._slots.pop(0)


_kept = _Kept()


class Slots:
    """Slots of one size, of one store. Any thread may take some and give them back."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self._free: list[Slot] = []  # the one that was used last at the end: it may be in the cache

    def take(self) -> Slot:
        try:
            return self._free.pop()
        except IndexError:
            return _kept.take(self.nbytes) or Slot(self.nbytes)

    def give_back(self, slot: Slot) -> None:
        self._free.append(slot)

    def close(self) -> None:
        """Keep the memory for another store. None is taken any more."""
        while self._free:
            _kept.keep(self._free.pop())
