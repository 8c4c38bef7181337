"""Rows of NaN or infinity that a run leaves out, and records beside those it stores."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from logra_kernels.store import GradientStore, add_skipped, read_skipped

_NAMED = 5  # ids a warning gives


class SkippedRows:
    """The ids of rows that were left out, in this session and earlier ones."""

    def __init__(self, store: GradientStore | None) -> None:
        self.ids: list[str] = []
        self._among: set[str] = set()
        if store is not None:
            self._recorded(read_skipped(store.path))

    def _recorded(self, ids: list[str]) -> None:
        self.ids, self._among = ids, set(ids)

    def among(self, ids: Iterable[str]) -> set[str]:
        return {name for name in ids if name in self._among}

    def leave_out(
        self, directory: Path, rows: Tensor, ids: list[str], columns: dict[str, list] | None
    ) -> tuple[Tensor, list[str], dict[str, list] | None]:
        """What is to be stored of a batch; the ids of the rest are recorded in the store at once.

        Raises:
            StoreError: What was recorded before is damaged, or the disk refuses.
        """
        if len(ids) != len(rows) or any(len(column) != len(ids) for column in (columns or {}).values()):
            return rows, ids, columns  # for the store to refuse
        finite = rows.isfinite().all(1).tolist()
        bad = [name for name, good in zip(ids, finite, strict=True) if not good]
        if bad:
            self._recorded(add_skipped(directory, bad))
            warnings.warn(
                f"log: {len(bad)} of {len(ids)} rows skipped, their gradient is NaN or infinite: "
                + ", ".join(repr(name) for name in bad[:_NAMED])
                + (", ..." if len(bad) > _NAMED else ""),
                stacklevel=4,
            )
        gone = self.among(ids)  # of this batch and, in a rerun, of the one before
        if not gone:
            return rows, ids, columns
        left = [i for i, name in enumerate(ids) if name not in gone]
        kept = None if columns is None else {name: [values[i] for i in left] for name, values in columns.items()}
        return rows[left], [ids[i] for i in left], kept
