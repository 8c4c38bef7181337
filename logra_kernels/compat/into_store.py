"""What the importers share: rows of another tool's files into a store, going on where an interrupted import stopped."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore

BLOCK_BYTES = 64 << 20
STORED = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # what rows are kept in unless asked otherwise


def write_store(
    out: str | os.PathLike,
    layers: Mapping[str, tuple[int, int]],
    dtype: str,
    origin: str,
    blocks: Iterable[tuple[Tensor, list[str]]],
) -> GradientStore:
    """Append blocks of rows [n, D] with their ids to a new store, or to what an interrupted import has left of it.

    Raises:
        LograError: Another store is at `out`, or rows of another log.
        StoreError: Rows or ids do not fit, or the disk refuses.
    """
    if GradientStore.exists(out):
        store = GradientStore.open(out, mode="append")
        if store.meta.get("imported") != origin or store.layers != dict(layers) or store.dtype != dtype:
            store.close()
            raise LograError(f"{out} holds another store than this import makes; choose another place")
    else:
        store = GradientStore.create(out, layers, dtype, meta={"imported": origin})
    with store:
        there = _There(GradientStore.open(out))
        for rows, ids in blocks:
            there.compare(rows, ids)
            store.append(rows, ids, skip_committed=True)
        there.finish()
    return GradientStore.open(out)


class _There:
    """The rows that an import finds in the store already. They must be its own: ids are often no more than numbers, and
    another log has them, too."""

    def __init__(self, store: GradientStore):
        self._store = store
        self._seen = 0

    def compare(self, rows: Tensor, ids: list[str]) -> None:
        """
        Raises:
            LograError: A row is there with other numbers.
        """
        numbers = self._store.numbers_of(ids)
        lines = (numbers >= 0).nonzero().flatten()
        if not len(lines):
            return
        self._seen += len(lines)
        numbers = numbers[lines]
        first = int(numbers.min())
        kept = self._store.read(first, int(numbers.max()) + 1)[numbers - first]
        if not torch.equal(self._store.as_stored(rows[lines]), kept):
            raise self._of_another("numbers")

    def finish(self) -> None:
        """
        Raises:
            LograError: Rows are there that did not come.
        """
        if self._seen < len(self._store):
            raise self._of_another("rows")

    def _of_another(self, what: str) -> LograError:
        return LograError(f"{self._store.path} holds other {what} than this import brings; choose another place")


def as_rows(numbers: np.ndarray, dtype: str, width: int) -> Tensor:
    """A copy of bytes [n, width * itemsize] uint8 as rows [n, width] of a dtype that NumPy need not know (bfloat16)."""
    return torch.from_numpy(np.array(numbers)).view(getattr(torch, dtype)).view(-1, width)


def read_json(path: Path, what: str) -> Any:
    """
    Raises:
        LograError: There is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise LograError(f"{path} is missing: {path.parent} is not {what}; check the path") from None
    except OSError as error:
        raise LograError(f"{path} cannot be read: {error.strerror}; check permissions and the disk") from None
    except ValueError:
        raise LograError(f"{path} is not valid JSON; {path.parent} was written by another tool or is damaged") from None


def malformed(path: Path, why: str) -> LograError:
    return LograError(f"{path} {why}; it was written by another version or is damaged")
