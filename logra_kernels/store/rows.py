"""Checks that stand between a caller's rows and the store."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from logra_kernels.errors import StoreError
from logra_kernels.ops import RowFormat
from logra_kernels.store.format import Manifest
from logra_kernels.store.ids import DELETED, UNKNOWN, KnownIds, all_str
from logra_kernels.store.native import largest_magnitude

SHOWN = 5  # ids or layers named in a message


def check_rows(directory: Path, manifest: Manifest, rows: Tensor, ids: Sequence[str]) -> None:
    """Shapes and types of one append; nothing about the numbers, or what the ids are.

    Raises:
        StoreError: Not [N, D] floating point, or not N ids.
    """
    if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.dtype.is_floating_point:
        given = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise StoreError(f"rows are {given}; they must be a floating point tensor [N, {manifest.dim}]")
    if rows.shape[1] != manifest.dim:
        layers = shorten([f"{layer.name} {layer.k_out}x{layer.k_in}" for layer in manifest.layers])
        raise StoreError(
            f"rows are {rows.shape[1]} wide and {directory} holds rows of {manifest.dim} ({layers});"
            " pass rows of these layers"
        )
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__"):
        raise StoreError("ids must be a list of str, one for each row")
    if len(ids) != rows.shape[0]:
        raise StoreError(f"{len(ids)} ids for {rows.shape[0]} rows; give one for each row")


def add_ids(known: KnownIds, ids: list[str]) -> None:
    """Take the ids of the rows that come next.

    Raises:
        StoreError: They are no strings, are there already, or were deleted; then none is taken.
    """
    if known.add(ids) < 0:
        return
    seen: set[str] = set()
    twice = [name for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if twice:
        raise StoreError(f"ids occur twice in one append: {shorten(twice)}; every row needs its own")
    numbers = known.numbers(ids).tolist()
    gone = [repr(name) for name, number in zip(ids, numbers, strict=True) if number == DELETED]
    if gone:
        raise StoreError(
            f"ids were deleted from the store: {shorten(gone)};"
            " leave these rows out, or release the ids first: store.compact(release_ids=True), or"
            " logra compact --release-ids"
        )
    there = [repr(name) for name, number in zip(ids, numbers, strict=True) if number >= 0]
    raise StoreError(
        f"ids are in the store already: {shorten(there)}; every row needs its own id"
        " (to go on after an interruption, append with skip_committed=True)"
    )


def check_finite(manifest: Manifest, rows: Tensor, ids: Sequence[str]) -> None:
    """Every number is finite and the format can hold it.

    Raises:
        StoreError: Names the ids and layers of those that are not.
    """
    if rows.numel() == 0:
        return
    rows = rows.detach()
    form = manifest.format
    # NaN goes through, and rounding keeps the order of the others.
    if bool(_fits(largest_magnitude(rows), form)):
        if form.scale == "fp16":
            _check_small(manifest, rows, ids)
        return
    good = _fits(rows, form)
    bad_rows = (~good.all(dim=1)).nonzero().flatten().tolist()
    bad_layers = [layer.name for layer in manifest.layers if not bool(good[:, layer.part].all())]
    where = f"ids {shorten([repr(ids[row]) for row in bad_rows])}, layers {shorten(bad_layers)}"
    if bool(rows.isfinite().all()):
        raise StoreError(
            f"{len(bad_rows)} rows hold numbers too large for {form}: {where};"
            " none of this append was stored; scale the loss down or leave these rows out"
        )
    raise StoreError(
        f"{len(bad_rows)} rows hold NaN or Inf: {where}; none of this append was stored;"
        " check the loss of these samples or leave them out"
    )


def fitting_rows(manifest: Manifest, rows: Tensor) -> Tensor:
    """Which rows the format can hold, bool [N], on the rows' device and without waiting for it."""
    form = manifest.format
    ends = torch.stack(torch.aminmax(rows.detach(), dim=1))
    fit = _fits(ends, form).all(dim=0)
    return fit & ~_too_small(ends.abs().amax(dim=0), form) if form.scale == "fp16" else fit


def _fits(numbers: Tensor, form: RowFormat) -> Tensor:
    numbers = numbers.to(form.value_dtype)
    return (numbers / form.most).to(form.scale_dtype).isfinite() if form.scaled else numbers.isfinite()


def _too_small(most: Tensor, form: RowFormat) -> Tensor:
    """Whether a row whose largest magnitude is `most` has a scale that loses digits in fp16."""
    return (most > 0) & (most / form.most < torch.finfo(torch.float16).tiny)


def _check_small(manifest: Manifest, rows: Tensor, ids: Sequence[str]) -> None:
    """No row is so small that its largest scale loses digits in fp16."""
    bad = _too_small(rows.abs().amax(dim=1), manifest.format).nonzero().flatten().tolist()
    if bad:
        raise StoreError(
            f"{len(bad)} rows are too small for {manifest.format}: ids {shorten([repr(ids[row]) for row in bad])};"
            " none of this append was stored; use fp32 scales"
        )


def committed_prefix(known: KnownIds, committed: int, ids: list[str]) -> int:
    """How many of `ids` lead the list and are stored already, at the place where they should be, or were deleted.

    Args:
        committed: Rows below this number may be dropped: those that were committed when the store was opened. Those
            that were deleted do not come back by a rerun.

    Raises:
        StoreError: They are not consecutive rows, or new ids follow before all committed ones have come.
    """
    numbers = known.numbers(ids)
    stored = (numbers != UNKNOWN) & (numbers < committed)
    count = len(ids) if stored.all() else int(stored.argmin())
    shown = [(name, number) for name, number in zip(ids[:count], numbers.tolist(), strict=False) if number != DELETED]
    if not shown:
        return count
    first = shown[0][1]
    for place, (name, number) in enumerate(shown):
        if number != first + place:
            raise _out_of_order(f"{name!r} is row {number} of the store and comes here as row {first + place}")
    if count < len(ids) and first + len(shown) != known.rows:
        raise _out_of_order(
            f"{ids[count]!r} is new and would follow row {first + len(shown) - 1}, but the store has {known.rows} rows"
        )
    return count


def rows_to_delete(directory: Path, known: KnownIds, ids: Iterable[str], missing_ok: bool) -> dict[str, int]:
    """Id -> number of the rows with these ids; ids that are deleted already are passed over.

    Raises:
        StoreError: Some ids are not in the store, unless that is `missing_ok`.
    """
    if isinstance(ids, str | bytes) or not all_str(ids := list(ids)):
        raise StoreError("ids must be a list of str; convert them with str()")
    wanted = list(dict.fromkeys(ids))
    found = dict(zip(wanted, known.numbers(wanted).tolist(), strict=True))
    absent = [repr(name) for name, number in found.items() if number == UNKNOWN]
    if absent and not missing_ok:
        raise StoreError(
            f"{directory} has no rows with {len(absent)} of the {len(wanted)} ids: {shorten(absent)};"
            " none was deleted; correct them, or pass over them with missing_ok=True (`logra delete --missing-ok`)"
        )
    return {name: number for name, number in found.items() if number >= 0}


def shorten(names: Sequence[str], count: int | None = None) -> str:
    """The first of so many names; `count` where not all are given."""
    count = len(names) if count is None else count
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _out_of_order(why: str) -> StoreError:
    return StoreError(
        f"the rows come in another order than they were stored in: {why};"
        " use the same data in the same order, or a new store"
    )
