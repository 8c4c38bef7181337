"""Gradient logs written by LogIX (`logix.save`, read from the source of its version 0.1.1):

log_rank_<r>_chunk_<c>.mmap             rows one after the other, in a row the modules one after the other, no header
log_rank_<r>_chunk_<c>_metadata.json    [{data_id, path [[module, "grad"], ...], offset, shape [[k_out, k_in], ...],
                                        block_size, dtype}], one entry a row
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels.compat.into_store import BLOCK_BYTES, STORED, as_rows, malformed, read_json, write_store
from logra_kernels.errors import LograError
from logra_kernels.store import GradientStore

KIND = "grad"


def import_logix(path: str | os.PathLike, out: str | os.PathLike, *, dtype: str | None = None) -> GradientStore:
    """A store of the gradients in a LogIX log, rank by rank and chunk by chunk; run again, it goes on.

    Logged activations and output gradients are passed over. LogIX keeps one row an id, so ids are distinct within a
    rank; a log of several epochs or ranks that repeats them is refused.

    Args:
        path: The project's directory.
        out: A new directory.
        dtype: Of the stored rows; by default as they were logged.

    Raises:
        LograError: The log is incomplete or damaged, its rows have different modules, or it holds no gradients.
        StoreError: Rows or ids do not fit, or the disk refuses.
    """
    place = Path(path)
    chunks = sorted(_chunks(place))
    if not chunks:
        raise LograError(f"{place} is not a log written by LogIX: it has no log_rank_*_chunk_*.mmap; check the path")
    first = _entries(chunks[0][2])[0]
    layers, kind = _layers(chunks[0][2], first), str(first.get("dtype"))
    if kind not in STORED and kind != "float64":
        raise malformed(chunks[0][2], f"names the number type {kind!r}, known are {', '.join(STORED)}")
    blocks = (block for _, _, file in chunks for block in _blocks(file, first, layers))
    return write_store(out, layers, dtype or STORED.get(kind, "fp32"), "logix", blocks)


def _chunks(place: Path) -> Iterator[tuple[int, int, Path]]:
    for file in place.glob("log_rank_*_chunk_*.mmap"):
        found = re.fullmatch(r"log_rank_(\d+)_chunk_(\d+)\.mmap", file.name)
        if found:
            yield int(found[1]), int(found[2]), file


def _entries(file: Path) -> list[dict[str, Any]]:
    path = file.with_name(f"{file.stem}_metadata.json")
    entries = read_json(path, "a log written by LogIX")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise malformed(path, "holds no list of rows")
    return entries


def _layers(file: Path, entry: dict[str, Any]) -> dict[str, tuple[int, int]]:
    try:
        pairs = [
            (where, shape) for where, shape in zip(entry["path"], entry["shape"], strict=True) if where[-1] == KIND
        ]
        layers = {where[0]: (int(shape[0]), math.prod(shape[1:])) for where, shape in pairs}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise malformed(file, f"has metadata that says nothing usable ({error!r})") from None
    if not layers:
        raise LograError(f"{file.parent} logs no gradients; log them with LogIX's 'grad'")
    return layers


def _blocks(
    file: Path, first: dict[str, Any], layers: dict[str, tuple[int, int]]
) -> Iterator[tuple[Tensor, list[str]]]:
    entries = _entries(file)
    kind, itemsize = first["dtype"], torch.empty(0, dtype=getattr(torch, first["dtype"]), device="cpu").itemsize
    sizes = [math.prod(shape) for shape in first["shape"]]
    width = sum(sizes)
    wanted = np.repeat([where[-1] == KIND for where in first["path"]], sizes)
    columns = None if wanted.all() else torch.from_numpy(wanted)
    data = np.memmap(file, np.uint8, mode="r") if file.stat().st_size else np.zeros(0, np.uint8)
    step = max(1, BLOCK_BYTES // (width * itemsize))
    # Rows follow each other; else they are not of the one number type that the metadata names for all of their modules.
    if any(entry.get("offset") != row * width * itemsize for row, entry in enumerate(entries)):
        raise malformed(file, f"does not hold rows of {width} x {kind} one after the other")
    for start in range(0, len(entries), step):
        part = entries[start : start + step]
        held = np.empty((len(part), width * itemsize), np.uint8)
        for line, entry in zip(held, part, strict=True):
            if any(entry.get(key) != first[key] for key in ("path", "shape", "dtype")):
                raise malformed(file, f"holds a row, {entry.get('data_id')!r}, of other modules than the first one")
            at = entry["offset"]
            if at > len(data) - len(line):
                raise malformed(file, f"is {len(data)} bytes long and ends before row {entry.get('data_id')!r}")
            line[:] = data[at : at + len(line)]
        rows = as_rows(held, kind, width)
        yield rows if columns is None else rows[:, columns], [str(entry["data_id"]) for entry in part]
