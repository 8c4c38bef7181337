"""`logra delete`: rows out of a store, by their ids or by a column."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from logra_kernels.errors import LograError

if TYPE_CHECKING:
    from logra_kernels.store import GradientStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`")
    parser.add_argument("--ids", nargs="+", action="extend", metavar="ID", help="of the rows")
    parser.add_argument("--ids-file", metavar="FILE", help="one id a line")
    parser.add_argument(
        "--where", action="append", metavar="COLUMN=VALUE", help="rows with this value; given twice, with both"
    )
    parser.add_argument("--missing-ok", action="store_true", help="pass over ids that the store does not have")


def run(args: argparse.Namespace) -> int:
    """Delete in one commit and say what is left."""
    from logra_kernels.store import GradientStore

    if not (args.ids or args.ids_file or args.where):
        raise LograError("say which rows to delete: --ids, --ids-file or --where")
    ids = [*(args.ids or []), *(_read_ids(Path(args.ids_file)) if args.ids_file else [])]
    with GradientStore.open(args.store, mode="append") as store:
        if args.where:
            ids += _matching(store, args.where)
        count = store.delete(ids, missing_ok=args.missing_ok)
        print(f"deleted   {count:,} rows of {args.store}; {len(store):,} are left")
    if count:
        print(f"files     keep them until: logra compact {args.store}")
    return 0


def _read_ids(path: Path) -> list[str]:
    """
    Raises:
        LograError: The file is not text.
    """
    try:
        # An id may hold what else counts as the end of a line, and its halves may be ids, too.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise LograError(f"{path}: byte {error.start + 1} is not UTF-8; convert the file") from error
    return [line for line in (line.removesuffix("\r") for line in lines) if line]


def _matching(store: GradientStore, conditions: list[str]) -> list[str]:
    """Ids of the rows that meet all conditions.

    Raises:
        LograError: A condition is malformed or names no column, or no row meets them all.
    """
    kept = [True] * len(store)
    for condition in conditions:
        name, equals, value = condition.partition("=")
        if not equals:
            raise LograError(f"--where {condition!r} must be COLUMN=VALUE")
        if name not in store.table.column_names:
            raise LograError(f"{store.path} has no column {name!r}; it has {', '.join(store.table.column_names)}")
        values = store.table.column(name).to_pylist()
        kept = [before and str(there) == value for before, there in zip(kept, values, strict=True)]
    found = [name for name, keep in zip(store.ids, kept, strict=True) if keep]
    if not found:
        raise LograError(f"no row of {store.path} has {' and '.join(conditions)}")
    return found
