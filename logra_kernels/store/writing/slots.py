"""Memory for what waits in a queue, used over and over.

Fresh memory is what costs: the kernel clears each page when it is first touched, which on a virtual machine took 5
microseconds a page, more than ten times what copying rows into it takes.
"""

import mmap

import numpy as np

PAGE = 4096
HUGE_PAGE = 2 << 20


def aligned(nbytes: int) -> np.ndarray:
    """Memory that begins with a page, and lies on huge ones where it is as long as some and there are any."""
    if nbytes < HUGE_PAGE:
        return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    begin = -whole.ctypes.data % HUGE_PAGE
    return whole[begin : begin + nbytes]


class Ring:
    """`nbytes` of memory whose parts are given back in the order in which they were taken. One thread at a time."""

    def __init__(self, nbytes: int):
        self._nbytes = nbytes
        self._memory: np.ndarray | None = None  # until it is needed
        self._begin = self._end = 0  # of what is taken, counted on from turn to turn

    def take(self, nbytes: int) -> tuple[np.ndarray, int] | None:
        """(a part that begins with a page, how much to give back for it); None while there is no room."""
        rounded = -(-nbytes // PAGE) * PAGE
        if self._begin == self._end:
            self._begin = self._end = 0  # the memory that was touched last
        at = self._end % self._nbytes if self._nbytes else 0
        skipped = self._nbytes - at if at + rounded > self._nbytes else 0
        if self._end + skipped + rounded - self._begin > self._nbytes:
            return None
        if self._memory is None:
            self._memory = aligned(self._nbytes)
        self._end += skipped + rounded
        at = 0 if skipped else at
        return self._memory[at : at + nbytes], skipped + rounded

    def give_back(self, taken: int) -> None:
        """The part that was taken first of those still taken."""
        self._begin += taken

    def take_back(self, taken: int) -> None:
        """The part that was taken last."""
        self._end -= taken
