"""Rows that wait until those before them have come: batches need not be made in the order of the store."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from logra_kernels.errors import LograError, StoreError
from logra_kernels.session.row_ids import row_ids


class Window:
    """Rows that are stored together, in an order that is known before they come.

    Args:
        ids: Of the rows, in that order.

    Raises:
        ValueError: An id is there twice, or is of another kind than `row_ids` takes.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = row_ids("ordered", ids)
        self._place_of = {name: place for place, name in enumerate(self._ids)}
        if len(self._place_of) < len(self._ids):
            raise ValueError("ordered: an id is there twice; every row needs its own")
        self._rows: Tensor | None = None
        self._columns: dict[str, list] = {}
        self._come = [False] * len(self._ids)

    def put(self, rows: Tensor, ids: Sequence[str], columns: Mapping[str, Sequence] | None) -> None:
        """Keep a copy of rows [n, D] with their columns, for `take`.

        Raises:
            StoreError: Sizes differ, ids are unknown or have come before, or columns are others than those so far.
        """
        columns = columns or {}
        if len(rows) != len(ids) or any(len(values) != len(ids) for values in columns.values()):
            raise StoreError(f"{len(ids)} ids for {len(rows)} rows and their columns; give one for each row")
        places = [self._place_of.get(name, -1) for name in ids]
        for name, place in zip(ids, places, strict=True):
            if place < 0 or self._come[place]:
                why = "has come before" if place >= 0 else "is none of those that `ordered` was given"
                raise StoreError(f"row {name!r} {why}; log every one of these rows once")
        if not any(self._come):
            self._columns = {name: [None] * len(self._ids) for name in columns}
        if sorted(columns) != sorted(self._columns):
            raise StoreError(
                f"the columns are {sorted(columns)} and those of the rows before {sorted(self._columns)};"
                " every batch must give the same"
            )
        if self._rows is None:
            self._rows = rows.new_empty(len(self._ids), rows.shape[1])
        self._rows.index_copy_(0, torch.tensor(places, dtype=torch.int64, device=rows.device), rows.detach())
        for index, place in enumerate(places):
            self._come[place] = True
            for name, values in columns.items():
                self._columns[name][place] = values[index]

    def take(self, there: Callable[[list[str]], bool]) -> tuple[Tensor, list[str], dict[str, list] | None] | None:
        """Rows, ids and columns in order, up to the first row that has not come, without those that are there already.

        Args:
            there: Whether rows need not be stored.
        """
        taken = []
        for place, (name, come) in enumerate(zip(self._ids, self._come, strict=True)):
            if there([name]):
                continue
            if not come:
                break
            taken.append(place)
        if not taken or self._rows is None:
            return None
        for to, place in enumerate(taken):
            if to != place:
                self._rows[to] = self._rows[place]
        columns = {name: [values[place] for place in taken] for name, values in self._columns.items()}
        return self._rows[: len(taken)], [self._ids[place] for place in taken], columns or None

    def check(self, there: Callable[[list[str]], bool]) -> None:
        """
        Raises:
            LograError: A row has not come and is not there.
        """
        waiting = [name for name, come in zip(self._ids, self._come, strict=True) if not come]
        absent = [name for name in waiting if not there([name])]
        if absent:
            raise LograError(
                f"ordered: row {absent[0]!r} was not logged ({len(absent)} of {len(self._ids)} were not), and those"
                " after it are not stored; log every row whose batch is not committed"
            )
