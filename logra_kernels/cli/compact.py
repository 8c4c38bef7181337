"""`logra compact`: the files of a store without its deleted rows."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`")
    parser.add_argument(
        "--release-ids",
        action="store_true",
        help="forget which rows were deleted, so that their ids can be used again; else logging passes over them",
    )


def run(args: argparse.Namespace) -> int:
    """Compact and say what that saved."""
    from logra_kernels.store import GradientStore

    with GradientStore.open(args.store, mode="append") as store:
        before = store.nbytes
        count = store.compact(release_ids=args.release_ids)
        saved = (before - store.nbytes) / 1e6
        print(
            f"compacted {args.store}: {count:,} deleted rows taken out, {saved:,.1f} MB saved, {len(store):,} rows left"
        )
        if store.manifest.retired:
            print("files     of the old state are removed by the next writer: somebody is reading them")
    return 0
