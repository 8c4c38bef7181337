"""A store's rows in another number format, and how far from the rows they came from that is.

The new store is written beside its place under a temporary name and renamed when it is whole, so that a killed
quantisation leaves no store; the next one removes what it left.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.store.columns import ID
from logra_kernels.store.durable import TEMPORARY, sync_directory
from logra_kernels.store.lock import WriterLock
from logra_kernels.store.observed import take_observed
from logra_kernels.store.reading.coarse import measured_top
from logra_kernels.store.removed import add_removed
from logra_kernels.store.skipped import add_skipped, read_skipped
from logra_kernels.store.store import GradientStore
from logra_kernels.store.whitening import Whitening
from logra_kernels.store.writing.create import check_free

LOSS = "quantization"  # the sidecar
QUERIES = 64


def quantize(
    source: str | os.PathLike,
    out: str | os.PathLike,
    dtype: str,
    *,
    block: int | None = None,
    scale: str | None = None,
    rank_c: int | None = None,
    rows_per_shard: int | None = None,
    whitening: Whitening | None = None,
) -> GradientStore:
    """Write the rows of a store in another format, with their ids, columns and facts, into a new store.

    What was computed from the rows (curvature, self-influence) is not carried over, what runs observed beside them is.
    The loss is measured and kept, see `quantization_loss`.

    Args:
        source: Directory of the store; it is only read.
        out: A new directory.
        dtype, block, scale, rows_per_shard: As in `GradientStore.create`.
        rank_c: Factors of each layer to keep, as there; by default as the source has it.
        whitening: Whiten the rows first, `influence.whitening_of` the source, say. Rows that are whitened stay so.

    Raises:
        StoreError: A store cannot be read or made, an argument is wrong, or the disk refuses.
    """
    rows = GradientStore.open(source)
    target = Path(out)
    check_free(target)
    temporary = target.absolute().parent / f"{TEMPORARY}{target.name}"
    _remove_leftover(temporary)
    if whitening is not None and rows.whitening is not None:
        raise StoreError(f"{rows.path} holds whitened rows already; leave whitening out, or quantise what it came from")
    kept = {name: (key, rows.sidecar_read(name, key=key)) for name, key in rows.manifest.irreplaceable.items()}
    store = GradientStore.create(
        temporary,
        rows.layers,
        dtype,
        block=block,
        scale=scale,
        projection=rows.projection,
        fingerprints=rows.fingerprints,
        rows_per_shard=rows_per_shard,
        meta=rows.meta,
        rank_c=rows.rank_c if rank_c is None else rank_c,
        sidecars={name: (key, found[0]) for name, (key, found) in kept.items() if found is not None},
        whitening=whitening or rows.whitening,
    )
    try:
        _fill(rows, store, whitening)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, StoreError) and str(temporary) in str(error):
            what = str(error).split("; ")[0]
            raise StoreError(f"{what}; nothing is left of it; remove the cause and quantise again") from error
        raise
    try:
        os.replace(temporary, target)
        sync_directory(target.absolute().parent)
    except OSError as error:
        raise StoreError(
            f"{temporary} cannot be renamed to {target}: {error.strerror}; remove what is there"
        ) from error
    return GradientStore.open(target)


def quantization_loss(store: GradientStore) -> dict[str, Any] | None:
    """What `quantize` measured against the rows that the store came from; None for a store that was not quantised, or
    whose rows have changed since.

    Returns:
        source_format, relative_l2 (of all rows), energy_kept (layer -> 1 less its squared relative error), queries (how
        many rows were asked with), score_correlation (Pearson's, over all scores), top (min(100, N / 10), at least 1)
        and top_agreement (the share of each query's `top` best rows that is the same, on average; of all N rows it
        would be 1 whatever was lost).

    Raises:
        StoreError: The file is damaged.
    """
    found = store.sidecar_read(LOSS)
    return None if found is None else found[1]


def _remove_leftover(temporary: Path) -> None:
    """
    Raises:
        StoreError: Another process is writing it.
    """
    if not temporary.exists():
        return
    WriterLock(temporary).release()
    shutil.rmtree(temporary)


def _blocks(rows: GradientStore, whitening: Whitening | None) -> Iterator[tuple[int, Tensor]]:
    """(first row, the rows that are to be stored)."""
    for first, block in rows.blocks():
        yield first, block if whitening is None else whitening.apply(block)


def _fill(rows: GradientStore, store: GradientStore, whitening: Whitening | None) -> None:
    with store:
        _copy(rows, store, whitening)
    whole = GradientStore.open(store.path)
    add_skipped(store.path, read_skipped(rows.path))
    add_removed(store.path, rows.deleted_ids)
    take_observed([rows], store.path)
    whole.sidecar_write(LOSS, {}, _measure(rows, whole, whitening))


def _copy(rows: GradientStore, store: GradientStore, whitening: Whitening | None) -> None:
    for first, block in _blocks(rows, whitening):
        table = rows.table.slice(first, len(block))
        columns = {name: table.column(name) for name in table.column_names if name != ID}
        store.append(block, table.column(ID).to_pylist(), columns)


def _measure(rows: GradientStore, store: GradientStore, whitening: Whitening | None) -> dict[str, Any]:
    errors, sizes = torch.zeros(2, len(rows.layers), dtype=torch.float64, device="cpu")
    for first, block in _blocks(rows, whitening):
        exact = block.double()
        lost = store.read(first, first + len(block)).double() - exact
        for i, part in enumerate(rows.slices.values()):
            errors[i] += lost[:, part].square().sum()
            sizes[i] += exact[:, part].square().sum()
    error, size = float(errors.sum()), float(sizes.sum())
    kept = 1 - torch.where(sizes > 0, errors / sizes, 0.0)
    count = min(QUERIES, len(rows))
    chosen = [place * len(rows) // count for place in range(count)]
    queries = (
        torch.cat([rows.read(i, i + 1) for i in chosen])
        if count
        else torch.zeros(0, rows.dim, dtype=torch.float32, device="cpu")
    )
    if whitening is None:
        exact, found = rows.score(queries), store.score(queries)
    else:
        exact, found = rows.score(whitening.solve(queries)), store.score(whitening.apply(queries))
    exact, found = exact.double(), found.double()
    return {
        "source_format": rows.manifest.kept_as,
        "relative_l2": (error / size) ** 0.5 if size else 0.0,
        "energy_kept": dict(zip(rows.layers, kept.tolist(), strict=True)),
        "queries": count,
        "score_correlation": _correlation(exact, found),
        "top": measured_top(len(rows)),
        "top_agreement": _agreement(exact, found, measured_top(len(rows))),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale else 1.0


def _agreement(exact: Tensor, found: Tensor, top: int) -> float:
    if not exact.numel():
        return 1.0
    pairs = zip(exact.topk(top).indices.tolist(), found.topk(top).indices.tolist(), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / (top * len(exact))
