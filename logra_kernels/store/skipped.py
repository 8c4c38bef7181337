"""Ids of rows that were left out because their gradient is NaN or infinite, kept beside the rows that were stored.

    sidecars/skipped.<sixteen zeros>.safetensors       no tensors; metadata {"ids": [...]}, in the order they came

They are recorded at once, before the rows beside them are committed: a rerun after a crash between the two comes by
them again, and records them a second time without effect.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from logra_kernels.store.sidecar import read_sidecar, write_sidecar

_NAME, _KEY = "skipped", "0" * 16  # a fixed key: they belong to the store in all of its states


def read_skipped(directory: Path) -> list[str]:
    """
    Raises:
        StoreError: The file is damaged.
    """
    kept = read_sidecar(directory, _NAME, _KEY)
    return [] if kept is None else list(kept[1]["ids"])


def add_skipped(directory: Path, ids: Iterable[str]) -> list[str]:
    """Record these too; all of them.

    Raises:
        StoreError: The file is damaged, or the disk refuses.
    """
    before = read_skipped(directory)
    together: Sequence[str] = list(dict.fromkeys([*before, *ids]))
    if len(together) > len(before):
        write_sidecar(directory, _NAME, _KEY, {}, {"ids": together})
    return list(together)
