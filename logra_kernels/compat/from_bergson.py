"""Gradient indexes written by Bergson (`bergson build`, read from the source of its versions 0.x and 2.5):

gradients.bin    [num_grads, sum of grad_sizes], row-major, no header
info.json        num_grads, grad_sizes {module: numbers}, base_dtype ("float32" or "<f4"; "dtype" in older ones)
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from logra_kernels.compat.into_store import BLOCK_BYTES, STORED, as_rows, malformed, read_json, write_store
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore

UNFINISHED = ".part"  # how Bergson names a run's directory until it is whole


def import_bergson(
    path: str | os.PathLike, out: str | os.PathLike, *, dtype: str | None = None, ids: list[str] | None = None
) -> GradientStore:
    """A store of the rows of a Bergson index; run again, it goes on with an interrupted import.

    The index says how many numbers a module has and not their shape: a square number becomes p x p, which Bergson's
    two-sided projection makes, any other 1 x n.

    Args:
        path: The run's directory.
        out: A new directory.
        dtype: Of the stored rows; by default as in the index.
        ids: Of the rows; by default their numbers "0", "1", ..., as Bergson itself knows them.

    Raises:
        LograError: The index is incomplete, damaged, or holds rows of single tokens.
        StoreError: Rows or ids do not fit, or the disk refuses.
    """
    place = Path(path)
    if place.name.endswith(UNFINISHED):
        raise LograError(f"{place} is an unfinished build, whose rows may be zeros; let Bergson finish it")
    info = read_json(place / "info.json", "an index written by Bergson")
    if not isinstance(info, dict):
        raise malformed(place / "info.json", "holds no table")
    try:
        count, sizes, kind = int(info["num_grads"]), dict(info["grad_sizes"]), _kind(info)
        layers = {str(name): _shape(int(size)) for name, size in sizes.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise malformed(place / "info.json", f"says nothing usable ({error!r})") from None
    if info.get("attribute_tokens"):
        raise malformed(place, "holds a row for every token; build it without --attribute_tokens")
    if kind not in STORED:
        raise malformed(place / "info.json", f"names the number type {kind!r}, known are {', '.join(STORED)}")
    if ids is not None and len(ids) != count:
        raise malformed(place, f"has {count} rows, and {len(ids)} ids are given")
    width = sum(k_out * k_in for k_out, k_in in layers.values())
    names = ids if ids is not None else [str(row) for row in range(count)]
    blocks = _blocks(place / "gradients.bin", count, width, kind, names)
    return write_store(out, layers, dtype or STORED[kind], "bergson", blocks)


def _kind(info: dict[str, Any]) -> str:
    base = info["base_dtype"] if "base_dtype" in info else info["dtype"]["formats"][0].partition(")")[2]
    return base if base in STORED else np.dtype(base).name


def _shape(size: int) -> tuple[int, int]:
    root = math.isqrt(size)
    return (root, root) if root * root == size else (1, size)


def _blocks(path: Path, count: int, width: int, kind: str, ids: list[str]) -> Iterator[tuple[Tensor, list[str]]]:
    itemsize = 4 if kind == "float32" else 2
    nbytes = path.stat().st_size if path.exists() else -1
    if nbytes != count * width * itemsize:
        state = "is missing" if nbytes < 0 else f"is {nbytes} bytes long"
        raise malformed(path, f"{state} where info.json asks for {count} rows of {width} x {itemsize} bytes")
    if count == 0:
        return
    data = np.memmap(path, np.uint8, mode="r", shape=(count, width * itemsize))
    step = max(1, BLOCK_BYTES // (width * itemsize))
    for start in range(0, count, step):
        yield as_rows(data[start : start + step], kind, width), ids[start : start + step]
