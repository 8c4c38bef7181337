"""Ids of several stores that become one: which are in more than one, and what they are called then.

A shard's ids are held at a time, and all of them only in a table of the native library.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from logra_kernels.errors import StoreError
from logra_kernels.store.arrow import integers, strings
from logra_kernels.store.columns import ID
from logra_kernels.store.deleted import shown_lines
from logra_kernels.store.entry import Shard
from logra_kernels.store.ids import Places, new_places
from logra_kernels.store.rows import SHOWN, shorten
from logra_kernels.store.shard import read_columns
from logra_kernels.store.store import GradientStore


@dataclass(frozen=True)
class Renamed:
    """Rows of a shard that get other ids: numbers among those that are shown [m], and the ids."""

    rows: np.ndarray
    ids: pa.Array

    def among(self, ids: pa.ChunkedArray) -> pa.Array:
        """The ids of all rows that are shown, these exchanged."""
        names = ids.to_pylist()
        for row, name in zip(self.rows.tolist(), self.ids.to_pylist(), strict=True):
            names[row] = name
        return strings(names)


Renames = dict[tuple[int, int], Renamed]  # of a store, by its number, and a shard, by its first row's


def distinct_ids(stores: Sequence[GradientStore], keep: bool) -> Renames:
    """New ids for rows whose ids an earlier store has.

    Raises:
        StoreError: There are some, unless they are to be kept.
        FileNotFoundError: A file is gone, since its store has changed.
    """
    places = new_places()
    twice: Renames = {}
    for number, store in enumerate(stores):
        for shard in store.manifest.shards:
            if shard.shown:
                ids = shown_ids(store, shard)
                rows = np.flatnonzero(~places.add_new(ids))
                if len(rows):
                    twice[number, shard.start] = Renamed(rows, ids.take(pa.array(rows)))
    if twice and not keep:
        some = [repr(name.as_py()) for part in twice.values() for name in part.ids[:SHOWN]][:SHOWN]
        count = sum(len(part.rows) for part in twice.values())
        raise StoreError(
            f"{count} ids are in more than one of the stores: {shorten(some, count)}; delete them from all but one, or"
            " keep both with duplicates='keep' (`logra merge --duplicates keep`), which appends #2 to the later id"
        )
    return {place: Renamed(part.rows, _free_ids(part.ids.to_pylist(), places)) for place, part in twice.items()}


def shown_ids(store: GradientStore, shard: Shard) -> pa.Array:
    """Of the shard's rows that are shown.

    Raises:
        StoreError: A file is damaged.
        FileNotFoundError: A file is gone.
    """
    ids = read_columns(store.path, shard, [ID]).column(ID)
    if shard.hidden:
        ids = ids.take(integers(shown_lines(store.path, shard)))
    return ids.combine_chunks()


def _free_ids(names: list[str], places: Places) -> pa.Array:
    """`<name>#<the first number from 2 on that is free>` of each, which gets a place."""
    found = [f"{name}#2" for name in names]
    for row in np.flatnonzero(places.find(found) >= 0).tolist():
        found[row] = _free_id(names[row], places)
    if places.add(found) >= 0:  # some name comes twice, as no sound store has it
        for row, name in enumerate(names):
            found[row] = _free_id(name, places)
            places.add(found[row : row + 1])
    return strings(found)


def _free_id(name: str, places: Places) -> str:
    number = 2
    while places.find([f"{name}#{number}"])[0] >= 0:
        number += 1
    return f"{name}#{number}"
