"""`logra merge`: the stores of several ranks, jobs or machines made one."""

from __future__ import annotations

import argparse
from pathlib import Path

from logra_kernels.cli import checks, session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", metavar="STORE", nargs="+", help="directories written by `logra log` in the same way")
    parser.add_argument("--out", required=True, metavar="STORE", help="a new directory, or that of the same merge")
    parser.add_argument(
        "--duplicates",
        choices=["refuse", "keep"],
        default="refuse",
        help="ids that several stores have; keep appends #2 to the later one's (default refuse)",
    )
    parser.add_argument("--copy", action="store_true", help="copy the files instead of sharing them by hard links")


def run(args: argparse.Namespace) -> int:
    """Merge and say what came out."""
    from logra_kernels.store import merge
    from logra_kernels.store.format import MERGE_PLAN, MERGED

    checks.check_is_no_input(args.out, args.stores)
    if not any((Path(args.out) / plan).exists() for plan in (MERGE_PLAN, MERGED)):
        checks.check_is_no_store(args.out)
    store = merge(args.stores, args.out, duplicates=args.duplicates, link=not args.copy)
    print(f"merged    {len(args.stores)} stores into {args.out}: {len(store):,} rows")
    print(f"size      {store.nbytes / 1e6:,.1f} MB in {session.shards(len(store.manifest.shards))}")
    return 0
