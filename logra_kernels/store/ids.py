"""Every id of a store, and the number of its row.

Ids have places in the order they came. A deleted one keeps its place, and with it the name, until a compaction that
releases it; the number of a row that is shown is its place less the deleted ones before it. So nothing is gone through
again when rows are deleted.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import pyarrow as pa

from logra_kernels.errors import StoreError
from logra_kernels.store.native import NativePlaces, has_places

UNKNOWN, DELETED = -1, -2  # in place of a row's number


def all_str(ids: Iterable[str]) -> bool:
    return all(issubclass(kind, str) for kind in set(map(type, ids)))


class Places(Protocol):
    """Distinct strings with places 0, 1, ... in the order they came."""

    def __len__(self) -> int: ...

    def find(self, ids: list[str]) -> np.ndarray:
        """Places of the ids, [n] int64; -1 for those not there."""

    def add(self, ids: list[str]) -> int:
        """Give them the next places; -1, or the index of one that is there or comes twice, and then none has one.

        Raises:
            TypeError: One is no str.
            UnicodeEncodeError: One is not to be had in UTF-8.
        """

    def add_arrow(self, ids: pa.Array) -> int:
        """`add` of an array of strings."""

    def add_new(self, ids: pa.Array) -> np.ndarray:
        """Give the next places to those that are not there, bool [n]: which. Of equal ones it is the first."""

    def drop(self, count: int) -> None:
        """Forget those that came last."""


class PythonPlaces:
    """`Places` without the native library: takes several times the memory."""

    def __init__(self) -> None:
        self._place_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._place_of)

    def find(self, ids: list[str]) -> np.ndarray:
        return np.array([self._place_of.get(name, UNKNOWN) for name in ids], np.int64)

    def add(self, ids: list[str]) -> int:
        if not all_str(ids):
            raise TypeError("an id is not a str")
        "".join(ids).encode()
        begin = len(self)
        for index, name in enumerate(ids):
            if self._place_of.setdefault(name, begin + index) != begin + index:
                self.drop(index)
                return index
        return -1

    def add_arrow(self, ids: pa.Array) -> int:
        return self.add(ids.to_pylist())

    def add_new(self, ids: pa.Array) -> np.ndarray:
        begin = len(self)
        places = [self._place_of.setdefault(name, len(self)) for name in ids.to_pylist()]
        return np.diff(np.maximum.accumulate([begin - 1, *places])) > 0

    def drop(self, count: int) -> None:
        for _ in range(count):
            self._place_of.popitem()


def new_places() -> Places:
    """An empty table."""
    return NativePlaces() if has_places() else PythonPlaces()


class KnownIds:
    """The ids of a store's rows, queued ones included, and of the deleted ones that no compaction released.

    Args:
        shown: Ids of the rows, in order.
        deleted: Ids of deleted rows. One that is shown, too, is shown: it was released, and is another row's.

    Raises:
        StoreError: Two rows that are shown have the same id.
    """

    def __init__(self, shown: pa.ChunkedArray, deleted: Iterable[str]):
        self._places = new_places()
        for chunk in shown.chunks:
            clash = self._places.add_arrow(chunk)
            if clash >= 0:
                raise StoreError(f"two rows have the id {chunk[clash].as_py()!r}; see `logra fsck`")
        first, names = len(self._places), list(dict.fromkeys(deleted))
        there = self._places.find(names).tolist()
        self._places.add([name for name, place in zip(names, there, strict=True) if place == UNKNOWN])
        self._deleted = np.arange(first, len(self._places))  # places, sorted

    @property
    def rows(self) -> int:
        """How many are shown: the number of the next row."""
        return len(self._places) - len(self._deleted)

    @property
    def any_deleted(self) -> bool:
        return len(self._deleted) > 0

    def numbers(self, ids: list[str]) -> np.ndarray:
        """Numbers of the rows with these ids, `UNKNOWN` or `DELETED`, [n] int64.

        Raises:
            StoreError: They are no strings that can be stored.
        """
        try:
            places = self._places.find(ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise _no_ids(error) from None
        if not self.any_deleted:
            return places
        before = np.searchsorted(self._deleted, places)
        numbers = np.where(places < 0, UNKNOWN, places - before)
        numbers[self._deleted[np.minimum(before, len(self._deleted) - 1)] == places] = DELETED
        return numbers

    def __contains__(self, name: str) -> bool:
        """Whether a row of this id is shown."""
        return int(self.numbers([name])[0]) >= 0

    def add(self, ids: list[str]) -> int:
        """As `Places.add`, for the rows that come next.

        Raises:
            StoreError: They are no strings that can be stored.
        """
        try:
            return self._places.add(ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise _no_ids(error) from None

    def drop(self, count: int) -> None:
        """The rows that were added last do not come."""
        self._places.drop(count)

    def delete(self, ids: list[str]) -> None:
        """Rows that are shown are so no longer."""
        gone = np.sort(self._places.find(ids))
        self._deleted = np.insert(self._deleted, np.searchsorted(self._deleted, gone), gone)


def _no_ids(error: TypeError | UnicodeEncodeError) -> StoreError:
    if isinstance(error, TypeError):
        return StoreError("ids must be a list of str; convert them with str()")
    return StoreError(f"an id cannot be stored: {error}")
