"""Where a store begins and where an interrupted one is picked up: a new manifest, a free directory, no leftovers."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logra_kernels.errors import StoreError
from logra_kernels.ops import MOST_RANK, RowFormat, factored_dim
from logra_kernels.store.durable import TEMPORARY, remove_files
from logra_kernels.store.entry import is_row_file
from logra_kernels.store.format import (
    LOCK,
    MANIFEST,
    ORIGIN,
    SIDECARS,
    Layer,
    Manifest,
    default_rows_per_shard,
    layer_widths,
    stored_width,
)
from logra_kernels.store.rows import shorten
from logra_kernels.store.sidecar import remove_temporaries
from logra_kernels.store.whitening import Whitening


def store_exists(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def new_manifest(
    layers: Mapping[str, tuple[int, int]],
    dtype: str,
    block: int | None,
    scale: str | None,
    projection: Mapping[str, Any] | None,
    fingerprints: Mapping[str, str] | None,
    rows_per_shard: int | None,
    meta: Mapping[str, Any] | None,
    rank: int | None,
    whitening: Whitening | None,
) -> Manifest:
    try:
        form = RowFormat.of(dtype, block, scale)
    except ValueError as error:
        raise StoreError(f"dtype: {error}") from None
    if not layers:
        raise StoreError("a store needs at least one layer: layers={'name': (k_out, k_in)}")
    table = []
    offset = 0
    for name, size in layers.items():
        if not isinstance(name, str) or len(size) != 2 or any(not isinstance(k, int) or k < 1 for k in size):
            raise StoreError(f"layer {name!r}: {size!r} must be (k_out, k_in), two positive integers")
        table.append(Layer(name, size[0], size[1], offset))
        offset += size[0] * size[1]
    check_rank(layers, rank)
    widths = layer_widths(list(layers.values()), rank)
    width, numbers = stored_width(widths, form), sum(widths)
    if form.scaled and form.row_bytes(width) > 2 * numbers:
        warnings.warn(
            f"rows in {form} take {form.row_bytes(width)} bytes, more than the {2 * numbers} of bf16: a layer has"
            f" {numbers // len(table)} numbers on average, and each begins a block of its own; use bf16, or smaller"
            " blocks",
            stacklevel=4,
        )
    if whitening is not None:
        whitening.check(layers)
    if rows_per_shard is None:
        rows_per_shard = default_rows_per_shard(width, form)
    if rows_per_shard < 1:
        raise StoreError(f"rows_per_shard is {rows_per_shard}; it must be at least 1")
    if any(not isinstance(text, str) for pair in (fingerprints or {}).items() for text in pair):
        raise StoreError("fingerprints must map str to str")
    return Manifest(
        tuple(table),
        form,
        rows_per_shard,
        _as_json("projection", projection),
        dict(fingerprints or {}),
        _as_json("meta", meta) or {},
        rank=rank,
        apart=width > numbers,
        whitened=None if whitening is None else {**whitening.facts, "digest": whitening.digest},
    )


def check_rank(layers: Mapping[str, tuple[int, int]], rank: int | None) -> None:
    """
    Raises:
        StoreError: There cannot be so many factors of each layer, or they would be no fewer numbers than the row.
    """
    if rank is None:
        return
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise StoreError(f"rank_c is {rank!r}; it must be 1 to {MOST_RANK}, or None to keep rows as they are")
    width, dim = factored_dim(list(layers.values()), rank), sum(k_out * k_in for k_out, k_in in layers.values())
    if width >= dim:
        raise StoreError(
            f"rank_c {rank} keeps {width} numbers of rows of {dim}; use fewer factors, or None to keep rows as they are"
        )


def _as_json(name: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a later open will find: JSON has no tuples, and no other keys than strings."""
    try:
        return None if value is None else json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{name} is not JSON data ({error}); use strings, finite numbers, lists and dicts") from None


def check_free(directory: Path) -> None:
    """Nothing is at the path, or an empty directory, or what a creation leaves that ends before the first manifest."""
    if store_exists(directory):
        raise StoreError(f"{directory} holds a gradient store; open it with mode='append', or choose another path")
    if directory.exists() and not directory.is_dir():
        raise StoreError(f"{directory} is a file; choose another path")
    if directory.is_dir():
        begun = {LOCK, ORIGIN, SIDECARS}
        other = sorted(e.name for e in directory.iterdir() if e.name not in begun and not e.name.startswith(TEMPORARY))
        if other:
            raise StoreError(f"{directory} is not empty (it holds {shorten(other)}); choose a new directory")


def remove_leftovers(directory: Path, manifest: Manifest) -> None:
    """Remove what a writer leaves that dies between two steps: temporaries, and files of rows no manifest names."""
    named = {name for shard in manifest.shards for name in shard.names} | {*manifest.retired}
    remove_files(
        directory,
        [
            entry.name
            for entry in directory.iterdir()
            if entry.name.startswith(TEMPORARY) or (is_row_file(entry.name) and entry.name not in named)
        ],
    )
    remove_temporaries(directory)
