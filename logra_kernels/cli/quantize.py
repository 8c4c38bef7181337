"""`logra quantize`: a store's rows in another number format, and what that costs them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from logra_kernels.cli import checks, session
from logra_kernels.errors import LograError
from logra_kernels.ops import FORMATS

if TYPE_CHECKING:
    from logra_kernels.store import GradientStore, Whitening


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory written by `logra log`; it stays as it is")
    parser.add_argument("--to", required=True, choices=FORMATS, help="number format of the new store")
    parser.add_argument("--out", required=True, metavar="STORE", help="a new directory")
    parser.add_argument("--block", type=int, help="numbers that share a scale, a power of two (default 128)")
    parser.add_argument("--scale", choices=["fp32", "fp16"], help="of the scales (default fp32)")
    parser.add_argument("--rank-c", type=int, help="keep so many factors of each layer, 1 to 8 (default as the store)")
    parser.add_argument(
        "--whiten",
        action="store_true",
        help="whiten rows by the curvature first: more of their order survives few bits, and it is fixed from then on",
    )
    session.add_curvature_argument(parser)
    parser.add_argument("--damping", type=float, help="lambda of --whiten; default as the projection needs")


def run(args: argparse.Namespace) -> int:
    """Quantise, and say what came out."""
    from logra_kernels.store import GradientStore, quantization_loss, quantize

    checks.check_rank_c(args.rank_c)
    if args.whiten:
        checks.check_curvature(args.curvature, args.store)
    checks.check_is_no_input(args.out, [args.store])
    checks.check_is_no_store(args.out)
    before = GradientStore.open(args.store)
    whitening = _whitening(before, args) if args.whiten else None
    store = quantize(
        args.store, args.out, args.to, block=args.block, scale=args.scale, rank_c=args.rank_c, whitening=whitening
    )
    print(f"quantised {len(store):,} rows into {args.out}: {store.manifest.kept_as}")
    print(f"size      {store.nbytes / 1e6:,.1f} MB, of {before.nbytes / 1e6:,.1f} MB in {before.manifest.kept_as}")
    print(f"loss      {describe(quantization_loss(store), len(store))}")
    return 0


def _whitening(store: GradientStore, args: argparse.Namespace) -> Whitening:
    """
    Raises:
        LograError: Whitened rows, or a curvature that cannot be computed.
    """
    from logra_kernels.curvature import CURVATURES
    from logra_kernels.influence import whitening_of

    if store.whitening is not None:
        raise LograError(f"{store.path} holds whitened rows already; leave --whiten out")
    return whitening_of(CURVATURES[args.curvature].of(store), args.damping)


def describe(loss: dict | None, rows: int) -> str:
    """One line of what was measured; rows: how many the store has."""
    if loss is None:
        return "not measured for the rows as they are"
    least = min(loss["energy_kept"], key=loss["energy_kept"].get)
    return (
        f"against {loss['source_format']}: relative L2 {loss['relative_l2']:.2e}, score correlation"
        f" {loss['score_correlation']:.5f}, top-{loss['top']} agreement {loss['top_agreement']:.3f}"
        f" ({session.of_rows(loss['top'], rows)}; {loss['queries']} rows as queries);"
        f" least energy kept {loss['energy_kept'][least]:.4f}, of {least}"
    )
