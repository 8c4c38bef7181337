"""`logra index`: short rows beside a store, by which a query finds its best rows without reading the others."""

from __future__ import annotations

import argparse

from logra_kernels.cli import session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`")
    parser.add_argument("--dims", type=int, help="numbers in a short row (default 2048, or a quarter of the row's)")
    parser.add_argument("--dtype", default="bf16", help="of the short rows (default bf16)")
    parser.add_argument(
        "--k", type=int, help="measure the recall of the k best rows (default 100, or a tenth of them if that is fewer)"
    )


def run(args: argparse.Namespace) -> int:
    """Build, and say how well it finds."""
    from logra_kernels.store import GradientStore

    store = GradientStore.open(args.store)
    info = store.build_index(args.dims, args.dtype, k=args.k)
    print(f"index     {info.dims:,} numbers for each of {len(store):,} rows, {info.dtype}")
    best = f"{info.k} best rows ({session.of_rows(info.k, len(store))})"
    print(f"recall    of the {best} of {info.queries} stored rows that asked, by length of the shortlist:")
    for length, share in info.recall.items():
        print(f"  {length:>9,}  {share:7.1%}{'  <- used' if length == info.shortlist else ''}")
    return 0
