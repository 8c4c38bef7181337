"""Ids of deleted rows that a compaction took out of the files, kept so that a rerun does not bring the rows back.

    sidecars/removed.<sixteen zeros>.safetensors       "text" uint8 [m]: the ids in UTF-8, one after the other
                                                       "ends" int64 [n]: where in it each of them ends

They are recorded before the compaction commits: a crash between the two leaves rows that are deleted, which is what
being listed here means.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from logra_kernels.store.sidecar import read_sidecar, write_sidecar

_NAME, _KEY = "removed", "0" * 16  # a fixed key: they belong to the store in all of its states


def read_removed(directory: Path) -> Iterator[str]:
    """
    Raises:
        StoreError: The file is damaged.
    """
    kept = read_sidecar(directory, _NAME, _KEY)
    if kept is not None:
        text, ends = kept[0]["text"].numpy().tobytes(), kept[0]["ends"].tolist()
        for start, end in pairwise([0, *ends]):
            yield text[start:end].decode()


def add_removed(directory: Path, ids: Iterable[str]) -> None:
    """Record these too.

    Raises:
        StoreError: The file is damaged, or the disk refuses.
    """
    before = list(read_removed(directory))
    together = list(dict.fromkeys([*before, *ids]))
    if len(together) > len(before):
        _write(directory, [name.encode() for name in together])


def release_removed(directory: Path) -> None:
    """Forget them all.

    Raises:
        StoreError: The disk refuses.
    """
    if read_sidecar(directory, _NAME, _KEY) is not None:
        _write(directory, [])


def _write(directory: Path, ids: list[bytes]) -> None:
    text = torch.from_numpy(np.frombuffer(b"".join(ids), np.uint8).copy())
    ends = torch.from_numpy(np.cumsum([len(name) for name in ids], dtype=np.int64))
    write_sidecar(directory, _NAME, _KEY, {"text": text, "ends": ends}, {})
