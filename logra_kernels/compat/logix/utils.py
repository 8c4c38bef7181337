"""LogIX's helpers: ids of data, and logs of several batches as one."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Log = tuple[list[str], Any]  # ids, and {layer: {"grad": [N, k_out, k_in]}} or the rows [N, D]


class DataIDGenerator:
    """Ids of a batch's samples.

    Args:
        mode: "hash", SHA-256 of each sample's bytes, the same as LogIX's; or "index", numbers that go on counting.

    Raises:
        ValueError: Another mode.
    """

    def __init__(self, mode: str = "hash") -> None:
        if mode not in ("hash", "index"):
            raise ValueError(f"DataIDGenerator: mode is {mode!r}; it must be 'hash' or 'index'")
        self.mode = mode
        self.count = 0

    def __call__(self, data: Sequence[Any] | Tensor) -> list[str]:
        if self.mode == "hash":
            return [hash_of(sample) for sample in data]
        start, self.count = self.count, self.count + len(data)
        return [str(i) for i in range(start, self.count)]


def hash_of(sample: Tensor | np.ndarray) -> str:
    """SHA-256 of a sample's bytes, in hex.

    Raises:
        ValueError: Neither a tensor nor an array.
    """
    if isinstance(sample, Tensor):
        held = sample.detach().cpu().contiguous()
        sample = held.view(torch.uint8).numpy() if held.dtype == torch.bfloat16 else held.numpy()
    if not isinstance(sample, np.ndarray):
        raise ValueError(f"DataIDGenerator: a sample is a {type(sample).__name__}; it must be a tensor or an array")
    return hashlib.sha256(sample.tobytes()).hexdigest()


def names_of(data_id: Iterable[Any]) -> list[str]:
    """Ids as strings: numbers in digits, and of tensors and arrays with several numbers the hash."""
    if isinstance(data_id, str) or not isinstance(data_id, Iterable):
        raise ValueError(f"logix: data_id is {data_id!r}; it must have one id for each sample")
    return [_name(one) for one in data_id]


def _name(one: Any) -> str:
    if isinstance(one, Tensor | np.ndarray | np.generic):
        return str(one.item()) if one.ndim == 0 else hash_of(one)  # type: ignore[arg-type]
    return str(one)


def merge_logs(logs: Sequence[Log]) -> Log:
    """Logs of several batches as one."""
    parts = [part for _, part in logs]
    ids = [name for names, _ in logs for name in names]
    return ids, _joined(parts) if parts else {}


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Mapping):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(list(parts))


def get_rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Processes in the group; 0 without one, as in LogIX."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
