"""`logra export`: a store's rows for other tools."""

from __future__ import annotations

import argparse

FORMATS = ("npy", "faiss", "datasets")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--format", choices=FORMATS, default="npy", help="NumPy, FAISS or Hugging Face datasets")


def run(args: argparse.Namespace) -> int:
    """Export and say where to."""
    from logra_kernels.store import GradientStore

    store = GradientStore.open(args.store)
    store.export(args.out, args.format)
    print(f"exported  {len(store):,} rows of {store.dim:,} numbers to {args.out} ({args.format})")
    return 0
