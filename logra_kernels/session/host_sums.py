"""Rows of a device that are summed in host memory while the device goes on computing.

Two slots take turns: while one is copied into, a thread sums what lies in the other. So neither the copy nor the
products are waited for, as long as together they take less than a step. The sums are those of the same rows added on
the host, bit for bit.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from logra_kernels.curvature import RowSums

Copy = Callable[[Tensor, Tensor], Callable[[], None]]


class HostSums:
    """Sums in host memory.

    Args:
        sums: That are added to; nobody else's until `settled`.
        copy: Starts to copy its first argument, device rows [n, D], into its second, a slot, and gives the call that
            returns once they are there.
    """

    def __init__(self, sums: RowSums, copy: Copy | None = None) -> None:
        self._sums = sums
        self._copy = copy or Departure()
        self._slots: list[Tensor | None] = [None, None]
        self._summed: list[Future[None] | None] = [None, None]
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, "logra-host-sums")

    def add(self, rows: Tensor) -> None:
        """Rows [n, D] on any device; they may be written on once this returns and their own stream goes on.

        Raises:
            Exception: What summing earlier rows raised.
        """
        turn, self._turn = self._turn, 1 - self._turn
        self._await(turn)
        slot = self._slots[turn]
        if slot is None or len(slot) < len(rows) or slot.shape[1:] != rows.shape[1:] or slot.dtype != rows.dtype:
            slot = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda, device="cpu")
            self._slots[turn] = slot
        held = slot[: len(rows)]
        self._summed[turn] = self._thread.submit(self._sum, held, self._copy(rows, held))

    def settled(self) -> RowSums:
        """The sums of all that was added; more may be.

        Raises:
            Exception: What summing rows raised.
        """
        for turn in (self._turn, 1 - self._turn):
            self._await(turn)
        return self._sums

    def _await(self, turn: int) -> None:
        summed, self._summed[turn] = self._summed[turn], None
        if summed is not None:
            summed.result()

    def _sum(self, held: Tensor, arrive: Callable[[], None]) -> None:
        arrive()
        self._sums.add(held)


class Departure:
    """Copies out of a CUDA device on a stream of their own; out of host memory at once."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, rows: Tensor, slot: Tensor) -> Callable[[], None]:
        if not rows.is_cuda:
            slot.copy_(rows)
            return lambda: None
        if self._stream is None:
            self._stream = torch.cuda.Stream(rows.device)
        self._stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(self._stream):
            slot.copy_(rows, non_blocking=True)
            arrived = self._stream.record_event()
        rows.record_stream(self._stream)  # its memory is not given to others before the copy is done
        return arrived.synchronize
