"""Rows that leave a CUDA device while it goes on computing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.encoding import encode_here
from logra_kernels.store.format import Manifest
from logra_kernels.store.rows import fitting_rows, shorten


class Departures:
    """Copies into pinned memory, each device's on a stream of its own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def leave(
        self, manifest: Manifest, rows: Tensor, ids: Sequence[str]
    ) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Start the copy of rows [n, D]; nothing here waits for the device.

        Returns:
            The encoded rows in pinned memory, named as in `Manifest.tensors`, and a call that returns once they are
            there. It raises StoreError if they hold a number that cannot be stored.
        """
        device = rows.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        # Encoded on the caller's stream into memory of their own: the caller may write on the rows at once.
        leaving = encode_here(manifest, rows)
        leaving["fit"] = fitting_rows(manifest, rows)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            arriving = {name: _pinned_like(tensor).copy_(tensor, non_blocking=True) for name, tensor in leaving.items()}
            arrived = stream.record_event()
        fit = arriving.pop("fit")

        def wait() -> None:
            arrived.synchronize()
            leaving.clear()  # only now may the device's memory be used again
            if not bool(fit.all()):
                bad = [repr(name) for name, good in zip(ids, fit.tolist(), strict=True) if not good]
                raise StoreError(
                    f"{len(bad)} rows hold NaN, Inf or numbers that {manifest.format} cannot hold: ids {shorten(bad)}"
                )

        return arriving, wait


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
