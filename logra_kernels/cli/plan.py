"""`logra plan`: what a store costs on disk and in memory, and what logging into it costs, before it is done."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from logra_kernels.cli import checks, session

if TYPE_CHECKING:
    from logra_kernels.plan import Plan, Probe
    from logra_kernels.store import GradientStore

DEFAULT_ROWS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="MODEL_DIR|STORE", help="a model to log with, or a store to ask")
    parser.add_argument("--rows", type=int, help=f"rows of the store (default its own; {DEFAULT_ROWS:,} for a model)")
    parser.add_argument("--queries", type=int, default=64, help="asked at a time (default 64)")
    parser.add_argument("-k", type=int, default=100, help="rows found for each query (default 100)")
    logging = parser.add_argument_group("logging, as in `logra log`; a few batches of full length are tried")
    logging.add_argument("--rank", type=int, default=64)
    logging.add_argument("--rank-c", type=int, help="of rows kept as factors, 1 to 8")
    logging.add_argument(
        "--observe", type=int, default=256, metavar="N", help="rows that PCA learns from (default 256); 0 for none"
    )
    logging.add_argument("--include", nargs="+", action="extend", metavar="GLOB")
    logging.add_argument("--exclude", nargs="+", action="extend", metavar="GLOB")
    logging.add_argument("--max-length", type=int)
    logging.add_argument("--batch-size", type=int, default=8)
    session.add_window_argument(logging)
    session.add_device_argument(logging)


def run(args: argparse.Namespace) -> int:
    """Print the costs; a model is loaded and tried."""
    from logra_kernels.plan import plan
    from logra_kernels.store import GradientStore

    checks.check_rank_c(args.rank_c)
    checks.check_least(args, max_length=2)
    layers: GradientStore | Mapping[str, tuple[int, int]]
    if GradientStore.exists(args.source):
        layers = GradientStore.open(args.source)
    else:
        if args.observe < 0:
            raise ValueError(f"--observe is {args.observe}; it must be at least 0")
        args.rows = DEFAULT_ROWS if args.rows is None else args.rows
        tried = _try(args)
        _print_logging(
            tried,
            args.rows,
            min(args.observe, args.rows),
            session.window_bytes(args.window, args.batch_size, tried.layers),
        )
        layers = tried.layers
    _print_costs(plan(layers, args.rows, queries=args.queries, k=args.k, rank_c=args.rank_c))
    return 0


def _try(args: argparse.Namespace) -> Probe:
    from logra_kernels.integrations import causal_lm
    from logra_kernels.plan import probe
    from logra_kernels.projection import Projection

    model, tokenizer = causal_lm.load(args.source, session.device(args.device))
    longest = session.max_length(model, args.max_length)
    texts = ["a b " * longest] * args.batch_size  # cut to the full length
    batch = causal_lm.encode(tokenizer, texts, max_length=longest).to(next(model.parameters()).device)
    return probe(
        model,
        lambda: causal_lm.loss_sum(model, batch).backward(),
        args.batch_size,
        sequence_length=batch.sequence_length,
        weights=batch.attention_mask,
        include=args.include,
        exclude=args.exclude,
        projection=Projection(args.rank, "pca" if args.observe else "orthonormal"),
        rank_c=args.rank_c,
    )


def _print_logging(tried: Probe, rows: int, observed: int, waiting: int) -> None:
    on_host, on_device = (waiting, 0) if tried.device_bytes is None else (0, waiting)
    rate = tried.samples / tried.step_seconds
    print(f"layers          {len(tried.layers)}")
    if tried.observing is not None:
        print(f"observe         {tried.observe_seconds(observed) / 3600:,.2f} h for {observed:,} rows of full length")
    print(f"log             {tried.seconds(rows) / 3600:,.2f} h for {rows:,} rows of full length, {rate:,.1f} rows/s")
    print(f"log, memory     {_size(tried.peak_bytes + on_host)}")
    if tried.device_bytes is not None:
        print(f"log, device     {_size(tried.device_bytes + on_device)}")


def _print_costs(costs: Plan) -> None:
    kept = "" if costs.rank_c is None else f", kept as {costs.rank_c} factors a layer"
    print(f"rows            {costs.rows:,} of {costs.dim:,} numbers{kept}")
    print(f"ask             {costs.queries:,} queries for {costs.k:,} rows each")
    print(f"{'format':<15} {'bytes a row':>13} {'disk':>10} {'ask, memory':>12}")
    for name, cost in costs.formats.items():
        print(f"{name:<15} {cost.row_bytes:>13,} {_size(cost.disk_bytes):>10} {_size(cost.topk_bytes):>12}")


def _size(nbytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes / 1e3:,.1f} kB"
