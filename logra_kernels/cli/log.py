"""`logra log`: one projected gradient for each row of a data set, into a store that a rerun continues."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from logra_kernels.cli import session
from logra_kernels.errors import LograError, StoreError
from logra_kernels.ops import FORMATS

if TYPE_CHECKING:
    from torch import nn

    from logra_kernels.integrations.text_data import TextRow
    from logra_kernels.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", help="local directory of a Hugging Face causal language model")
    parser.add_argument("data", metavar="DATA", nargs="+", help=".jsonl, .parquet or .txt files, also with .gz")
    parser.add_argument("--out", required=True, metavar="STORE", help="directory of the store; an existing one goes on")
    gradients = parser.add_argument_group("gradients")
    gradients.add_argument("--rank", type=int, default=64, help="k_in and k_out of every layer (default 64)")
    gradients.add_argument(
        "--projection",
        metavar="KIND",
        help="pca (default), learned from a sample of the rows first, or at random: orthonormal (default with"
        " --observe 0), gaussian, rademacher, kaiming, mask, sjlt; or two with a comma between, of a layer's input and"
        " output",
    )
    gradients.add_argument(
        "--observe", type=int, default=256, metavar="N", help="rows of the sample (default 256); 0 looks at none"
    )
    gradients.add_argument("--seed", type=int, default=0, help="of the projection and the sample (default 0)")
    session.add_curvature_argument(gradients)
    gradients.add_argument("--include", nargs="+", action="extend", metavar="GLOB", help='layers, such as "*.mlp.*"')
    gradients.add_argument("--exclude", nargs="+", action="extend", metavar="GLOB", help="layers to leave out")
    data = parser.add_argument_group("data")
    data.add_argument("--text-field", default="text")
    data.add_argument("--id-field", default="id")
    data.add_argument("--source-field", default="source", help="the provider of a row")
    data.add_argument("--limit", type=int, help="log the first so many rows only")
    data.add_argument("--max-length", type=int, help="tokens kept of a row (default 512, or the model's positions)")
    data.add_argument("--no-text", action="store_true", help="keep the texts out of the store")
    data.add_argument(
        "--nonfinite",
        choices=["raise", "skip"],
        default="raise",
        help="rows whose loss or gradient is NaN or infinite: end with an error, or go on without them (default raise)",
    )
    cost = parser.add_argument_group("cost")
    cost.add_argument("--dtype", choices=FORMATS, default="fp32", help="of the stored rows (default fp32)")
    cost.add_argument(
        "--rank-c", type=int, help="keep so many factors of each layer, 1 to 8, in place of k_out x k_in numbers"
    )
    cost.add_argument("--batch-size", type=int, default=8, help="rows in one forward and backward (default 8)")
    cost.add_argument("--rows-per-shard", type=int, help="rows in one file of the store (default about 64 MB worth)")
    session.add_device_argument(cost)


def run(args: argparse.Namespace) -> int:
    """Log, finalize, print a summary; 130 after Ctrl-C."""
    for name, least in (("batch_size", 1), ("limit", 1), ("observe", 0), ("rows_per_shard", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    args.projection = args.projection or ("pca" if args.observe else "orthonormal")
    asking = [what for what in (args.projection, args.curvature) if {*what.split(",")} & {"pca", "kfac", "ekfac"}]
    if asking and not args.observe:
        raise ValueError(f"--observe 0 leaves {' and '.join(asking)} nothing to learn from; observe some rows")
    device = session.device(args.device)

    from logra_kernels.integrations import causal_lm, text_data

    rows = text_data.read_rows(args.data, args.text_field, args.id_field, args.source_field, args.limit)
    model, tokenizer = causal_lm.load(args.model, device)
    try:
        return _run(args, rows, model, tokenizer)
    except KeyboardInterrupt:
        return _interrupted(args)
    except StoreError as error:
        # The store speaks to programmers; here the way on is one command.
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        raise


def _run(args: argparse.Namespace, rows: list[TextRow], model: nn.Module, tokenizer: Any) -> int:
    from logra_kernels.projection import Projection
    from logra_kernels.run import Run

    longest = session.max_length(model, args.max_length)
    started = time.monotonic()
    with Run(
        args.out,
        model,
        include=args.include,
        exclude=args.exclude,
        projection=Projection(args.rank, session.kinds(args.projection), args.seed),
        dtype=args.dtype,
        rank_c=args.rank_c,
        rows_per_shard=args.rows_per_shard,
        fingerprints=session.fingerprints(tokenizer, longest),
        curvature=args.curvature,
    ) as logging:
        there = _rows_there(logging, rows)
        if logging.learning or args.curvature in ("kfac", "ekfac"):
            _observe(logging, rows, model, tokenizer, longest, args)
        if not _log(logging, rows, model, tokenizer, longest, args):
            logging.close()
            return _interrupted(args)
        logged = time.monotonic()
        with session.progress_bar(2 * len(rows), 0, "finalize") as bar:
            logging.finalize(bar.update)
        _summarize(logging, len(logging.store) - there, logged - started, time.monotonic() - logged, args.out)
    return 0


def _observe(
    logging: Run, rows: list[TextRow], model: nn.Module, tokenizer: Any, longest: int, args: argparse.Namespace
) -> None:
    """Forward and backward of a sample of the rows, the same one in every rerun."""
    import numpy as np

    from logra_kernels.integrations import causal_lm

    device = next(model.parameters()).device
    order = np.random.Generator(np.random.PCG64(args.seed)).permutation(len(rows))[: args.observe]
    sample = [rows[i] for i in sorted(order.tolist())]
    with session.progress_bar(len(sample), 0, "observe") as bar:
        for start in range(0, len(sample), args.batch_size):
            batch = sample[start : start + args.batch_size]
            bar.update(len(batch))
            if args.nonfinite == "skip":
                batch = _finite(batch, model, tokenizer, longest)
            if not batch:
                continue
            ids = [row.id for row in batch]
            encoded = causal_lm.encode(tokenizer, [row.text for row in batch], max_length=longest, ids=ids).to(device)
            with logging.observe(weights=encoded.attention_mask, sequence_length=encoded.sequence_length):
                causal_lm.loss_sum(model, encoded).backward()


def _finite(batch: list[TextRow], model: nn.Module, tokenizer: Any, longest: int) -> list[TextRow]:
    """The rows whose loss is neither NaN nor infinite; the others will not be logged either."""
    import torch

    from logra_kernels.integrations import causal_lm

    device = next(model.parameters()).device
    encoded = causal_lm.encode(tokenizer, [row.text for row in batch], max_length=longest, ids=[r.id for r in batch])
    with torch.no_grad():
        nll, _ = causal_lm.losses(model, encoded.to(device), nonfinite="keep")
    return [row for row, finite in zip(batch, nll.isfinite().tolist(), strict=True) if finite]


def _log(
    logging: Run, rows: list[TextRow], model: nn.Module, tokenizer: Any, longest: int, args: argparse.Namespace
) -> bool:
    """Log every batch that is not committed; False when the user asked to stop."""
    from logra_kernels.integrations import causal_lm

    device = next(model.parameters()).device
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    left = [batch for batch in batches if not logging.committed([row.id for row in batch])]
    kept = "keep" if args.nonfinite == "skip" else "raise"
    waiting = sum(len(batch) for batch in left)
    with _Stop() as stop, session.progress_bar(len(rows), len(rows) - waiting, "log") as bar:
        for batch in left:
            if stop.asked:
                return False
            ids = [row.id for row in batch]
            columns = {"source": [row.source for row in batch]}
            if not args.no_text:
                columns["text"] = [row.text for row in batch]
            encoded = causal_lm.encode(tokenizer, [row.text for row in batch], max_length=longest, ids=ids).to(device)
            length = encoded.sequence_length
            with logging.log(ids=ids, columns=columns, sequence_length=length, nonfinite=args.nonfinite):
                causal_lm.loss_sum(model, encoded, nonfinite=kept).backward()
            bar.update(len(batch))
    return True


class _Stop:
    """Inside the `with`, the first Ctrl-C only asks to stop after the batch at hand; a second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _rows_there(logging: Run, rows: list[TextRow]) -> int:
    """How many rows the store holds already, which must be the first rows of the data but those it has skipped.

    Raises:
        LograError: The store holds other rows: going on would mix two data sets in it.
    """
    from logra_kernels.store import GradientStore

    if not GradientStore.exists(logging.path):
        return 0
    stored, skipped = logging.store.ids, set(logging.skipped)
    rows = [row for row in rows if row.id not in skipped]
    texts = logging.store.columns.get("text")
    for number, (name, row) in enumerate(zip(stored, rows, strict=False)):
        if name != row.id:
            raise LograError(
                f"row {number + 1} of {logging.path} is {name!r} but of the data {row.id!r}; "
                "log other data into another --out"
            )
        if texts is not None and texts[number] != row.text:
            raise LograError(
                f"the text of row {name!r} has changed since it was logged into {logging.path}; use another --out"
            )
    if len(stored) > len(rows):
        raise LograError(
            f"{logging.path} holds {len(stored)} rows and the data only {len(rows)}; log other data into another --out"
        )
    return len(stored)


def _interrupted(args: argparse.Namespace) -> int:
    print(f"logra: interrupted; what was logged is kept, go on with: {args.command_line}", file=sys.stderr)
    return 130


def _summarize(logging: Run, new: int, log_seconds: float, finalize_seconds: float, out: str) -> None:
    store = logging.store
    rate = f", {new / log_seconds:,.1f} rows/s" if new and log_seconds > 0 else ""
    print(f"store     {out}: {len(store):,} rows ({len(store) - new:,} were there before)")
    if logging.skipped:
        print(f"skipped   {len(logging.skipped):,} rows whose gradient is NaN or infinite; `logra info` names them")
    print(f"row       {store.dim:,} numbers from {len(store.layers)} layers, {store.dtype}")
    print(f"size      {store.nbytes / 1e6:,.1f} MB in {session.shards(len(store.manifest.shards))}")
    print(f"log       {log_seconds:.1f} s{rate}")
    print(f"finalize  {finalize_seconds:.1f} s for curvature and self-influence")
