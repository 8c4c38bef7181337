"""`logra fsck`: whether every byte of a store is as it was written; with --repair, keep what is."""

from __future__ import annotations

import argparse

SHOWN_IDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`")
    parser.add_argument(
        "--repair", action="store_true", help="keep everything that verifies, and say which rows are lost"
    )
    parser.add_argument(
        "--undelete", action="store_true", help="where a list of deleted rows is damaged, show these rows again"
    )


def run(args: argparse.Namespace) -> int:
    """Print a line for each fault; 1 where some are left."""
    from logra_kernels.store import fsck

    if args.undelete and not args.repair:
        raise ValueError("--undelete is a way to repair; add --repair")
    report = fsck(args.store, repair=args.repair, undelete=args.undelete)
    for kind, lines in (("fault", report.faults), ("note", report.notes), ("repair", report.repairs)):
        for line in lines:
            print(f"{kind:<7} {line}")
    if report.lost:
        shown = ", ".join(report.lost[:SHOWN_IDS])
        more = f" and {len(report.lost) - SHOWN_IDS} more" if len(report.lost) > SHOWN_IDS else ""
        print(f"lost    {len(report.lost)} rows: {shown}{more}; log them again to have them back")
    state = "whole" if not report.left else f"{report.left} fault{'s' if report.left > 1 else ''} left"
    print(f"store   {args.store}: {report.rows:,} rows intact, {state}")
    return 1 if report.left else 0
