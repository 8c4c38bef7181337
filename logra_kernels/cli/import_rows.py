"""`logra import`: rows that other tools have logged, into a store."""

from __future__ import annotations

import argparse

from logra_kernels.cli import session

TOOLS = ("logix", "bergson")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tool", choices=TOOLS, help="what wrote the rows")
    parser.add_argument("path", metavar="PATH", help="LogIX's project directory, or Bergson's run directory")
    parser.add_argument(
        "--out", required=True, metavar="STORE", help="directory of the store; an interrupted one goes on"
    )
    parser.add_argument("--dtype", help="of the stored rows (default as they were written)")


def run(args: argparse.Namespace) -> int:
    """Import and say what came in."""
    from logra_kernels import compat

    imported = {"logix": compat.import_logix, "bergson": compat.import_bergson}[args.tool]
    store = imported(args.path, args.out, dtype=args.dtype)
    print(f"imported  {len(store):,} rows of {store.dim:,} numbers from {len(store.layers)} layers, {store.dtype}")
    print(f"store     {args.out}: {store.nbytes / 1e6:,.1f} MB in {session.shards(len(store.manifest.shards))}")
    return 0
