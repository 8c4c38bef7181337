"""Choosing a tile: the fixed table's row, or on request (LOGRA_KERNELS_AUTOTUNE=1) the fastest that this device shows.

Tuning is for whoever measures: each row is timed once a process and printed, to be pasted into the op's table.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import TypeVar

AUTOTUNE = os.environ.get("LOGRA_KERNELS_AUTOTUNE") == "1"

Key = TypeVar("Key", bound=Hashable)
Tile = TypeVar("Tile")

_tuned: dict[tuple[str, Hashable], object] = {}


def tile_for(
    op: str,
    table: Mapping[Key, Tile],
    key: Key,
    candidates: Callable[[Key], Iterable[Tile]],
    run: Callable[[Tile], object],
    milliseconds: Callable[[Callable[[], object]], float],
) -> Tile:
    """The tile to launch with.

    Args:
        op: Named in what is printed.
        table: Key -> tile.
        key: The row wanted.
        candidates: What to try when tuning; those that fail to compile or launch are passed over.
        run: Launches the op with a tile, on the arguments at hand.
        milliseconds: Times a call.
    """
    if not AUTOTUNE:
        return table[key]
    found = _tuned.get((op, key))
    if found is None:
        found = _tuned[op, key] = _fastest(candidates(key), run, milliseconds)
        print(f"    {key!r}: {found!r},  # {op}", flush=True)
    return found  # type: ignore[return-value]


def _fastest(
    tiles: Iterable[Tile], run: Callable[[Tile], object], milliseconds: Callable[[Callable[[], object]], float]
) -> Tile:
    best: tuple[float, Tile] | None = None
    error: Exception | None = None
    for tile in tiles:
        try:
            took = milliseconds(partial(run, tile))
        except Exception as failed:  # a tile may ask for more registers or shared memory than the device has
            error = failed
            continue
        if best is None or took < best[0]:
            best = took, tile
    if best is None:
        raise RuntimeError("no candidate tile runs on this device") from error
    return best[1]
